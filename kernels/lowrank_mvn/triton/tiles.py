r"""Tiles of P whose values lie in the registers where a matrix product reads and leaves them.

A tensor core reads its left operand, and leaves its result, with fixed values in each lane: lane 4l + p holds of an
operand [n, k] the values (l + 8 …, p + 4t …) and of a result [n, m] the values (l + 8 …, 2p + t …). What lies in memory
in another order goes through shared memory, to and fro. But the order of n and k is free, and so is that of m: here a
tile is loaded in dimensions [i, t, h, j, w, l, p], whose last ones Triton gives to the lanes and the warps w, and
turned from one of these forms into the other by naming its dimensions anew, which moves nothing:

    row 8i + 4t + p of P       is k = 8i + 4t + p of an operand and m = 8i + 2p + t of a result
    column of P                is n, if the rows are contiguous; and where the columns are,
    column ((hW + w)8 + l)J + j  is n = [h, j / 2, w, j % 2, l] in that order, so that a lane loads J neighbours at once

Where rows are contiguous and their number is a multiple of four, BY_ROW lets a lane load four of them at once: row
16(i / 2) + 4p + 2(i % 2) + t has the place of 8i + 4t + p, and dimensions i and t are i / 2 and four.
"""

import triton
import triton.language as tl

from .common import Block, split


@triton.jit
def rows_of(m, BY_ROW: tl.constexpr = False):
    """The rows of P that the columns m of a result stand for."""
    if BY_ROW:
        return m // 16 * 16 + m // 2 % 4 * 4 + m // 8 % 2 * 2 + m % 2
    else:
        return m // 8 * 8 + m % 2 * 4 + m // 2 % 4


@triton.jit
def operand_rows(k, BY_ROW: tl.constexpr):
    """The rows of P that the columns k of an operand stand for."""
    if BY_ROW:
        return k // 16 * 16 + k % 4 * 4 + k // 8 % 2 * 2 + k // 4 % 2
    else:
        return k


@triton.jit
def places(
    BY_COLUMN: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_ROW: tl.constexpr = False,
):
    """Row and column of each value of a tile, which broadcast to [BLOCK_R / 8, 2, H, J, W, 8, 4], or, BY_ROW, to
    [BLOCK_R / 16, 4, ...]."""
    H: tl.constexpr = BLOCK_N // (8 * J * W)
    T: tl.constexpr = 4 if BY_ROW else 2
    i = tl.arange(0, BLOCK_R // (4 * T))[:, None, None, None, None, None, None]
    t = tl.arange(0, T)[None, :, None, None, None, None, None]
    h = tl.arange(0, H)[None, None, :, None, None, None, None]
    j = tl.arange(0, J)[None, None, None, :, None, None, None]
    w = tl.arange(0, W)[None, None, None, None, :, None, None]
    lane = tl.arange(0, 8)[None, None, None, None, None, :, None]
    p = tl.arange(0, 4)[None, None, None, None, None, None, :]
    if BY_COLUMN:
        columns = ((h * W + w) * 8 + lane) * J + j
    else:
        columns = (((h * (J // 2) + j // 2) * W + w) * 2 + j % 2) * 8 + lane
    return (16 * i + 4 * p + t if BY_ROW else 8 * i + 4 * t + p), columns


@triton.jit
def operand(tile):
    """A tile as the left operand [BLOCK_N, BLOCK_R] of a product."""
    I: tl.constexpr = tile.shape[0] * tile.shape[1] // 2
    H: tl.constexpr = tile.shape[2]
    J: tl.constexpr = tile.shape[3]
    W: tl.constexpr = tile.shape[4]
    tile = tl.reshape(tile, (I, 2, H, J // 2, 2, W, 8, 4))
    return tl.reshape(tl.permute(tile, (2, 3, 5, 4, 6, 0, 1, 7)), (8 * H * J * W, 8 * I))


@triton.jit
def result(tile):
    """A tile in the order of the result [BLOCK_N, BLOCK_R] of a product."""
    I: tl.constexpr = tile.shape[0] * tile.shape[1] // 2
    H: tl.constexpr = tile.shape[2]
    J: tl.constexpr = tile.shape[3]
    W: tl.constexpr = tile.shape[4]
    tile = tl.reshape(tile, (I, 2, H, J // 2, 2, W, 8, 4))
    return tl.reshape(tl.permute(tile, (2, 3, 5, 4, 6, 0, 7, 1)), (8 * H * J * W, 8 * I))


@triton.jit
def halves(tile):
    """The first and the second half of the rows of a tile."""
    I: tl.constexpr = tile.shape[0] // 2
    tile = tl.reshape(tile, (2, I, tile.shape[1], tile.shape[2], tile.shape[3], tile.shape[4], 8, 4))
    return tl.split(tl.permute(tile, (1, 2, 3, 4, 5, 6, 7, 0)))


@triton.jit
def product(P, high, low, whole, SPLIT_TF32: tl.constexpr, T=None):
    """T + PᵀA of an operand P and a matrix A [rows, m] = high + low = whole: in three tf32 products, or in float32."""
    P = P.to(tl.float32)
    if SPLIT_TF32:
        P_high, P_low = split(P)
        T = tl.dot(P_low, high, T, input_precision="tf32")
        T = tl.dot(P_high, low, T, input_precision="tf32")
        return tl.dot(P_high, high, T, input_precision="tf32")
    else:
        return tl.dot(P, whole, T, input_precision="ieee")


@triton.jit
def tile_of(a, J: tl.constexpr, W: tl.constexpr):
    """The inverse of `result`."""
    I: tl.constexpr = a.shape[1] // 8
    H: tl.constexpr = a.shape[0] // (8 * J * W)
    a = tl.permute(tl.reshape(a, (H, J // 2, W, 2, 8, I, 4, 2)), (5, 7, 0, 1, 3, 2, 4, 6))
    return tl.reshape(a, (I, 2, H, J, W, 8, 4))


@triton.jit
def ordered(a, BY_COLUMN: tl.constexpr, J: tl.constexpr, W: tl.constexpr):
    """Values of the columns [BLOCK_N], in the order of a result's rows."""
    BLOCK_N: tl.constexpr = a.shape[0]
    if BY_COLUMN:
        a = tl.permute(tl.reshape(a, (BLOCK_N // (8 * J * W), W, 8, J // 2, 2)), (0, 3, 1, 4, 2))
        return tl.reshape(a, (BLOCK_N,))
    else:
        return a


@triton.jit
def in_memory(a, BY_COLUMN: tl.constexpr, J: tl.constexpr, W: tl.constexpr):
    """The inverse of `ordered`."""
    BLOCK_N: tl.constexpr = a.shape[0]
    if BY_COLUMN:
        a = tl.permute(tl.reshape(a, (BLOCK_N // (8 * J * W), J // 2, W, 2, 8)), (0, 2, 4, 1, 3))
        return tl.reshape(a, (BLOCK_N,))
    else:
        return a


@triton.jit
def load_placed(P_ptr, rows, columns, n, N, stride_pr, stride_pn, R: tl.constexpr, NARROW: tl.constexpr):
    """The tile of P from column n on, in its own dtype, zero outside."""
    offsets = _offsets(rows, columns, stride_pr, stride_pn, NARROW)
    mask = (rows < R) & (n + columns < N)
    return tl.load(P_ptr + tl.full((), 1, tl.int64) * n * stride_pn + offsets, mask=mask, other=0.0)


@triton.jit
def store_result(
    P_ptr,
    a,
    tile: tl.constexpr,
    n,
    N,
    stride_pr,
    stride_pn,
    R: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    BY_ROW: tl.constexpr = False,
):
    """Stores a result [BLOCK_N, BLOCK_R] as the tile of P from column n and row `tile` · BLOCK_R on."""
    BLOCK_N: tl.constexpr = a.shape[0]
    BLOCK_R: tl.constexpr = a.shape[1]
    P_ptr += tl.full((), 1, tl.int64) * n * stride_pn
    if BY_COLUMN or BY_ROW:
        rows, columns = places(BY_COLUMN, J, W, BLOCK_R, BLOCK_N, BY_ROW)
        a = tile_of(a, J, W)
        if BY_ROW:
            a = tl.reshape(a, (BLOCK_R // 16, 4, a.shape[2], J, W, 8, 4))
        rows += tile * BLOCK_R
        offsets = _offsets(rows, columns, stride_pr, stride_pn, NARROW)
        tl.store(P_ptr + offsets, a, mask=(rows < R) & (n + columns < N))
    else:  # the four neighbours that neighbouring lanes hold are less than what memory wants to be written at once
        a = tl.reshape(tl.permute(tl.reshape(a, (BLOCK_N, BLOCK_R // 8, 4, 2)), (0, 1, 3, 2)), (BLOCK_N, BLOCK_R))
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        columns = tl.arange(0, BLOCK_N)[:, None]
        offsets = _offsets(rows, columns, stride_pr, stride_pn, NARROW)
        tl.store(P_ptr + offsets, a, mask=(rows < R) & (n + columns < N))


@triton.jit
def _offsets(rows, columns, stride_pr, stride_pn, NARROW: tl.constexpr):
    """From the tile's first column; with NARROW they fit an int32."""
    if NARROW:
        return rows * stride_pr + columns * stride_pn
    else:
        return rows.to(tl.int64) * stride_pr + columns.to(tl.int64) * stride_pn


def shape(block: Block, by_column: bool) -> dict:
    """BY_COLUMN, J and W of a tile: four values of 4 bytes are what one instruction loads."""
    J = 4 if by_column and block.columns >= 32 else 2
    return {"BY_COLUMN": by_column, "J": J, "W": max(1, min(block.num_warps, block.columns // (8 * J)))}


__all__ = [
    "halves",
    "in_memory",
    "load_placed",
    "operand",
    "operand_rows",
    "ordered",
    "places",
    "product",
    "result",
    "rows_of",
    "shape",
    "store_result",
]
