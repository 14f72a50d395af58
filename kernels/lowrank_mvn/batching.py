"""Batching rules of operators for `torch.func.vmap`: the mapped dimension V joins the items B or, where the factor is
shared, the samples S. Which dimension of a tensor that is stands in the operator's `dims`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .registry import Operator


def front(t: Tensor, dim: int | None, V: int) -> Tensor:
    """The mapped dimension in front; a tensor that is not mapped is expanded. A view."""
    return t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def joined(t: Tensor, dim: int | None, V: int, at: int) -> Tensor:
    """[..., B, ...] with V mapped -> [..., V·B, ...], B at position `at`. A tensor of one item is not copied."""
    return front(t, dim, V).movedim(0, at).flatten(at, at + 1)


def parted(t: Tensor, V: int, at: int) -> Tensor:
    """Undoes `joined`: V in front again."""
    split: Tensor = t.unflatten(at, (V, t.shape[at] // V))
    return split.movedim(at, 0)


def outputs_of(op: Operator, result: Any, part: Callable[[str, Tensor], tuple[Tensor, int | None]]) -> Any:
    """A batching rule's outputs and where they are mapped, `part` by `part`."""
    single = isinstance(result, Tensor)
    pairs = [
        part(n, t) if t.dim() == len(op.dims[n]) else (t, None)  # else an empty one, which nobody needed
        for n, t in zip(op.outputs, (result,) if single else result, strict=True)
    ]
    return pairs[0] if single else (tuple(t for t, _ in pairs), tuple(d for _, d in pairs))


def into_items(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    """Every tensor gets V·B items."""

    def join(n: str, t: Any) -> Any:
        return joined(t, mapped.get(n), V, op.dims[n].index("B")) if isinstance(t, Tensor) else t

    result = op(*(join(n, t) for n, t in given.items()))
    return outputs_of(op, result, lambda n, t: (parted(t, V, op.dims[n].index("B")), 0))


def into_samples(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int], shared: str = "") -> Any:
    """Tensors with samples get V·S of them; those of the items alone are not mapped, and P is read once.

    The tensor named `shared` may stay one for all samples.
    """
    S = max(front(t, mapped.get(n), V).shape[1] for n, t in given.items() if _has_samples(op, n, t))

    def join(n: str, t: Any) -> Any:
        if not _has_samples(op, n, t) or (n == shared and n not in mapped and len(t) == 1):
            return t
        split = front(t, mapped.get(n), V)
        return split.expand(V, S, *split.shape[2:]).flatten(0, 1)

    result = op(*(join(n, t) for n, t in given.items()))
    return outputs_of(op, result, lambda n, t: (parted(t, V, 0), 0) if "S" in op.dims[n] else (t, None))


def _has_samples(op: Operator, name: str, t: Any) -> bool:
    return isinstance(t, Tensor) and "S" in op.dims[name]


def one_by_one(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    """The operator is called V times, on views."""
    calls = [op(*(t.select(mapped[n], i) if n in mapped else t for n, t in given.items())) for i in range(V)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(op.outputs)
