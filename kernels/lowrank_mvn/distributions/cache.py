"""What a distribution keeps from one call to the next, for as long as its parameters are what they were."""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..factors.base import Capacitance
from ..state import state_of


class _Entry(NamedTuple):
    state: tuple[Any, ...]  # of the parameters
    mode: tuple[Any, ...]
    logdet: Tensor  # log|Σ| of the node of the last log-density or entropy
    saved: list[tuple[Tensor, int]]  # what else the node has saved for its backward pass, with its version
    capacitance: Capacitance | None


class Cache:
    """The capacitance, and the log-determinant of the joint node, which spares `entropy` a pass after `log_prob`.

    Both are forgotten when a parameter has moved (`state` says how that shows), and after a backward pass through what
    was returned: the node is spent then, and somebody who writes through `.data` does so after it.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def keep(
        self, parameters: list[Tensor], logdet: Tensor, capacitance: Capacitance | None, joint: Iterable[Tensor] = ()
    ) -> None:
        """Keeps what was computed from the parameters; `joint` are the other tensors that it shares its node with."""
        state = state_of(parameters)
        if state is None:
            return
        node = logdet.grad_fn
        saved = [(t, t._version) for t in joint] if node else []
        self._entry = _Entry(state, _mode(), logdet, saved, capacitance)
        if node:
            cache = weakref.ref(self)  # the node must not keep the cache that keeps the node
            node.register_hook(lambda *_: _forget(cache))

    def logdet(self, parameters: list[Tensor]) -> Tensor | None:
        """log|Σ| of the same mode, with the graph of the last log-density."""
        entry = self._valid(parameters)
        usable = entry and entry.mode == _mode() and all(t._version == version for t, version in entry.saved)
        return entry.logdet if entry and usable else None

    def capacitance(self, parameters: list[Tensor]) -> Capacitance | None:
        """Constants to autograd, so that only tensors made in inference mode are tied to the mode."""
        entry = self._valid(parameters)
        tied = entry is not None and entry.mode[:2] == (False, True) != _mode()[:2]
        return None if entry is None or tied else entry.capacitance

    def _valid(self, parameters: list[Tensor]) -> _Entry | None:
        if self._entry is None:
            return None
        state = state_of(parameters)
        return self._entry if state is not None and self._entry.state == state else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}  # a copy starts without


def _forget(cache: "weakref.ref[Cache]") -> None:
    found = cache()
    if found:
        found._entry = None


def _mode() -> tuple[Any, ...]:
    """What log|Σ| of one call has to share with the next: whether there are gradients, and the backward pass that they
    are in, where activations are made again."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._current_graph_task_id()
