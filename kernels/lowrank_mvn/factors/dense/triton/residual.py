r"""Pass 2: rᵀD⁻¹r and PᵀD⁻¹r with r = δ − Pv, and with v = 0 the projection w = PᵀD⁻¹δ.

Where d is small, r is what is left of numbers hundreds of times its size, and q is a sum of N squares that is wanted
to 1e-8 of itself: r, its square and its projection are made in float64. That takes one conversion and two fused
multiply-adds for each value of P, which data-centre GPUs do several times faster than memory delivers the values; it
also makes this pass the same for items whose C needed float64 and for the others. r is stored, rounded once: the last
step of v is made of it, and takes its rounding back where the backward pass subtracts it from the same r.

One program does one split of the columns of one item and one sample; samples come first in the grid, so that those
after the first find P in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import narrow, reciprocal
from ....device.tiles import load_placed, load_row, multiple, of_item

# By padded rank: one warp and at most 32 values of P in the registers of a lane, in float64 beside float32.
BLOCKS: Table = {
    (16, True): Block(1, 64),
    (16, False): Block(1, 32),
    (32, True): Block(1, 32),
    (32, False): Block(1, 32),
    (64, True): Block(1, 16),
    (64, False): Block(1, 16),
    (128, True): Block(2, 16),
    (128, False): Block(2, 8),
}


class Lanes(NamedTuple):
    """The tiles of this kernel: LANES rows and GROUPS times NEAR columns lie beside each other in a warp's lanes."""

    ROWS: int
    COLUMNS: int
    ALIGN: int  # as in `tiles.Tile`
    NARROW: bool
    NEAR: int
    GROUPS: int
    LANES: int


@triton.jit
def _places(TILE: tl.constexpr):
    """Row and column of each value of a tile [., ., NEAR, GROUPS, LANES], dealt to the lanes from the last on."""
    NEAR: tl.constexpr = TILE.NEAR
    GROUPS: tl.constexpr = TILE.GROUPS
    LANES: tl.constexpr = TILE.LANES
    i = tl.arange(0, TILE.ROWS // LANES)[:, None, None, None, None]
    h = tl.arange(0, TILE.COLUMNS // (NEAR * GROUPS))[None, :, None, None, None]
    j = tl.arange(0, NEAR)[None, None, :, None, None]
    q = tl.arange(0, GROUPS)[None, None, None, :, None]
    p = tl.arange(0, LANES)[None, None, None, None, :]
    return i * LANES + p, (h * GROUPS + q) * NEAR + j


@triton.jit
def _coefficients(v_ptr, first, rows, R: tl.constexpr):
    """v of a tile's rows from `first` on, to multiply it with."""
    rows = first + tl.reshape(rows, (rows.shape[0], rows.shape[4]))
    return tl.load(v_ptr + rows, mask=rows < R, other=0.0)[:, None, None, None, :]


@triton.jit
def _placed(a, TILE: tl.constexpr):
    """Values of the columns as [H, NEAR, GROUPS]."""
    NEAR: tl.constexpr = TILE.NEAR
    GROUPS: tl.constexpr = TILE.GROUPS
    return tl.permute(tl.reshape(a, (TILE.COLUMNS // (NEAR * GROUPS), GROUPS, NEAR)), (0, 2, 1))


@triton.jit
def residual_kernel(
    x_at,  # [B, S, N]
    loc_at,  # [B, S, N]
    P_at,  # [B, R, N]
    d_at,  # [B, N], or [B, 1] if ONE_D; the diagonal of D⁻¹ if INVERTED
    v_ptr,  # [S, B, R], or none: r = δ
    g_ptr,  # [S, B, SPLITS, R]
    q_ptr,  # [S, B, SPLITS], written if there is v
    r_ptr,  # [S, B, N], likewise
    sizes,  # S, B, N
    cut,  # programs for an item, columns for each
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    INVERTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """rₙ = xₙ − μₙ − pₙᵀv, Σ pₙrₙ/dₙ and Σ rₙ²/dₙ of one split of the columns n of an item and a sample."""
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    NEAR: tl.constexpr = TILE.NEAR
    GROUPS: tl.constexpr = TILE.GROUPS
    LANES: tl.constexpr = TILE.LANES
    S, B, N = sizes
    SPLITS, length = cut
    pid = tl.program_id(0)
    pid_g = tl.program_id(1)  # the tile of R whose projection is made
    s = (pid % S).to(tl.int64)
    b = (pid // S // SPLITS).to(tl.int64)
    pid_s = pid // S % SPLITS
    N = multiple(N, TILE.ALIGN)
    x_item = of_item(of_item(x_at, b, TILE.ALIGN), s, TILE.ALIGN)
    loc_item = of_item(of_item(loc_at, b, TILE.ALIGN), s, TILE.ALIGN)
    P_item = of_item(P_at, b, TILE.ALIGN)
    d_item = of_item(d_at, b, 1 if ONE_D else TILE.ALIGN)
    rows, columns_p = _places(TILE)
    v_row = (s * B + b) * R
    if v_ptr is not None and TILES == 1:
        v = _coefficients(v_ptr + v_row, 0, rows, R)
    if ONE_D:
        d_one = tl.load(d_item[0]).to(tl.float64)
        d_inv_one = d_one if INVERTED else 1.0 / d_one
    if v_ptr is not None:
        r_row = r_ptr + (s * B + b) * N
        own = _placed(tl.arange(0, BLOCK_N), TILE)
    g = tl.zeros((BLOCK_R // LANES, GROUPS, LANES), tl.float64)
    q = tl.zeros((BLOCK_N // (NEAR * GROUPS), NEAR, GROUPS), tl.float64)
    start = pid_s * length
    for n in range(start, min(start + length, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        rows_g = pid_g * BLOCK_R + rows
        P = load_placed(P_item, rows_g, columns_p, n, N, R, TILE).to(tl.float64)
        x = load_row(x_item, columns, mask_n)
        r = _placed(x.to(tl.float64) - load_row(loc_item, columns, mask_n).to(tl.float64), TILE)
        if v_ptr is not None:
            if TILES == 1:
                r -= tl.sum(tl.sum(P * v, 0), 3)
            else:
                for tile in tl.static_range(TILES):
                    P_t = load_placed(P_item, tile * BLOCK_R + rows, columns_p, n, N, R, TILE).to(tl.float64)
                    r -= tl.sum(tl.sum(P_t * _coefficients(v_ptr + v_row, tile * BLOCK_R, rows, R), 0), 3)
        if ONE_D:
            d_inv = d_inv_one
        else:
            d = load_row(d_item, columns, mask_n, 1.0)
            d_inv = _placed(d.to(tl.float64) if INVERTED else reciprocal(d), TILE)
        z = r * d_inv
        if v_ptr is not None:
            q += r * z
            if pid_g == 0:
                tl.store(r_row + tl.full((), 1, tl.int64) * n + own, narrow(r, r_ptr), mask=n + own < N)
        g += tl.sum(tl.sum(P * z[None, :, :, :, None], 1), 1)
    out = (s * B + b) * SPLITS + pid_s
    rows_g = pid_g * BLOCK_R + tl.reshape(rows, (BLOCK_R // LANES, LANES))
    tl.store(g_ptr + out * R + rows_g, tl.sum(g, 1), mask=rows_g < R)
    if v_ptr is not None and pid_g == 0:
        tl.store(q_ptr + out, tl.sum(tl.sum(tl.sum(q, 0), 0), 0))


def _tile(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, block: Block, block_r: int) -> Lanes:
    """Four values of 4 bytes to a lane where it can be."""
    by_column = P.stride(1) == 1
    NEAR, GROUPS = (4, min(8, block.columns // 4)) if by_column else (1, 4)
    LANES = 32 // GROUPS if by_column else 8 if block_r <= 32 else 32
    narrow = launch.narrow_offsets(P, block.columns)
    return Lanes(block_r, block.columns, launch.alignment(P, x, loc, d), narrow, NEAR, GROUPS, LANES)


def partial_sums(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    v: Tensor | None,
    r: Tensor | None = None,
    inverted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Partial sums over the splits: PᵀD⁻¹r [S, B, SPLITS, R] and rᵀD⁻¹r [S, B, SPLITS]; r = δ where v is None, else it
    fills `r` [S, B, N]."""
    S, (B, N, R) = x.shape[0], P.shape
    block_r = min(launch.padded_rank(R), launch.FUSED_R)
    block = launch.block("residual", BLOCKS, block_r, P.stride(1) == 1, P.device)
    columns = launch.split_columns(N, R, block.columns)
    splits = max(1, launch.ceil_div(N, columns))
    g = P.new_empty(S, B, splits, R, dtype=torch.float64)
    q = P.new_empty(S, B, splits, dtype=torch.float64)
    launch.launch(
        residual_kernel,
        (S * B * splits, launch.ceil_div(R, block_r)),
        block.num_warps,
        block.num_stages,
        x_at=launch.samples_at(x),
        loc_at=launch.samples_at(loc),
        P_at=launch.at(P.mT),
        d_at=launch.at(d),
        v_ptr=v,
        g_ptr=g,
        q_ptr=q,
        r_ptr=r,
        sizes=(S, B, N),
        cut=(splits, columns),
        R=R,
        ONE_D=d.shape[1] == 1,
        INVERTED=inverted,
        TILE=_tile(x, loc, P, d, block, block_r),
    )
    return g, q


__all__ = ["partial_sums"]
