"""The canonical shapes of the operators: which dimensions of a broadcast shape are items, and which are samples."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import sharding


class Layout:
    """Sorts the dimensions of a broadcast shape into items (those P and d vary over) and samples (those they share).

    P is then [B, N, R] and everything else [S, B, N], whatever was broadcast, and P is read once for all samples.
    """

    def __init__(self, shape: torch.Size, items_shape: torch.Size) -> None:
        self.shape = shape
        padded = (1,) * (len(shape) - len(items_shape)) + tuple(items_shape)
        self.item_dims = [i for i, size in enumerate(padded) if size == shape[i]]
        self.sample_dims = [i for i, size in enumerate(padded) if size != shape[i]]
        self.order = self.sample_dims + self.item_dims
        self.S = math.prod([shape[i] for i in self.sample_dims])
        self.B = math.prod([shape[i] for i in self.item_dims])
        self.items_shape = items_shape
        self.plain = len(shape) == 1 and not self.sample_dims  # [B] items, one sample: nothing to sort

    def vectors(self, t: Tensor) -> Tensor:
        """[..., N] -> [B, N] of what items have one of, a view where it can be one."""
        if t.shape[:-1] == self.items_shape and t.dim() == 2:
            return t
        return t.expand(*self.items_shape, t.shape[-1]).reshape(self.B, t.shape[-1])

    def factors(self, P: Tensor) -> Tensor:
        """[..., N, R] -> [B, N, R]: a view or, where P is broadcast over some of the items, a copy that lies as P."""
        if P.shape[:-2] == self.items_shape and P.dim() == 3:
            return P
        if P.stride(-2) < P.stride(-1):
            return self.factors(P.mT).mT
        return P.expand(*self.items_shape, *P.shape[-2:]).reshape(self.B, *P.shape[-2:])

    def samples(self, t: Tensor) -> Tensor:
        """[..., N] -> [S, B, N]."""
        if self.plain and t.shape[:-1] == self.shape:
            return t.unsqueeze(0)
        return self._ordered(t, list(self.shape)).reshape(self.S, self.B, t.shape[-1])

    def means(self, t: Tensor) -> Tensor:
        """[..., N] -> [S, B, N], or [1, B, N] where it has no sample dimension."""
        if self.plain and t.shape[:-1] == self.shape:
            return t.unsqueeze(0)
        padded = (1,) * (len(self.shape) - t.dim() + 1) + tuple(t.shape[:-1])
        if any(padded[i] != 1 for i in self.sample_dims):
            return self.samples(t)
        sizes = [1 if i in self.sample_dims else size for i, size in enumerate(self.shape)]
        return self._ordered(t, sizes).reshape(1, self.B, t.shape[-1])

    def _ordered(self, t: Tensor, sizes: list[int]) -> Tensor:
        padded = t[(None,) * (len(self.shape) + 1 - t.dim())]
        return padded.expand(*sizes, t.shape[-1]).permute([*self.order, len(self.shape)])

    def seed(self, P: Tensor) -> Tensor:
        """One for each item [B], from torch's generator, for samples of a factor that is made of `P`."""
        return sharding.beside(torch.randint(2**62, (self.B,), device=P.device), P)

    def restore(self, t: Tensor) -> Tensor:
        """[S, B, ...] -> the broadcast shape."""
        if self.plain:
            return t.squeeze(0)
        trailing = t.shape[2:]
        back = [self.order.index(i) for i in range(len(self.shape))]
        extra = range(len(back), len(back) + len(trailing))
        ordered = t.reshape([self.shape[i] for i in self.order] + list(trailing))
        return ordered.permute([*back, *extra])


def broadcast(*shapes: torch.Size, names: str = "the arguments") -> torch.Size:
    """The shape that all of them broadcast to.

    Raises:
        ValueError: there is none.
    """
    # Not torch.broadcast_shapes, whose first call imports sympy: 35 MB and a second.
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for i, size in enumerate(shape, len(result) - len(shape)):
            if result[i] == 1:
                result[i] = size
            elif size not in (1, result[i]):
                given = ", ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"Incompatible batch shapes of {names}: {given}")
    return torch.Size(result)


def broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    try:
        return broadcast(shape, target) == target
    except ValueError:
        return False


def concatenated(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One part is not copied, nor gathered where it is divided among processes."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


__all__ = ["Layout", "broadcast", "broadcasts_to", "concatenated"]
