"""What is asked of one argument, whoever takes it: each error names it, what was found and what was expected.

TypeError is for what is no tensor of a kind that can be computed with, ValueError for shapes, values and devices.
"""

import numbers
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey as ModeKey
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from . import sharding
from .layout import broadcast, broadcasts_to

NUMBER_OR_TENSOR = "a number or a floating-point tensor"
LAZY = UninitializedParameter, UninitializedBuffer
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def describe(t: object) -> str:
    if not isinstance(t, Tensor) or isinstance(t, LAZY):
        return type(t).__name__
    if t.is_nested:
        return "a nested tensor"
    return f"a tensor of dtype {t.dtype}" + ("" if t.layout == torch.strided else f" and layout {t.layout}")


def is_dense(t: object) -> bool:
    """A tensor whose values lie in memory, at strides."""
    if not isinstance(t, Tensor) or isinstance(t, LAZY):
        return False
    return t.layout == torch.strided and not t.is_nested


def floating(name: str, t: object, kind: str = "a floating-point tensor") -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in FLOATS or not is_dense(t):
        expected = "of float16, bfloat16, float32 or float64" if is_dense(t) else "that is dense"
        hint = f"; expected one {expected}" if isinstance(t, Tensor) else ""
        raise TypeError(f"{name} must be {kind}, got {describe(t)}{hint}")
    return t


def alike(**tensors: Tensor) -> None:
    """Floating-point tensors of one dtype on one device.

    Beside half precision a float32 `cov_diag` is welcome: rounding 1e-5 to bfloat16 moves log|D| by 100 nats at the
    size of an image. So are float32 weights beside half features, which a layer's are where autocast made the
    features. Under autocast any mixture without float64 is.
    """
    for name, t in tensors.items():
        floating(name, t)
    (first, anchor), *others = tensors.items()
    for name, t in others:
        if t.device != anchor.device:
            raise ValueError(f"{name} is on {t.device}, {first} on {anchor.device}; expected one device")
        if sharding.is_distributed(t) != sharding.is_distributed(anchor):
            kinds = [f"{n} is a {type(v).__name__}" for n, v in ((name, t), (first, anchor))]
            raise TypeError(f"{', '.join(kinds)}; expected distributed tensors or none (`distribute_tensor`)")
        if t.dtype == anchor.dtype:
            continue
        narrow = torch.float64 not in (t.dtype, anchor.dtype)
        may_be_wide = name == "cov_diag" or name.endswith((".weight", ".bias"))
        mixable = (may_be_wide and t.dtype == torch.float32) or torch.is_autocast_enabled(t.device.type)
        if not (narrow and mixable):
            raise TypeError(f"{name} has dtype {t.dtype}, {first} has {anchor.dtype}; expected one dtype")


def last_size(name: str, shape: torch.Size, reason: str, sizes: tuple[int, ...]) -> None:
    """Whether the last dimension is one of `sizes`, which it has to be for that `reason`."""
    if len(shape) < 1:
        raise ValueError(f"{name} must be at least one-dimensional: expected [..., {sizes[0]}] because {reason}")
    if shape[-1] not in sizes:
        expected = " or ".join(f"[..., {size}]" for size in sizes)
        raise ValueError(f"{name} has shape {list(shape)}, expected {expected} because {reason}")


def mask(name: str, t: object, N: int, device: torch.device) -> Tensor:
    """[..., N] of dtype bool."""
    if not isinstance(t, Tensor) or t.dtype != torch.bool or not is_dense(t):
        raise TypeError(f"{name} must be a tensor of dtype bool, got {describe(t)}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the parameters on {device}; expected one device")
    if t.shape[-1:] != (N,):
        raise ValueError(f"{name} has shape {list(t.shape)}, expected [..., {N}]")
    return t


def number(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A real number as a tensor [1]."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {NUMBER_OR_TENSOR}, got bool")
    value = value if isinstance(value, int | float) else float(value)
    try:
        return torch.full((1,), value, dtype=dtype, device=device)
    except (OverflowError, RuntimeError) as error:
        shown = repr(value) if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{name} is {shown}, expected a number that {dtype} holds") from error


def count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if operator.index(value) < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def index(name: str, value: Any, size: int, reason: str) -> int:
    """An index into `size` things, from the end if it is negative; returned as one from the start."""
    if isinstance(value, Tensor):
        if value.dtype not in INTEGERS or value.numel() != 1:
            raise TypeError(f"{name} must be an integer, got {describe(value)} of shape {list(value.shape)}")
        n = int(value)
    else:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {describe(value)}")
        n = operator.index(value)
    if not -size <= n < size:
        raise ValueError(f"{name} {n} is out of range for {reason}")
    return n % size


def sizes(name: str, value: Any) -> torch.Size:
    """A shape that somebody asks for."""
    try:
        shape = torch.Size(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a sequence of sizes, got {value!r}") from error
    if any(size < 0 for size in shape):
        raise ValueError(f"{name} is {list(shape)}, expected sizes that are not negative")
    return shape


def expansion(value: Any, batch_shape: torch.Size) -> torch.Size:
    """A batch shape that `batch_shape` expands to."""
    shape = sizes("batch_shape", value)
    if not broadcasts_to(batch_shape, shape):
        raise ValueError(f"batch_shape is {list(shape)}, expected one that {list(batch_shape)} expands to")
    return shape


def pair(name: str, value: Any, contents: str) -> tuple[Any, Any]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        found = f"{len(value)} values" if isinstance(value, tuple | list) else describe(value)
        raise TypeError(f"{name} must be a pair, {contents}; got {found}")
    return value[0], value[1]


def temperatures(value: Any) -> tuple[float, float]:
    """Factors of what is global and of what is local in a sample."""
    t_P, t_L = pair("temperature", value, "t_P and t_L")
    for t in (t_P, t_L):
        if isinstance(t, bool) or not isinstance(t, int | float | numbers.Real | Tensor):
            raise TypeError(f"temperature must be a pair of numbers, got {describe(t)}")
    return t_P, t_L


def noise(name: str, omega: Tensor, shape: torch.Size, size: int) -> None:
    if omega.dim() < 1 or omega.shape[-1] != size or not broadcasts_to(omega.shape[:-1], shape):
        raise ValueError(f"{name} has shape {list(omega.shape)}, expected one that broadcasts to {[*shape, size]}")


def mixing(A: object, shape: torch.Size, device: torch.device) -> Tensor:
    """[..., R, Q], of a batch that broadcasts with that of a factor of that shape [..., N, R]."""
    A, R = floating("A", A), shape[-1]
    if A.device != device:
        raise ValueError(f"A is on {A.device}, the factor on {device}; expected one device")
    if A.dim() < 2 or A.shape[-2] != R or A.shape[-1] < 1:
        raise ValueError(f"A has shape {list(A.shape)}, expected [..., {R}, Q] because the factor has {R} columns")
    broadcast(A.shape[:-2], shape[:-2], names="A and of the factor")
    return A


# --- Values ---------------------------------------------------------------------------------------------------------


def have_values(t: Tensor) -> bool:
    """Tensors of a dry run have none."""
    if not t.numel() or t.is_meta:
        return False
    return torch.compiler.is_dynamo_compiling() or torch._C._get_dispatch_mode(ModeKey.FAKE) is None


def finite(owner: object, tensors: Iterable[tuple[str, Tensor]], positive: str = "", constraint: object = None) -> None:
    """Raises ValueError for values that are not finite, or not above 0 in the tensor named `positive`.

    It looks at the extremes, which take no memory: P, or the features, may be most of what there is. Each process looks
    at its own part of a distributed tensor.
    """
    for name, t in tensors:
        held = sharding.local(t.detach())
        if not have_values(held):
            continue
        extremes = torch.stack(torch.aminmax(held))
        if not torch._is_all_true(torch.isfinite(extremes)):
            raise ValueError(f"{name} of shape {list(t.shape)} has values that are not finite")
        if name == positive and not torch._is_all_true(extremes > 0):
            raise ValueError(
                f"Expected parameter {name} (Tensor of shape {tuple(t.shape)}) of distribution {owner!r} to satisfy"
                f" the constraint {constraint!r}, but found values that are not positive"
            )
