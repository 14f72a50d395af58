# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
r"""Pass 2 of a linear factor: r = δ − F̃ᵀu, rᵀD⁻¹r and F̃D⁻¹r, in float64; with u = 0 the projection F̃D⁻¹δ.

As `residual` does for P, and for the same reason: r is what is left of numbers hundreds of times its size. For each
value of F that is one conversion and 2·S·C fused multiply-adds. One program does one split of the pixels of one item,
and up to MAX_RIDERS of the S·C columns from one read of F; further columns are the work of programs beside it in the
grid, which find F in the cache. r is stored, rounded once, for the backward pass: S·C values beside the K of a pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, linear_common
from .common import Block, aligned, load_tile, narrow, reciprocal
from .linear_common import both, channels_last, columns_per_program, fold, nothing, one_value, riders, width

# By padded number of features: one warp and at most 32 values of F in the registers of a lane, in float64.
BLOCKS = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(1, 16), 128: Block(2, 16)}),
    (16, False): Block(1, 32),
    (128, False): Block(4, 8),
    (64, False, "sm_100"): Block(2, 16),
}
# Each of several samples has a sum of squares of its own, which needs more registers than the tile.
SAMPLES_BLOCKS = {**BLOCKS, (16, True): Block(1, 32), (64, False): Block(1, 8)}
# Where a lane does not hold neighbours in memory together, the sums over its columns are not folded within it; in
# float64 F itself is twice as large. 8 values of F in a lane, or 4.
SPARING_BLOCKS = {
    **both({16: Block(2, 32), 64: Block(4, 16), 128: Block(4, 8)}),
    (32, True): Block(2, 32),
    (32, False): Block(4, 16),
}

# Where tiles of features are walked over, by whether neighbouring columns of F are neighbours in memory.
TILED_BLOCKS = {True: Block(4, 16), False: Block(4, 32)}

# Rows of one piece of a tile where features are neighbours in memory. Triton lays a warp out along them first: a tile
# of 64 rows would have 16 lanes for each sum over features, a piece of 32 has 8, and pieces are added before lanes are.
PIECE = 32


@triton.jit
def linear_residual_kernel(
    x_ptr,  # [S, B, C, M]
    loc_ptr,  # [S or 1, B, C, M], read if WITH_LOC
    F_ptr,  # [B, K, M]
    d_ptr,  # [B, C, M], not read if SCALAR_D; the diagonal of D⁻¹ if INVERTED
    u_ptr,  # [B, S·C, K+1], read if WITH_U
    r_ptr,  # [S, B, C, M], written if WITH_R
    g_ptr,  # [B, SPLITS, S·C, K+1], F̃D⁻¹r; F̃r if SCALAR_D
    q_ptr,  # [B, SPLITS, S·C], or ROUNDS if ONE_SAMPLE, rᵀD⁻¹r; rᵀr if SCALAR_D
    B,
    C,
    M,
    SPLITS,
    COLUMNS,
    ROUNDS,
    COUNT,  # S·C
    stride_xs,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_ls,
    stride_lb,
    stride_lc,
    stride_ln,
    stride_fb,
    stride_fk,
    stride_fn,
    stride_db,
    stride_dc,
    stride_dn,
    K: tl.constexpr,
    RIDERS: tl.constexpr,
    RAGGED: tl.constexpr,  # whether the last round has fewer columns
    ONE_SAMPLE: tl.constexpr,
    WITH_LOC: tl.constexpr,
    WITH_U: tl.constexpr,
    WITH_R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    INVERTED: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of a piece
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_g = tl.program_id(1)  # the tile of K whose projection is made
    first = pid % ROUNDS * RIDERS
    b = (pid // ROUNDS // SPLITS).to(tl.int64)
    pid_s = pid // ROUNDS % SPLITS
    M, stride_fb, stride_fk = aligned((M, stride_fb, stride_fk), ALIGN)
    stride_xs, stride_xb, stride_xc = aligned((stride_xs, stride_xb, stride_xc), ALIGN)
    stride_ls, stride_lb, stride_lc = aligned((stride_ls, stride_lb, stride_lc), ALIGN)
    if not SCALAR_D:
        stride_db, stride_dc = aligned((stride_db, stride_dc), ALIGN)
    KT: tl.constexpr = K + 1
    F_ptr += b * stride_fb
    d_ptr += b * stride_db
    offs_k = tl.arange(0, BLOCK_K)
    offs_g = pid_g * PIECES * BLOCK_K + offs_k
    u_ptr += (b * COUNT + first) * KT
    u = ()
    if WITH_U and TILES == 1:
        for at in tl.static_range(RIDERS * PIECES):
            offs = at % PIECES * BLOCK_K + offs_k
            inside = (offs < K) & (first + at // PIECES < COUNT) if RAGGED else offs < K
            u = u + (tl.load(u_ptr + at // PIECES * KT + offs, mask=inside, other=0.0),)
    g = nothing(RIDERS * PIECES, BLOCK_K, BLOCK_N // WIDTH, tl.float64)
    g_ones = nothing(RIDERS, 1, BLOCK_N // WIDTH, tl.float64)
    q = nothing(1 if ONE_SAMPLE else RIDERS, 1, BLOCK_N // WIDTH, tl.float64)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, M), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        columns = offs_n.to(tl.int64)
        F = ()
        for p in tl.static_range(PIECES):
            piece = load_tile(F_ptr, offs_g + p * BLOCK_K, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N)
            F = F + (piece.to(tl.float64),)
        added = ()
        added_ones = ()
        added_q = ()
        for j in tl.static_range(RIDERS):
            column = first + j
            s = (column * 0 if ONE_SAMPLE else column // C).to(tl.int64)
            c = (column if ONE_SAMPLE else column % C).to(tl.int64)
            mask = (offs_n < M) & (column < COUNT) if RAGGED else offs_n < M
            x_row = x_ptr + s * stride_xs + b * stride_xb + c * stride_xc
            r = tl.load(x_row + columns * stride_xn, mask=mask, other=0.0).to(tl.float64)
            if WITH_LOC:
                loc_row = loc_ptr + s * stride_ls + b * stride_lb + c * stride_lc
                r -= tl.load(loc_row + columns * stride_ln, mask=mask, other=0.0).to(tl.float64)
            if WITH_U:
                r -= tl.load(u_ptr + j * KT + K, mask=column < COUNT, other=0.0)
                if TILES == 1:
                    Fu = F[0] * u[j * PIECES][:, None]
                    for p in tl.static_range(1, PIECES):
                        Fu += F[p] * u[j * PIECES + p][:, None]
                else:
                    Fu = tl.zeros((BLOCK_K, BLOCK_N), tl.float64)
                    for tile in range(TILES * PIECES):
                        offs_t = tile * BLOCK_K + offs_k
                        inside = (offs_t < K) & (column < COUNT)
                        u_t = tl.load(u_ptr + j * KT + offs_t, mask=inside, other=0.0)
                        F_t = load_tile(F_ptr, offs_t, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N)
                        Fu += F_t.to(tl.float64) * u_t[:, None]
                r -= tl.sum(Fu, 0)
            r = tl.where(mask, r, 0.0)
            if WITH_R:
                r_row = r_ptr + ((s * B + b) * C + c) * M
                tl.store(r_row + columns, narrow(r, r_ptr), mask=mask if TILES == 1 else mask & (pid_g == 0))
            if SCALAR_D:
                z = r
            else:
                d = tl.load(d_ptr + c * stride_dc + columns * stride_dn, mask=mask, other=1.0)
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
    out = (b * SPLITS + pid_s) * COUNT + first
    one = tl.arange(0, 1)
    for j in tl.static_range(RIDERS):
        valid = first + j < COUNT
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


def sums(
    x: Tensor, loc: Tensor | None, F: Tensor, d: Tensor, u: Tensor | None, r: Tensor | None, inverted: bool = False
) -> tuple[Tensor, Tensor]:
    """F̃D⁻¹r [B, S, C, K+1] and rᵀD⁻¹r [B, S], float64, with r = x − loc − F̃ᵀu, which `r` [S, B, C, M] is filled with.

    u is [B, S, C, K+1] in float64.
    """
    (S, B, C, M), K, P = x.shape, F.shape[1], F.mT
    block_k = min(common.padded_rank(K), common.FUSED_R)
    tiles, last = common.ceil_div(K, block_k), channels_last(F)
    align = common.alignment(P, x, *([] if loc is None else [loc]), d)
    name, table = ("linear_residual", BLOCKS) if S == 1 else ("linear_residual_samples", SAMPLES_BLOCKS)
    together = (F.element_size() == 4 and F.stride(2) % 4 == 0) if last else align >= 4
    if F.dtype == torch.float64 or not together:
        name, table = "linear_residual_sparing", SPARING_BLOCKS
    block = (
        linear_common.block(name, table, block_k, F)
        if tiles == 1
        else common.tiled_block(TILED_BLOCKS, not last, F.device)
    )
    piece = min(block_k, PIECE) if last else block_k
    count, rounds = riders(S * C)
    lanes = min(block.columns, 32 * block.num_warps // (piece // 4))
    columns = columns_per_program(M, B, 128 * S * C, block.columns)
    splits = max(1, common.ceil_div(M, columns))
    g = F.new_empty(B, splits, S * C, K + 1, dtype=torch.float64)
    q = F.new_empty(B, splits, rounds if S == 1 else S * C, dtype=torch.float64)
    shift = x if loc is None else loc
    common.launch(
        linear_residual_kernel,
        (B * splits * rounds * min(S, 1), tiles),
        block.num_warps,
        block.num_stages,
        x_ptr=x,
        loc_ptr=shift,
        F_ptr=F,
        d_ptr=d,
        u_ptr=u.contiguous() if u is not None else q,
        r_ptr=r if r is not None else q,
        g_ptr=g,
        q_ptr=q,
        B=B,
        C=C,
        M=M,
        SPLITS=splits,
        COLUMNS=columns,
        ROUNDS=rounds,
        COUNT=S * C,
        stride_xs=x.stride(0),
        stride_xb=x.stride(1),
        stride_xc=x.stride(2),
        stride_xn=x.stride(3),
        stride_ls=shift.stride(0) if shift.shape[0] > 1 else 0,
        stride_lb=shift.stride(1),
        stride_lc=shift.stride(2),
        stride_ln=shift.stride(3),
        stride_fb=F.stride(0),
        stride_fk=F.stride(1),
        stride_fn=F.stride(2),
        stride_db=d.stride(0),
        stride_dc=d.stride(1),
        stride_dn=d.stride(2),
        K=K,
        RIDERS=count,
        RAGGED=count * rounds != S * C,
        ONE_SAMPLE=S == 1,
        WITH_LOC=loc is not None,
        WITH_U=u is not None,
        WITH_R=r is not None,
        SCALAR_D=one_value(d),
        INVERTED=inverted,
        TILES=tiles,
        ALIGN=align,
        NARROW=common.narrow_offsets(P, block.columns),
        LAST=last,
        WIDTH=width(align, last, block.columns, lanes),
        PIECES=block_k // piece,
        BLOCK_K=piece,
        BLOCK_N=block.columns,
    )
    g, q = g.sum(1).unflatten(1, (S, C)), q.sum(1).unflatten(1, (S, rounds if S == 1 else C)).sum(2)
    if one_value(d):
        precision = d[:, :, 0].double() if inverted else d[:, :, 0].double().reciprocal()
        g, q = g * precision[:, :, None, None], q * precision
    return g, q


__all__ = ["sums"]
