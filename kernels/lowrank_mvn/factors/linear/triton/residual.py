# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
r"""Pass 2 of a linear factor: r = δ − F̃ᵀu, rᵀD⁻¹r and F̃D⁻¹r, in float64; with u = 0 the projection F̃D⁻¹δ.

As `residual` does for P, and for the same reason: r is what is left of numbers hundreds of times its size. For each
value of F that is one conversion and two fused multiply-adds for each column, of which there are S · channels. One
program does one split of the pixels of one item, and up to MAX_RIDERS of the columns from one read of F; further ones
are the work of programs beside it in the grid, which find F in the cache. r is stored, rounded once, for the backward
pass: S · channels values beside the K of a pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block, Table, TiledTable
from ....device.math import narrow, reciprocal
from ....device.tiles import fold, load_row, load_tile, multiple, of_item
from ..forms import one_d
from .columns import block as block_of
from .columns import both, channels_last, columns_per_program, nothing, riders
from .columns import tile as tile_of

# By padded number of features: one warp and at most 32 values of F in the registers of a lane, in float64.
BLOCKS: Table = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(1, 16), 128: Block(2, 16)}),
    (16, False): Block(1, 32),
    (128, False): Block(4, 8),
    (64, False, "sm_100"): Block(2, 16),
}
# Each of several samples has a sum of squares of its own, which needs more registers than the tile.
SAMPLES_BLOCKS: Table = {**BLOCKS, (16, True): Block(1, 32), (64, False): Block(1, 8)}
# A lane that does not hold neighbours in memory cannot fold the sums over its columns; in float64 F itself is twice as
# large. 8 values of F in a lane, or 4.
SPARING_BLOCKS: Table = {
    **both({16: Block(2, 32), 64: Block(4, 16), 128: Block(4, 8)}),
    (32, True): Block(2, 32),
    (32, False): Block(4, 16),
}

# For a walk over tiles of features, by whether neighbouring columns of F are neighbours in memory.
TILED_BLOCKS: TiledTable = {True: Block(4, 16), False: Block(4, 32)}

# Rows of one piece of a tile where features are neighbours in memory. Triton lays a warp out along them first: a tile
# of 64 rows would have 16 lanes for each sum over features, a piece of 32 has 8, and pieces are added before lanes are.
PIECE = 32


@triton.jit
def linear_residual_kernel(
    x_at,  # [B, channels, S, pixels]
    loc_at,  # [B, channels, S, pixels], or none
    F_at,  # [B, K, pixels]
    d_at,  # [B, channels, pixels], not read if ONE_D; the diagonal of D⁻¹ if INVERTED
    u_ptr,  # [B, S · channels, K+1], or none: r = x − loc
    r_ptr,  # [S, B, channels, pixels], or none where it is not wanted
    g_ptr,  # [B, SPLITS, S · channels, K+1]; times d if ONE_D
    q_ptr,  # [B, SPLITS, S · channels], or ROUNDS if ONE_SAMPLE; times d if ONE_D
    sizes,  # S, B, channels, pixels
    cut,  # programs for an item and a round, pixels for each, and ROUNDS
    K: tl.constexpr,
    RIDERS: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last round has fewer columns
    ONE_SAMPLE: tl.constexpr,
    ONE_D: tl.constexpr,
    INVERTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """rₙ = xₙ − locₙ − f̃ₙᵀu, Σ f̃ₙrₙ/dₙ and Σ rₙ²/dₙ of some columns, over one split of the pixels n of an item."""
    # One loop, and longer than a function should be: a tile of F in registers serves every column that rides on it.
    PIECES: tl.constexpr = TILE.PIECES
    BLOCK_K: tl.constexpr = TILE.ROWS  # of a piece
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    WIDTH: tl.constexpr = TILE.WIDTH
    LAST: tl.constexpr = TILE.LAST
    TILES: tl.constexpr = (K + PIECES * BLOCK_K - 1) // (PIECES * BLOCK_K)
    KT: tl.constexpr = K + 1
    S, B, channels, pixels = sizes
    SPLITS, length, ROUNDS = cut
    count = S * channels
    pid = tl.program_id(0)
    pid_g = tl.program_id(1)  # the tile of K whose projection is made
    first = pid % ROUNDS * RIDERS
    b = (pid // ROUNDS // SPLITS).to(tl.int64)
    pid_s = pid // ROUNDS % SPLITS
    pixels = multiple(pixels, TILE.ALIGN)
    x_item = of_item(x_at, b, TILE.ALIGN)
    if loc_at is not None:
        loc_item = of_item(loc_at, b, TILE.ALIGN)
    F_item = of_item(F_at, b, TILE.ALIGN)
    if not ONE_D:
        d_item = of_item(d_at, b, TILE.ALIGN)
    offs_k = tl.arange(0, BLOCK_K)
    offs_g = pid_g * PIECES * BLOCK_K + offs_k
    u = ()
    if u_ptr is not None:
        u_ptr += (b * count + first) * KT
        if TILES == 1:
            for at in tl.static_range(RIDERS * PIECES):
                offs = at % PIECES * BLOCK_K + offs_k
                inside = (offs < K) & (first + at // PIECES < count) if RAGGED else offs < K
                u = u + (tl.load(u_ptr + at // PIECES * KT + offs, mask=inside, other=0.0),)
    g = nothing(RIDERS * PIECES, BLOCK_K, BLOCK_N // WIDTH, tl.float64)
    g_ones = nothing(RIDERS, 1, BLOCK_N // WIDTH, tl.float64)
    q = nothing(1 if ONE_SAMPLE else RIDERS, 1, BLOCK_N // WIDTH, tl.float64)
    start = pid_s * length
    for n in range(start, min(start + length, pixels), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        columns = offs_n.to(tl.int64)
        F = ()
        for p in tl.static_range(PIECES):
            F = F + (load_tile(F_item, offs_g + p * BLOCK_K, n, pixels, K, TILE).to(tl.float64),)
        added = ()
        added_ones = ()
        added_q = ()
        for j in tl.static_range(RIDERS):
            column = first + j
            s = (column * 0 if ONE_SAMPLE else column // channels).to(tl.int64)
            c = (column if ONE_SAMPLE else column % channels).to(tl.int64)
            mask = (offs_n < pixels) & (column < count) if RAGGED else offs_n < pixels
            r = load_row(of_item(of_item(x_item, c, 1), s, 1), columns, mask).to(tl.float64)
            if loc_at is not None:
                r -= load_row(of_item(of_item(loc_item, c, 1), s, 1), columns, mask).to(tl.float64)
            if u_ptr is not None:
                if RAGGED:
                    r -= tl.load(u_ptr + j * KT + K, mask=column < count, other=0.0)
                else:  # without the mask, which would take the registers that are just enough
                    r -= tl.load(u_ptr + j * KT + K)
                if TILES == 1:
                    Fu = F[0] * u[j * PIECES][:, None]
                    for p in tl.static_range(1, PIECES):
                        Fu += F[p] * u[j * PIECES + p][:, None]
                else:
                    Fu = tl.zeros((BLOCK_K, BLOCK_N), tl.float64)
                    for tile in range(TILES * PIECES):
                        offs_t = tile * BLOCK_K + offs_k
                        inside = (offs_t < K) & (column < count)
                        u_t = tl.load(u_ptr + j * KT + offs_t, mask=inside, other=0.0)
                        Fu += load_tile(F_item, offs_t, n, pixels, K, TILE).to(tl.float64) * u_t[:, None]
                r -= tl.sum(Fu, 0)
            r = tl.where(mask, r, 0.0)
            if r_ptr is not None:
                r_row = r_ptr + ((s * B + b) * channels + c) * pixels
                tl.store(r_row + columns, narrow(r, r_ptr), mask=mask if TILES == 1 else mask & (pid_g == 0))
            if ONE_D:
                z = r
            else:
                d = load_row(of_item(d_item, c, 1), columns, mask, 1.0)
                z = r * (d.to(tl.float64) if INVERTED else reciprocal(d))
            for p in tl.static_range(PIECES):
                added = added + (g[j * PIECES + p] + fold(F[p] * z[None, :], WIDTH, LAST),)
            added_ones = added_ones + (g_ones[j] + fold(z[None, :], WIDTH, LAST),)
            if ONE_SAMPLE:
                q = (q[0] + fold((r * z)[None, :], WIDTH, LAST),)
            else:
                added_q = added_q + (q[j] + fold((r * z)[None, :], WIDTH, LAST),)
        g = added
        g_ones = added_ones
        if not ONE_SAMPLE:
            q = added_q
    out = (b * SPLITS + pid_s) * count + first
    one = tl.arange(0, 1)
    for j in tl.static_range(RIDERS):
        valid = first + j < count
        for p in tl.static_range(PIECES):
            offs = offs_g + p * BLOCK_K
            tl.store(g_ptr + (out + j) * KT + offs, tl.sum(g[j * PIECES + p], 1), mask=(offs < K) & valid)
        if pid_g == 0:
            tl.store(g_ptr + (out + j) * KT + K + one, tl.sum(g_ones[j], 1), mask=valid)
            if ONE_SAMPLE:
                if j == 0:
                    tl.store(q_ptr + pid + one, tl.sum(q[0], 1))
            else:
                tl.store(q_ptr + out + j + one, tl.sum(q[j], 1), mask=valid)


def _block(F: Tensor, S: int, aligned: bool, tiled: bool) -> Block:
    block_k, last = min(launch.padded_rank(F.shape[1]), launch.FUSED_R), channels_last(F)
    if tiled:
        return launch.tiled_block(TILED_BLOCKS, not last, F.device)
    together = (F.element_size() == 4 and F.stride(2) % 4 == 0) if last else aligned
    if F.dtype == torch.float64 or not together:
        return block_of("linear_residual_sparing", SPARING_BLOCKS, block_k, F)
    if S != 1:
        return block_of("linear_residual_samples", SAMPLES_BLOCKS, block_k, F)
    return block_of("linear_residual", BLOCKS, block_k, F)


def sums(
    x: Tensor, loc: Tensor | None, F: Tensor, d: Tensor, u: Tensor | None, r: Tensor | None, inverted: bool = False
) -> tuple[Tensor, Tensor]:
    """F̃D⁻¹r [B, S, channels, K+1] and rᵀD⁻¹r [B, S], float64, with r = x − loc − F̃ᵀu; `r` [S, B, channels, pixels] is
    filled with it, if given.

    u is [B, S, channels, K+1] in float64.
    """
    (S, B, channels, pixels), K, one = x.shape, F.shape[1], one_d(d)
    vectors = [t for t in (x, loc, d) if t is not None]
    block_k = min(launch.padded_rank(K), launch.FUSED_R)
    tiles = launch.ceil_div(K, block_k)
    block = _block(F, S, launch.alignment(F.mT, *vectors) >= 4, tiles > 1)
    piece = min(block_k, PIECE) if channels_last(F) else block_k
    count, rounds = riders(S * channels)
    columns = columns_per_program(pixels, B, 128 * S * channels, block.columns)
    splits = max(1, launch.ceil_div(pixels, columns))
    g = F.new_empty(B, splits, S * channels, K + 1, dtype=torch.float64)
    q = F.new_empty(B, splits, rounds if S == 1 else S * channels, dtype=torch.float64)
    launch.launch(
        linear_residual_kernel,
        (B * splits * rounds * min(S, 1), tiles),
        block.num_warps,
        block.num_stages,
        x_at=launch.samples_at(x, by_channel=True),
        loc_at=None if loc is None else launch.samples_at(loc, by_channel=True),
        F_at=launch.at(F),
        d_at=None if one else launch.at(d),
        u_ptr=None if u is None else u.contiguous(),
        r_ptr=r,
        g_ptr=g,
        q_ptr=q,
        sizes=(S, B, channels, pixels),
        cut=(splits, columns, rounds),
        K=K,
        RIDERS=count,
        RAGGED=count * rounds != S * channels,
        ONE_SAMPLE=S == 1,
        ONE_D=one,
        INVERTED=inverted,
        TILE=tile_of(F, vectors, block, piece, block_k // piece),
    )
    g, q = g.sum(1).unflatten(1, (S, channels)), q.sum(1).unflatten(1, (S, rounds if S == 1 else channels)).sum(2)
    if one:
        precision = d[:, :, 0].double() if inverted else d[:, :, 0].double().reciprocal()
        g, q = g * precision[:, :, None, None], q * precision
    return g, q


__all__ = ["sums"]
