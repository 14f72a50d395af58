"""How the passes over the features are cut into blocks, and the products that a block takes."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ....device.pages import Scratch

# Values that are made of F in one block, beside a copy of those features that have another dtype: larger ones are
# faster, but 2 MiB in float32 are to be small beside grad_F, in the forward pass too, whose blocks the C library may
# keep for later (kernels/LOG.md).
BLOCK_VALUES = 1 << 19
# Fewer items share a block rather than that it has fewer pixels.
BLOCK_PIXELS = 256


def blocks(F: Tensor, rows: int, items: slice) -> Iterator[tuple[slice, slice]]:
    """Index pairs (items, pixels) that cover F in blocks; `rows` is how many values are made of a pixel, or read where
    those are more."""
    B, pixels = items.stop - items.start, F.shape[2]
    step_b = _even(B, BLOCK_VALUES // max(1, min(pixels, BLOCK_PIXELS) * rows))
    step_n = _even(pixels, BLOCK_VALUES // (step_b * rows))
    for b in range(items.start, items.stop, step_b):
        for n in range(0, pixels, step_n):
            yield slice(b, min(b + step_b, items.stop)), slice(n, min(n + step_n, pixels))


def _even(size: int, step: int) -> int:
    """The step, `step` or less, that cuts `size` into as many parts of much the same size."""
    parts = -(-size // max(1, step))
    return max(1, -(-size // max(1, parts)))


def carved(scratch: Scratch, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors side by side in one piece of memory."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(scratch.shaped(sum(sizes)).split(sizes), shapes, strict=True)]


def features(F: Tensor, b: slice, n: slice, copies: Scratch) -> Tensor:
    """The features of a block in the dtype of `copies`: F itself where it has that, else a copy there."""
    f = F[b, :, n]
    return f if f.dtype == copies.dtype else copies.like(f).copy_(f)


# F̃'s row of ones need not be made: a product with F̃ treats the last column of its other side, or of itself, apart.


def rows_from(A: Tensor, f: Tensor, out: Tensor | None = None) -> Tensor:
    """AF̃ [b, Q, n] of `A` [b, Q, K+1] and features `f` [b, K, n]."""
    K = f.shape[1]
    return torch.baddbmm(A[..., K:], A[..., :K], f, out=out)


def add_products(sums: Tensor, y: Tensor, f: Tensor) -> None:
    """Adds yF̃ᵀ to `sums` [b, Q, K+1]; `y` [b, Q, n] and features `f` [b, K, n]."""
    K = f.shape[1]
    sums[..., :K] += torch.bmm(y, f.mT)
    sums[..., K] += y.sum(2, dtype=sums.dtype)


def precision_of(d: Tensor, dtype: torch.dtype, inverted: bool = False) -> Callable[[slice, slice], Tensor]:
    """Gives 1/d of a block, [b, channels, n] or [b, 1, 1]; `d` itself where it is already `inverted`."""

    def inverse(part: Tensor) -> Tensor:
        return part.to(dtype) if inverted else part.to(dtype).reciprocal()

    if d.shape[2] > 1:
        return lambda b, n: inverse(d[b, :, n])
    once = inverse(d)
    return lambda b, n: once[b]


def scale(rows: Tensor, precision: Tensor) -> Tensor:
    """Rows [b, Q·channels, n] times 1/d, in place; channels are the inner ones."""
    rows.unflatten(1, (-1, precision.shape[1])).mul_(precision.unsqueeze(1))
    return rows


def delta(x: Tensor, loc: Tensor | None, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """x − μ, without the part of μ that is linear in the features, [b, S·channels, n]."""
    delta = x[:, b, :, n].to(dtype)
    return (delta if loc is None else delta - loc[:, b, :, n].to(dtype)).transpose(0, 1).flatten(1, 2)


def of_items(W: Tensor, b: slice) -> Tensor:
    """The weights of some items, [b, ...]: a view where all share one."""
    return W[b] if W.shape[0] > 1 else W.expand(b.stop - b.start, *W.shape[1:])


def rows(W: Tensor) -> Tensor:
    """[., channels, R, K+1] -> [., R·channels, K+1], channels inside."""
    return W.transpose(1, 2).flatten(1, 2)
