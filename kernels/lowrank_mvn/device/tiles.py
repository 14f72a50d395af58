r"""Reading and writing tiles of a factor P, or of features, and the vectors beside them.

A tensor is given to a kernel as its pointer and its strides, in a tuple `*_at`: the items first, the columns (pixels)
last. What a kernel knows of its tiles when it is compiled is one constant, TILE. A tile is [rows, columns] in every
kernel, whatever the layout in memory: Triton lays the threads out along the dimension whose stride is 1. Offsets are
int64 before the first multiply.

The second half is about tiles whose values lie in the registers where a matrix product reads and leaves them. A tensor
core reads its left operand, and leaves its result, with fixed values in each lane: lane 4l + p holds of an operand
[n, k] the values (l + 8 …, p + 4t …) and of a result [n, m] the values (l + 8 …, 2p + t …). What lies in memory in
another order goes through shared memory, to and fro. But the order of n and k is free, and so is that of m: there a
tile is loaded in dimensions [i, t, h, j, w, l, p], whose last ones Triton gives to the lanes and the warps w, and
turned from one of these forms into the other by naming its dimensions anew, which moves nothing:

    row 8i + 4t + p of P       is k = 8i + 4t + p of an operand and m = 8i + 2p + t of a result
    column of P                is n, if the rows are contiguous; and where the columns are,
    column ((h·WARPS + w)8 + l)J + j  is n = [h, j / 2, w, j % 2, l] in that order: a lane loads J neighbours at once

Where rows are contiguous and their number is a multiple of four, BY_ROW lets a lane load four of them at once: row
16(i / 2) + 4p + 2(i % 2) + t has the place of 8i + 4t + p, and dimensions i and t are i / 2 and four.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """What is known of a kernel's tiles when it is compiled."""

    ROWS: int
    COLUMNS: int
    ALIGN: int  # what the strides of the factor (but that of its columns) are a multiple of
    VECTORS: int  # likewise of the vectors beside it, and of the number of columns
    NARROW: bool  # whether offsets inside a tile fit an int32


class Placed(NamedTuple):
    """Likewise of tiles whose values lie where a matrix product reads and leaves them."""

    ROWS: int
    COLUMNS: int
    ALIGN: int
    NARROW: bool
    BY_COLUMN: bool  # whether neighbouring columns are neighbours in memory
    J: int
    WARPS: int
    LIKE: bool  # whether the gradient has the strides of what it is the gradient of
    BY_ROW: bool = False
    ROW_ALIGN: int = 1  # what the strides but that of the rows are a multiple of, if BY_ROW


@triton.jit
def multiple(number, ALIGN: tl.constexpr):
    """`number`, a multiple of ALIGN, so that the compiler knows it: Triton 3.7 drops `multiple_of` on an argument."""
    if ALIGN == 1:
        return number
    else:
        return number // ALIGN * ALIGN


@triton.jit
def of_item(at, b, ALIGN: tl.constexpr):
    """Pointer and further strides of item b; all strides but the last one, that of the columns, divide by ALIGN."""
    item = (at[0] + b * multiple(at[1], ALIGN),)
    for i in tl.static_range(2, len(at)):  # neither starred expressions nor annotations are Triton's
        item = item + (multiple(at[i], 1 if i == len(at) - 1 else ALIGN),)  # type: ignore[assignment]  # noqa: RUF005
    return item


@triton.jit
def load_row(row, columns, mask, other: tl.constexpr = 0.0):
    """Values of some columns (int64) of a row: its pointer and the stride of its columns."""
    return tl.load(row[0] + columns * row[1], mask=mask, other=other)


@triton.jit
def tile_offsets(P, offs_r, TILE: tl.constexpr):
    """Offsets of a tile from its first column; they do not change from step to step, and with NARROW fit an int32."""
    _, stride_r, stride_n = P
    local = tl.arange(0, TILE.COLUMNS)
    if TILE.NARROW:
        return (offs_r * stride_r)[:, None] + (local * stride_n)[None, :]
    else:  # both branches would be compiled without it
        return (offs_r.to(tl.int64) * stride_r)[:, None] + (local.to(tl.int64) * stride_n)[None, :]


@triton.jit
def from_column(P, n):
    """The pointer to column n."""
    return P[0] + tl.full((), 1, tl.int64) * n * P[2]


@triton.jit
def load_tile(P, offs_r, n, N, R: tl.constexpr, TILE: tl.constexpr):
    """Rows offs_r and the columns from n on, in P's own dtype, zero outside.

    P is the pointer and the strides of rows and columns, here and below.
    """
    mask = (offs_r < R)[:, None] & ((n + tl.arange(0, TILE.COLUMNS)) < N)[None, :]
    return tl.load(from_column(P, n) + tile_offsets(P, offs_r, TILE), mask=mask, other=0.0)


@triton.jit
def scaled(P, scale, n, N, DTYPE: tl.constexpr, KIND: tl.constexpr = "float64"):
    """P·scale of a tile [R, n], its first column n, in DTYPE, for a product of that kind.

    In float64 behind a branch that is always taken: where Triton 3.7 sees that an operand of sm_80's or sm_90's float64
    product was loaded with 16 bits, it lays it out in pairs, and then fails to compile the product. "outer" has no such
    product, and of the branch gfx942 fails to compile some.
    """
    if DTYPE == tl.float64 and KIND != "outer":  # noqa: SIM300  (not a constant before it is compiled)
        out = tl.zeros(P.shape, DTYPE)
        if n < N:
            out = P.to(DTYPE) * scale
        return out
    else:
        return P.to(DTYPE) * scale


@triton.jit
def converted(P, n, N, DTYPE: tl.constexpr):
    """Casts to DTYPE without scaling; half precision is hidden as in `scaled`."""
    if P.dtype.primitive_bitwidth == 16:
        return scaled(P, 1.0, n, N, DTYPE)
    else:
        return P.to(DTYPE)


@triton.jit
def fold(a, WIDTH: tl.constexpr, FAR: tl.constexpr = False):
    """Sums of WIDTH columns each [R, n] -> [R, n / WIDTH], within a thread where it holds them all.

    Neighbouring columns are one thread's where they are neighbours in memory; where rows are, a thread has every so
    many columns (FAR).
    """
    if WIDTH == 1:
        return a
    elif FAR:
        return tl.sum(tl.reshape(a, (a.shape[0], WIDTH, a.shape[1] // WIDTH)), 1)
    else:
        return tl.sum(tl.reshape(a, (a.shape[0], a.shape[1] // WIDTH, WIDTH)), 2)


# --- Tiles that lie as a matrix product has them -------------------------------------------------------------------


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
def places(TILE: tl.constexpr):
    """Row and column of each value of a tile, which broadcast to [ROWS / 8, 2, H, J, WARPS, 8, 4], or, BY_ROW, to
    [ROWS / 16, 4, ...]."""
    J: tl.constexpr = TILE.J
    WARPS: tl.constexpr = TILE.WARPS
    H: tl.constexpr = TILE.COLUMNS // (8 * J * WARPS)
    T: tl.constexpr = 4 if TILE.BY_ROW else 2
    i = tl.arange(0, TILE.ROWS // (4 * T))[:, None, None, None, None, None, None]
    t = tl.arange(0, T)[None, :, None, None, None, None, None]
    h = tl.arange(0, H)[None, None, :, None, None, None, None]
    j = tl.arange(0, J)[None, None, None, :, None, None, None]
    w = tl.arange(0, WARPS)[None, None, None, None, :, None, None]
    lane = tl.arange(0, 8)[None, None, None, None, None, :, None]
    p = tl.arange(0, 4)[None, None, None, None, None, None, :]
    if TILE.BY_COLUMN:
        columns = ((h * WARPS + w) * 8 + lane) * J + j
    else:
        columns = (((h * (J // 2) + j // 2) * WARPS + w) * 2 + j % 2) * 8 + lane
    return (16 * i + 4 * p + t if TILE.BY_ROW else 8 * i + 4 * t + p), columns


@triton.jit
def _by_lanes(tile):
    """A tile in the dimensions [i, t, h, j / 2, j % 2, w, l, p]."""
    I: tl.constexpr = tile.shape[0] * tile.shape[1] // 2
    return tl.reshape(tile, (I, 2, tile.shape[2], tile.shape[3] // 2, 2, tile.shape[4], 8, 4))


@triton.jit
def operand(tile):
    """A tile as the left operand [columns, rows] of a product."""
    tile = _by_lanes(tile)
    columns: tl.constexpr = 16 * tile.shape[2] * tile.shape[3] * tile.shape[5]
    return tl.reshape(tl.permute(tile, (2, 3, 5, 4, 6, 0, 1, 7)), (columns, 8 * tile.shape[0]))


@triton.jit
def result(tile):
    """A tile in the order of the result [columns, rows] of a product."""
    tile = _by_lanes(tile)
    columns: tl.constexpr = 16 * tile.shape[2] * tile.shape[3] * tile.shape[5]
    return tl.reshape(tl.permute(tile, (2, 3, 5, 4, 6, 0, 7, 1)), (columns, 8 * tile.shape[0]))


@triton.jit
def halves(tile):
    """The first and the second half of the rows of a tile."""
    I: tl.constexpr = tile.shape[0] // 2
    tile = tl.reshape(tile, (2, I, tile.shape[1], tile.shape[2], tile.shape[3], tile.shape[4], 8, 4))
    return tl.split(tl.permute(tile, (1, 2, 3, 4, 5, 6, 7, 0)))


@triton.jit
def _tile_of(a, TILE: tl.constexpr):
    """The inverse of `result`."""
    I: tl.constexpr = a.shape[1] // 8
    J: tl.constexpr = TILE.J
    WARPS: tl.constexpr = TILE.WARPS
    H: tl.constexpr = a.shape[0] // (8 * J * WARPS)
    a = tl.permute(tl.reshape(a, (H, J // 2, WARPS, 2, 8, I, 4, 2)), (5, 7, 0, 1, 3, 2, 4, 6))
    if TILE.BY_ROW:
        return tl.reshape(a, (I // 2, 4, H, J, WARPS, 8, 4))
    else:
        return tl.reshape(a, (I, 2, H, J, WARPS, 8, 4))


@triton.jit
def ordered(a, TILE: tl.constexpr):
    """Values of the columns, in the order of a result's rows."""
    if TILE.BY_COLUMN:
        BLOCK_N: tl.constexpr = a.shape[0]
        J: tl.constexpr = TILE.J
        WARPS: tl.constexpr = TILE.WARPS
        a = tl.permute(tl.reshape(a, (BLOCK_N // (8 * J * WARPS), WARPS, 8, J // 2, 2)), (0, 3, 1, 4, 2))
        return tl.reshape(a, (BLOCK_N,))
    else:
        return a


@triton.jit
def in_memory(a, TILE: tl.constexpr):
    """The inverse of `ordered`."""
    if TILE.BY_COLUMN:
        BLOCK_N: tl.constexpr = a.shape[0]
        J: tl.constexpr = TILE.J
        WARPS: tl.constexpr = TILE.WARPS
        a = tl.permute(tl.reshape(a, (BLOCK_N // (8 * J * WARPS), J // 2, WARPS, 2, 8)), (0, 2, 4, 1, 3))
        return tl.reshape(a, (BLOCK_N,))
    else:
        return a


@triton.jit
def load_placed(P, rows, columns, n, N, R: tl.constexpr, TILE: tl.constexpr):
    """The tile from column n on, in P's own dtype, zero outside."""
    mask = (rows < R) & (n + columns < N)
    return tl.load(from_column(P, n) + _offsets(P, rows, columns, TILE.NARROW), mask=mask, other=0.0)


@triton.jit
def store_result(P, a, tile: tl.constexpr, n, N, R: tl.constexpr, TILE: tl.constexpr):
    """Stores a result [columns, rows] as the tile of P from column n and row `tile` · ROWS on."""
    BLOCK_N: tl.constexpr = a.shape[0]
    BLOCK_R: tl.constexpr = a.shape[1]
    if TILE.BY_COLUMN or TILE.BY_ROW:
        rows, columns = places(TILE)
        a = _tile_of(a, TILE)
        rows += tile * BLOCK_R
    else:  # the four neighbours that neighbouring lanes hold are less than what memory wants to be written at once
        a = tl.reshape(tl.permute(tl.reshape(a, (BLOCK_N, BLOCK_R // 8, 4, 2)), (0, 1, 3, 2)), (BLOCK_N, BLOCK_R))
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        columns = tl.arange(0, BLOCK_N)[:, None]
    offsets = _offsets(P, rows, columns, TILE.NARROW)
    tl.store(from_column(P, n) + offsets, a, mask=(rows < R) & (n + columns < N))


@triton.jit
def _offsets(P, rows, columns, NARROW: tl.constexpr):
    """From the tile's first column; with NARROW they fit an int32."""
    _, stride_r, stride_n = P
    if NARROW:
        return rows * stride_r + columns * stride_n
    else:
        return rows.to(tl.int64) * stride_r + columns.to(tl.int64) * stride_n
