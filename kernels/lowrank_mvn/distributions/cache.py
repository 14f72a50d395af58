"""What a distribution keeps from one call to the next, for as long as its parameters are what they were."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..factors.base import Capacitance
from ..registry import forward_mode, transformed


class _Entry(NamedTuple):
    state: tuple[Any, ...]  # of the parameters
    mode: tuple[bool, bool]  # grad mode and inference mode
    logdet: Tensor | None  # log|Σ| of the node of the last log-density; none once its backward pass has run
    capacitance: Capacitance | None


class Cache:
    """The capacitance, and the log-determinant of the joint node, which spares `entropy` a pass after `log_prob`.

    Both are forgotten when a parameter has moved: every tensor counts its in-place changes, views of it included.
    (Writing through `.data` or a NumPy view hides a change from that count, as it does from autograd.) Nothing is kept
    inside a transform of `torch.func`, whose tensors must not outlive it, nothing while compiling, and nothing of
    tensors made in inference mode, which count no changes.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def keep(self, parameters: list[Tensor], logdet: Tensor, capacitance: Capacitance | None) -> None:
        state = _state(parameters)
        if state is None:
            return
        self._entry = _Entry(state, _mode(), logdet, capacitance)
        if logdet.grad_fn is not None:
            cache = weakref.ref(self)  # the node must not keep the cache that keeps the node
            logdet.grad_fn.register_hook(lambda *_: _forget_node(cache, logdet_id))
            logdet_id = id(logdet)

    def logdet(self, parameters: list[Tensor]) -> Tensor | None:
        """log|Σ| of the same grad mode, with the graph of the last log-density."""
        entry = self._valid(parameters)
        return entry.logdet if entry and entry.mode == _mode() else None

    def capacitance(self, parameters: list[Tensor]) -> Capacitance | None:
        """Constants to autograd, so that only tensors made in inference mode are tied to the mode."""
        entry = self._valid(parameters)
        tied = entry is not None and entry.mode == (False, True) != _mode()
        return None if entry is None or tied else entry.capacitance

    def _valid(self, parameters: list[Tensor]) -> _Entry | None:
        state = _state(parameters)
        if self._entry is None or state is None or self._entry.state != state:
            return None
        return self._entry

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}  # a copy starts without


def _forget_node(cache: "weakref.ref[Cache]", node: int) -> None:
    """After a backward pass the node is spent; the capacitance is not."""
    found = cache()
    entry = found._entry if found else None
    if found and entry and id(entry.logdet) == node:
        found._entry = entry._replace(logdet=None)


def _state(parameters: list[Tensor]) -> tuple[Any, ...] | None:
    """Changes whenever a parameter does; none where that cannot be known."""
    if torch.compiler.is_compiling() or transformed() or forward_mode():
        return None
    if any(t.is_inference() for t in parameters):
        return None
    return tuple((id(t), t._version, _address(t)) for t in parameters)


def _address(t: Tensor) -> int:
    """Of the values, which assigning to `.data` changes; subclasses and tensors without values may have none."""
    return t.data_ptr() if type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta else 0


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
