"""Who does the same job: the names, what they need, and where they are built.

Every peer runs in a process of its own (`worker`). One that is not installed is named as missing in the results.
"""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from .operators import Arrays, Case, Operator

__all__ = ["ORACLE", "PEERS", "Job", "Peer", "build", "missing", "versions"]


@dataclass(frozen=True)
class Peer:
    name: str
    title: str
    requires: tuple[str, ...] = ("torch",)  # distributions to be installed
    module: str = "bench.peers_torch"  # where its jobs are built


class Job:
    """One operator on one set of inputs, ready to be called again and again."""

    def call(self) -> Any:
        """The timed work, done when it returns (on a GPU: queued)."""
        raise NotImplementedError

    def outputs(self) -> Arrays:
        """The results of one call, as arrays that `Operator.errors` understands."""
        raise NotImplementedError


PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "lowrank_mvn"),
        Peer("torch", "torch's class"),
        Peer("compile", "torch.compile of it"),
        Peer("linear_operator", "linear_operator", ("torch", "linear_operator")),
        Peer("numpyro", "NumPyro, jit", ("jax", "jaxlib", "numpyro"), "bench.peers_jax"),
        Peer("textbook", "textbook in torch"),
        Peer("betavae", "β-VAE"),
        Peer("textbook_compile", "torch.compile of it"),
        Peer("convolution", "convolution and einsum"),
        Peer("torchsparsegradutils", "torchsparsegradutils", ("torch", "torchsparsegradutils")),
        Peer("cholespy", "cholespy", ("torch", "cholespy")),
        Peer("cholespy_solve", "its solve alone", ("torch", "cholespy")),
    )
}
ORACLE = Peer("oracle", "torch's class in float64")


def missing(peer: Peer) -> str | None:
    """What has to be installed before this peer can run, or none."""
    absent = [name for name in peer.requires if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def versions() -> dict[str, str]:
    """Versions of everything that a time may depend on, of what is installed."""
    found = {}
    peers = ("jax", "jaxlib", "numpyro", "linear_operator", "cholespy", "torchsparsegradutils")
    for name in ("torch", "triton", "numpy", *peers):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build(peer: Peer, operator: Operator, case: Case, inputs: Arrays, device: str) -> Job:
    """The job of a peer. Imports its libraries, which is why it belongs into a process of its own.

    Raises:
        NotImplementedError: this installation has no such operator; the message says what is absent.
    """
    return importlib.import_module(peer.module).build(peer.name, operator, case, inputs, device)
