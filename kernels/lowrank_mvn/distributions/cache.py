"""What a distribution keeps from one call to the next, for as long as its parameters are what they were."""

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey as ModeKey
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..factors.base import Capacitance
from ..registry import forward_mode, transformed

# First bytes of a parameter on the CPU that are compared.
GLIMPSE = 512


class _Entry(NamedTuple):
    state: tuple[Any, ...]  # of the parameters
    mode: tuple[Any, ...]
    logdet: Tensor  # log|Σ| of the node of the last log-density or entropy
    saved: list[tuple[Tensor, int]]  # what else the node has saved for its backward pass, with its version
    capacitance: Capacitance | None


class Cache:
    """The capacitance, and the log-determinant of the joint node, which spares `entropy` a pass after `log_prob`.

    Both are forgotten when a parameter has moved, which shows in

    - the version that every tensor counts, views of it included, its storage and strides, and `requires_grad`;
    - a step of any optimiser: the fused ones of torch 2.13 and whatever writes through `.data` count no version;
    - a backward pass through what was returned: somebody who writes through `.data` does so after it;
    - on the CPU, its first bytes: an exchange of all values through `.data`, as averages of weights do.

    What remains is a write through `.data` into the midst of a large tensor, or on a device, with neither of the two
    passes in between (`torch.autograd.graph.increment_version` tells of one).

    Nothing is kept inside a transform of `torch.func`, whose tensors must not outlive it, nothing while a program is
    recorded (compiler, exporter, CUDA graph), which is run with other values, and nothing of tensors made in inference
    mode, which count no changes.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def keep(
        self, parameters: list[Tensor], logdet: Tensor, capacitance: Capacitance | None, joint: Iterable[Tensor] = ()
    ) -> None:
        """Keeps what was computed from the parameters; `joint` are the other tensors that it shares its node with."""
        state = _state(parameters)
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
        state = _state(parameters)
        return self._entry if state is not None and self._entry.state == state else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}  # a copy starts without


def _forget(cache: "weakref.ref[Cache]") -> None:
    found = cache()
    if found:
        found._entry = None


def _state(parameters: list[Tensor]) -> tuple[Any, ...] | None:
    """Changes whenever a parameter does; none where that cannot be known."""
    if torch.compiler.is_compiling() or transformed() or forward_mode():
        return None
    if any(map(torch._C._get_dispatch_mode, (ModeKey.FAKE, ModeKey.PROXY, ModeKey.FUNCTIONAL))):
        return None
    if any(t.is_inference() for t in parameters):
        return None
    if any(t.is_cuda for t in parameters) and torch.cuda.is_current_stream_capturing():
        return None
    # A trace keeps to itself: what was computed outside of it would be a constant of the program.
    return _Steps.taken(), torch._C._get_tracing_state(), *map(_state_of, parameters)


def _state_of(t: Tensor) -> tuple[Any, ...]:
    seen = t._version, t.requires_grad, t.shape, t.stride()
    if is_traceable_wrapper_subclass(t):
        return (
            *seen,
            *(_state_of(part) for n in t.__tensor_flatten__()[0] if isinstance(part := getattr(t, n), Tensor)),
        )
    if t.is_meta:
        return seen
    storage, start = t.untyped_storage(), t.data_ptr()
    first = b""
    if t.is_cpu:
        first = ctypes.string_at(start, min(GLIMPSE, storage.data_ptr() + storage.nbytes() - start))
    # A weak reference: the address of a storage is not given to another one while it is compared with.
    return (*seen, start, StorageWeakRef(storage), first)


class _Steps:
    """Counts the steps of all optimisers."""

    _count = 0
    _hook: Any = None

    @classmethod
    def taken(cls) -> int:
        if cls._hook is None:
            cls._hook = register_optimizer_step_post_hook(cls._step)
        return cls._count

    @classmethod
    def _step(cls, *_: Any) -> None:
        cls._count += 1


def _mode() -> tuple[Any, ...]:
    """What log|Σ| of one call has to share with the next: whether there are gradients, and the backward pass that they
    are in, where activations are made again."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._current_graph_task_id()
