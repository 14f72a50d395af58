"""What shows that a tensor has moved: whoever keeps what was computed from it asks, and makes it again.

- The version that every tensor counts, views of it included; its storage, strides and `requires_grad`.
- A step of any optimiser: the fused ones of torch 2.13 and whatever writes through `.data` count no version.
- On the CPU, its first bytes: an exchange of all values through `.data`, as averages of weights do.

What remains is a write through `.data` into the midst of a large tensor, or on a device, without a step of an optimiser
(`torch.autograd.graph.increment_version` tells of one).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey as ModeKey
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .registry import forward_mode, transformed

# First bytes of a parameter on the CPU that are compared.
GLIMPSE = 512


def state_of(parameters: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Changes whenever a tensor does; none where nothing is to be kept.

    That is inside a transform of `torch.func`, whose tensors must not outlive it; while a program is recorded
    (compiler, exporter, CUDA graph), which is run with other values; and of tensors made in inference mode, which
    count no changes.
    """
    if torch.compiler.is_compiling() or transformed() or forward_mode():
        return None
    if any(map(torch._C._get_dispatch_mode, (ModeKey.FAKE, ModeKey.PROXY, ModeKey.FUNCTIONAL))):
        return None
    if any(t.is_inference() for t in parameters):
        return None
    if any(t.is_cuda for t in parameters) and torch.cuda.is_current_stream_capturing():
        return None
    # A trace keeps to itself: what was computed outside of it would be a constant of the program.
    return _Steps.taken(), torch._C._get_tracing_state(), *map(_state_of_one, parameters)


def _state_of_one(t: Tensor) -> tuple[Any, ...]:
    seen = t._version, t.requires_grad, t.shape, t.stride()
    if is_traceable_wrapper_subclass(t):
        parts = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
        return *seen, *(_state_of_one(part) for part in parts if isinstance(part, Tensor))
    if t.is_meta:
        return seen
    storage, start = t.untyped_storage(), t.data_ptr()
    first = b""
    if t.is_cpu:
        first = ctypes.string_at(start, min(GLIMPSE, storage.data_ptr() + storage.nbytes() - start))
    # A weak reference: the address of a storage is not given to another one while it is compared with.
    return *seen, start, StorageWeakRef(storage), first


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
