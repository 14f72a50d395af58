r"""How much memory a training step takes, from a dry run of the step that allocates nothing.

The step itself (`training.loop.differentiate`) runs on fake tensors, which have shapes and no values. A dispatch mode
notes when each piece of memory is allocated and when it is freed, so that all that autograd keeps, computes again and
writes is counted as it happens. The weights, Adam's two states and the operators' own blocks, which a dry run does not
show (`SCRATCH`), are added.

Every piece is a constant, times the images of a micro-batch or not, times the pixels of one resolution or not. The dry
run uses an image side and a batch that are large primes: the factors of a piece's size say what it grows with, and a
sum over the pieces gives the peak at any other size.

Tensors are counted as torch's allocator sees them. Other bytes (the C library's between two pieces of memory, a GPU's
context and workspaces) are not; `python -m bench.fit` measures the tensors on a CPU.
"""

import dataclasses
import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lowrank_mvn.factors.dense.aten import blocks as dense
from lowrank_mvn.factors.linear.aten import blocks as linear

from ..config import Config
from ..models.vae import VAE
from ..objective import Constraints
from ..training.loop import differentiate

__all__ = ["FORMULATIONS", "Peak", "StepMemory", "formulated", "with_images"]

FORMULATIONS = {
    "reference": "P made, torch's class",
    "kernels": "P made, lowrank_mvn",
    "linear": "from the features",
}
"""Ways to take a likelihood with a low-rank factor, by the names that a head lists (`Head.formulations`)."""

# Sides of the dry run's images at the resolutions of the network, each half of the one before (rounded up), and its
# images in a batch. Primes, of which no network has a multiple for a number of features.
PRIME_SIDES = 12241, 6121, 3061, 1531
PRIME_BATCH = 10007

# What a piece belongs to.
KINDS = WEIGHTS, NETWORK, LIKELIHOOD = "weights", "network", "likelihood"


class Peak(NamedTuple):
    """The largest amount of memory alive at once in a training step, in bytes, and what it is made of."""

    total: int
    weights: int  # with their gradients and Adam's states: all that does not grow with the batch
    network: int  # images, what encoder and decoder keep, and their gradients
    likelihood: int  # P, its gradient, and temporaries

    @property
    def binds(self) -> str:
        """The largest of the three."""
        parts = self._asdict()
        return max(KINDS, key=parts.__getitem__)


class _TorchNormal(td.LowRankMultivariateNormal):
    """torch's class with what the objective asks for."""

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(value.device.type, enabled=False):
            return self.log_prob(value), self.entropy()  # type: ignore[no-untyped-call]


class _ReferenceHead(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, mean_only: bool = False) -> Any:
        p = self.head(features, mean_only)
        if mean_only:
            return p
        with torch.autocast(features.device.type, enabled=False):
            return _TorchNormal(p.loc, p.cov_factor, p.cov_diag, validate_args=False)


def formulated(config: Config, formulation: str) -> VAE:
    """The network of `config` with the likelihood in one of `FORMULATIONS`."""
    vae = VAE(config.replace(model={"factor": "linear" if formulation == "linear" else "materialised"}))
    if formulation == "reference":
        vae.add_module("head", _ReferenceHead(vae.head))
    return vae


def with_images(config: Config, height: int, width: int, batch: int, accumulate: int = 1) -> Config:
    """`config` for images of this size, `batch` to a step in `accumulate` micro-batches."""
    images = {"height": height, "width": width}
    return config.replace(data=images, training={"batch": batch, "accumulate": accumulate})


# --- The dry run ---------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """Pieces of memory and, in order, their allocations (a piece's number) and ends (the complement of its number)."""

    sizes: list[int] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)
    caps: list[float] = dataclasses.field(default_factory=list)  # no size of images makes it larger
    events: list[int] = dataclasses.field(default_factory=list)
    gradients: list[int] = dataclasses.field(default_factory=list)  # numbers of the weights' gradients
    images: int = 0  # number of the images

    def made(self, size: int, kind: str, cap: float = np.inf) -> int:
        self.sizes.append(size)
        self.kinds.append(kind)
        self.caps.append(cap)
        self.events.append(len(self.sizes) - 1)
        return self.events[-1]

    def gone(self, number: int) -> None:
        self.events.append(~number)

    def sort(self) -> None:
        """Sorts what ends at the same time (autocast's copies of weights, in the order of their addresses)."""
        ordered: list[int] = []
        for ends, group in itertools.groupby(self.events, lambda event: event < 0):
            events = list(group)
            ordered += sorted(events) if ends else events
        self.events = ordered


class _Recorder(TorchDispatchMode):
    """Notes every storage that an operator returns for the first time, and its end."""

    def __init__(self, record: _Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record, self.kind = record, NETWORK
        self.numbers: dict[int, int | None] = {}  # of storages alive, by identity; None: there before

    def known(self, *tensors: Tensor) -> None:
        for t in tensors:
            self._note(t, None)

    def number(self, t: Tensor) -> int | None:
        return self.numbers[id(t.untyped_storage())]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scratch = SCRATCH.get(getattr(func, "_opname", ""))
        if scratch is not None:
            self.record.gone(self.record.made(*scratch(*args)))
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":
            tree_map_only(Tensor, self._returned, out)
        return out

    def _returned(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if id(storage) not in self.numbers and storage.nbytes():
            self._note(t, self.record.made(storage.nbytes(), self.kind))

    def _note(self, t: Tensor, number: int | None) -> None:
        storage = t.untyped_storage()
        self.numbers[id(storage)] = number
        weakref.finalize(storage, self._ended, id(storage)).atexit = False

    def _ended(self, key: int) -> None:
        number = self.numbers.pop(key)
        if number is not None:
            self.record.gone(number)


def _scratch(block_values: int, bytes_per_value: int) -> Callable[..., tuple[int, str, float]]:
    def scratch(*args: Any) -> tuple[int, str, float]:
        largest = max((t for t in args if isinstance(t, Tensor)), key=Tensor.numel)  # P or F
        return bytes_per_value * largest.numel(), LIKELIHOOD, bytes_per_value * block_values

    return scratch


# What an operator of `lowrank_mvn` allocates and frees inside, and the most that it ever does: of P a block in float64,
# or two of half the size where its columns are nearly collinear, as they are at the start of training; two blocks in
# float64 of F and the rows added to it.
_DENSE, _LINEAR = _scratch(dense.BLOCK_VALUES, 8), _scratch(linear.BLOCK_VALUES // 2, 16)
_LINEAR_BACKWARD = _scratch(linear.BLOCK_VALUES, 16)
SCRATCH: dict[str, Callable[..., tuple[int, str, float]]] = {
    "mahalanobis_and_logdet": _DENSE,
    "mahalanobis_and_logdet_backward": _DENSE,
    "logdet": _DENSE,
    "logdet_backward": _DENSE,
    "linear_mahalanobis_and_logdet": _LINEAR,
    "linear_mahalanobis_and_logdet_backward": _LINEAR_BACKWARD,
    "linear_logdet": _LINEAR,
    "linear_logdet_backward": _LINEAR_BACKWARD,
}


@contextmanager
def _phases(vae: VAE, recorder: _Recorder) -> Iterator[None]:
    """Pieces between the decoder's end and the gradient of its features belong to the likelihood."""

    def decoder_begins(*_: Any) -> None:
        recorder.kind = NETWORK

    def decoder_ends(module: nn.Module, args: Any, features: Tensor) -> None:
        recorder.kind = LIKELIHOOD
        if features.requires_grad:
            features.register_hook(decoder_begins)

    handles = [vae.decoder.register_forward_pre_hook(decoder_begins), vae.decoder.register_forward_hook(decoder_ends)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_cpu(t: Tensor) -> Any:
    empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
    return nn.Parameter(empty) if isinstance(t, nn.Parameter) else empty


def _dry_run(config: Config, formulation: str, mean_only: bool) -> _Record:
    record = _Record()
    collecting = gc.isenabled()
    gc.disable()  # an end is noted at once or, where objects form a cycle, never: not at some other time
    try:
        with torch.device("meta"):  # where a start for the weights costs nothing
            vae = formulated(config, formulation)
        with FakeTensorMode():
            for module in vae.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: _on_cpu(t) for name, t in tensors.items() if t is not None})
            vae.freeze(config.objective.mean == "frozen" and not mean_only)
            x = torch.empty(config.training.batch, *config.image_shape)
            constraints = Constraints.of(config)
            parameters, buffers = list(vae.parameters()), list(vae.buffers())
            for p in parameters:
                record.made((3 if p.requires_grad else 1) * p.nbytes, WEIGHTS)  # and Adam's two states
            record.made(2 * sum(b.nbytes for b in buffers), WEIGHTS)  # and copies, in case the step is not finite
            record.images = record.made(x.nbytes, NETWORK)
            recorder = _Recorder(record)
            recorder.known(x, *parameters, *buffers, *constraints.multipliers.values())
            with recorder, _phases(vae, recorder):
                differentiate(vae, x, constraints, config, mean_only)
            recorder.record = _Record()  # the step has ended
            grads = [p.grad for p in parameters if p.grad is not None]
            record.gradients = [n for n in map(recorder.number, grads) if n is not None]
            record.sort()
    finally:
        if collecting:
            gc.enable()
    return record


# --- The model -----------------------------------------------------------------------------------------------------


class StepMemory:
    """The peak of a training step of `config`, for any number of images of any size.

    Args:
        config: precision, checkpointing and memory format are followed; batch and accumulation are asked for later.
        formulation: one of `FORMULATIONS`; of no consequence where the head lists none.

    Raises:
        ValueError: an unknown formulation.
    """

    def __init__(self, config: Config, formulation: str = "linear") -> None:
        if formulation not in FORMULATIONS:
            raise ValueError(f"formulation is {formulation!r}, expected one of {', '.join(FORMULATIONS)}")
        _, self.height, self.width = config.image_shape
        config = with_images(config, PRIME_SIDES[0], PRIME_SIDES[0], PRIME_BATCH)
        self.phases = [_sizes(config, formulation, False)]
        if config.training.mean_only_steps:
            # The formulation does not matter here: the covariance head is left out.
            self.phases.append(_sizes(config, "linear", True))

    def peak(self, side: int | None = None, batch: int = 1, accumulate: int = 1) -> Peak:
        """Of `batch` images in `accumulate` micro-batches: of the configuration's size, or squares of `side`."""
        height, width = (self.height, self.width) if side is None else (side, side)
        return max((s.peak(height, width, batch, accumulate) for s in self.phases), key=lambda peak: peak.total)


@functools.lru_cache(maxsize=64)
def _sizes(config: Config, formulation: str, mean_only: bool) -> "_Sizes":
    return _Sizes(_dry_run(config, formulation, mean_only))


class _Sizes:
    """The pieces of memory of a step, by what they grow with, from a dry run of `PRIME_BATCH` images."""

    def __init__(self, record: _Record) -> None:
        sizes = np.array(record.sizes, np.int64)
        self.in_batch = sizes % PRIME_BATCH == 0
        sizes = np.where(self.in_batch, sizes // PRIME_BATCH, sizes)
        self.resolution = np.zeros(len(sizes), int)  # 0: none, 1: the finest
        for resolution, side in enumerate(PRIME_SIDES, 1):
            here = sizes % side == 0
            assert np.all(sizes[here] % side**2 == 0), "a size that is in one side of an image, not in its pixels"
            sizes = np.where(here, sizes // side**2, sizes)
            self.resolution[here] = resolution
        self.constant = sizes
        self.caps, self.images = np.array(record.caps), record.images
        self.kinds = np.where(self.in_batch, np.array(record.kinds), WEIGHTS)
        self.is_gradient = np.zeros(len(sizes), bool)
        self.is_gradient[record.gradients] = True
        events = np.array(record.events)
        self.sign, self.number = np.where(events >= 0, 1, -1), np.where(events >= 0, events, ~events)

    def at(self, height: int, width: int, images: int) -> np.ndarray:
        """Bytes of each piece, for a micro-batch of so many images."""
        pixels = [1] + [-(-height // 2**i) * -(-width // 2**i) for i in range(len(PRIME_SIDES))]
        sizes = self.constant * np.array(pixels, float)[self.resolution] * np.where(self.in_batch, images, 1)
        return cast(np.ndarray, np.minimum(sizes, self.caps))

    def peak(self, height: int, width: int, batch: int, accumulate: int) -> Peak:
        sizes = self.at(height, width, batch // accumulate)
        changes = np.append(self.sign * sizes[self.number], 0)  # and the end
        if accumulate > 1:
            # From the second micro-batch on gradients are there: a new one ends once it is added.
            made = np.flatnonzero(self.is_gradient[self.number] & (self.sign > 0))
            gradients = changes[made]
            changes[made + 1] -= gradients
            changes[0] += gradients.sum() + (accumulate - 1) * sizes[self.images]
        alive = np.cumsum(changes)
        moment = int(alive.argmax())
        kinds = np.append(self.kinds[self.number], WEIGHTS)[: moment + 1]
        network, likelihood = (int(changes[: moment + 1][kinds == kind].sum()) for kind in (NETWORK, LIKELIHOOD))
        return Peak(total := int(alive[moment]), total - network - likelihood, network, likelihood)
