"""How the passes over P are cut into blocks, so that nothing of the size of P is allocated but its gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ....device.pages import Scratch

# Values of P in one block (4 MiB in float32): smaller ones pay for the calls, larger ones leave the caches
# (kernels/LOG.md). Vectors over the pixels are made for several blocks at once: a call costs as much as many thousand
# values; but memory of more than a few hundred thousand is given back and touched anew each time.
BLOCK_VALUES = 1 << 20
VECTOR_VALUES = 1 << 18

Block = tuple[slice, slice]  # items, pixels


def blocks(items: slice, N: int, row: int, values: int) -> Iterator[Block]:
    """Index pairs (items, pixels) that cover `items` in blocks of about that many values, `row` of them a pixel."""
    B = items.stop - items.start
    step_b = max(1, min(B, values // max(1, min(N, 1024) * row)))
    step_n = max(1, values // (step_b * row))
    for b in range(items.start, items.stop, step_b):
        for n in range(0, N, step_n):
            yield slice(b, min(b + step_b, items.stop)), slice(n, min(n + step_n, N))


def vector_blocks(P: Tensor, S: int, items: slice, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks for vectors of S samples, with the part of P that goes with each. For float64, which takes twice the
    memory, of half as many values."""
    for b, n in blocks(items, P.shape[1], max(1, S), VECTOR_VALUES * 4 // dtype.itemsize):
        yield b, n, P[b, n]


def factor_blocks(P: Tensor, S: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of a part of P for products in `dtype`: a row of it, and δ, r, z of every sample."""
    B, N, R = P.shape
    for b, n in blocks(slice(0, B), N, R + 3 * S, BLOCK_VALUES * 4 // dtype.itemsize):
        yield b, n, P[b, n]


def factor_blocks_of(P: Tensor, items: slice, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """`factor_blocks` of some items, without samples."""
    N, R = P.shape[1:]
    for b, n in blocks(items, N, R, BLOCK_VALUES * 4 // dtype.itemsize):
        yield b, n, P[b, n]


def delta(x: Tensor, loc: Tensor, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """δ = x − μ of a block, [b, S, n]."""
    return (x[:, b, n].to(dtype) - loc[:, b, n].to(dtype)).transpose(0, 1)


def diagonal(d: Tensor, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """The block of a diagonal, [b, n or 1]."""
    return columns(d, b, n).to(dtype)


def columns(t: Tensor, b: slice, n: slice) -> Tensor:
    """The block of a [B, N] or [B, 1] tensor, [b, n or 1]."""
    return t[b, n if t.shape[1] > 1 else slice(None)]


# A product with P is written in the order in which the library streams P and keeps the thin operand, several times
# faster than the other one (kernels/LOG.md), and so that the result lies as its users read it.


def rows(a: Tensor, p: Tensor) -> Tensor:
    """(Pa)ᵀ = aᵀPᵀ [b, S, n] of `a` [b, S, R]."""
    return torch.bmm(a, p.mT)


def projection(z: Tensor, p: Tensor) -> Tensor:
    """zᵀP [b, S, R] of `z` [b, S, n]."""
    return torch.bmm(z, p)


def times(p: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """PA [b, n, R] of `A` [b, R, R], in `out`, which has the layout of P."""
    if p.stride(-1) <= p.stride(-2):
        return torch.bmm(p, A, out=out)
    torch.bmm(A.mT, p.mT, out=out.mT)
    return out


def scaled(p: Tensor, scale: Tensor | None, scratch: Scratch) -> Tensor:
    """A block of P in the dtype of `scratch`, its pixels times `scale` [b, n], which may be none."""
    if scale is not None:
        return torch.mul(p, scale.unsqueeze(-1), out=scratch.like(p))
    return p if p.dtype == scratch.dtype else scratch.like(p).copy_(p)
