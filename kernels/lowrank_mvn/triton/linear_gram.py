# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
r"""Pass 1 of a linear factor: G = F̃D⁻¹F̃ᵀ, F̃D⁻¹(x − loc) and log|D|, from one read of F.

With one value of d there is one G for all channels: the kernel adds up F̃F̃ᵀ and F̃(x − loc)ᵀ, and d divides after the
last sum. With a value per pixel each channel has its own, and a program per channel reads the same tile of F, those
after the first from the cache:

    operations for a pixel           G, one d      G_c, d per pixel      from tiles of P_c = W_cF̃
    (symmetric, counted in full)     2K²           2CK²                  2CRK + 2CR²

At K = 64, R = 25 (padded 32), C = 3 the last two are 24.6 and 18.4 thousand, and both are held by the instructions that
scale and split operands, not by the products: G it is, which the gradients of W need in any case.

Products are split as in `capacitance`: q = high + low, QQᵀ ≈ high highᵀ + low highᵀ + (low highᵀ)ᵀ. Half precision with
one d is exact as a tensor core's operand, so that one product does. The row of ones and the rows δ are too thin for a
matrix product: they are sums, added up in the threads that hold F. Only the lower triangle of G̃ is stored, its last row
the sums over F and the number of pixels (Σ 1/d). Nothing is atomic. With WIDE every product is in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, linear_common
from .capacitance import WIDE_BLOCK, WIDE_ROWS, _log_of_product, _square
from .common import Block, aligned, converted, load_tile, scaled, split
from .linear_common import MAX_RIDERS, both, channels_last, columns_per_program, fold, nothing, one_value, width

# By padded number of features: one warp multiplies every column of its tile with itself; from 64 rows on four warps are
# one tensor-core group, for which neighbouring features would be turned in shared memory.
BLOCKS = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(4, 32), 128: Block(8, 32)}),
    (64, False): Block(2, 16),
    (64, False, "sm_75"): Block(4, 32),
    (64, False, "sm_80"): Block(4, 32),
    (64, False, "sm_100"): Block(4, 32),
    (64, False, "gfx"): Block(4, 32),
}


@triton.jit
def linear_gram_kernel(
    x_ptr,  # [S, B, C, M]
    loc_ptr,  # [S or 1, B, C, M], read if WITH_LOC
    F_ptr,  # [B, K, M]
    d_ptr,  # [B, C, M], not read if SCALAR_D; the diagonal of D⁻¹ if INVERTED
    G_ptr,  # [B, SPLITS, GROUPS, K+1, K+1], the lower triangle; times d if SCALAR_D
    wF_ptr,  # [B, SPLITS, GROUPS, RIDERS, K+1]; times d if SCALAR_D
    logdet_ptr,  # [B, SPLITS, GROUPS], log|D|, unless SCALAR_D
    wide_ptr,  # [B]
    M,
    SPLITS,
    COLUMNS,
    GROUPS,
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
    CHANNELS: tl.constexpr,  # of one group
    RIDERS: tl.constexpr,
    WITH_LOC: tl.constexpr,
    SCALAR_D: tl.constexpr,
    INVERTED: tl.constexpr,
    WIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    EXACT: tl.constexpr,
    OUTER: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_i = tl.program_id(1) // TILES
    pid_j = tl.program_id(1) % TILES
    if pid_j > pid_i:
        return
    b = (pid // GROUPS // SPLITS).to(tl.int64)
    pid_s = pid // GROUPS % SPLITS
    group = (pid % GROUPS).to(tl.int64)
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(wide_ptr + b) == 0:
            return
    M, stride_fb, stride_fk = aligned((M, stride_fb, stride_fk), ALIGN)
    stride_xs, stride_xb, stride_xc = aligned((stride_xs, stride_xb, stride_xc), ALIGN)
    stride_ls, stride_lb, stride_lc = aligned((stride_ls, stride_lb, stride_lc), ALIGN)
    if not SCALAR_D:
        stride_db, stride_dc = aligned((stride_db, stride_dc), ALIGN)
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    F_ptr += b * stride_fb
    x_ptr += b * stride_xb + group * stride_xc
    loc_ptr += b * stride_lb + group * stride_lc
    d_ptr += b * stride_db + group * stride_dc
    offs_i = pid_i * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_j = pid_j * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.zeros((BLOCK_K, BLOCK_K), kind)
    second = tl.zeros((BLOCK_K, BLOCK_K), kind)
    ones = tl.zeros((BLOCK_K, BLOCK_N // WIDTH), kind)
    corner = tl.zeros((1, BLOCK_N // WIDTH), kind)
    w = nothing(RIDERS, BLOCK_K, BLOCK_N // WIDTH, kind)
    w_ones = nothing(RIDERS, 1, BLOCK_N // WIDTH, kind)
    exponents = tl.zeros((BLOCK_N,), tl.int32)
    mantissas = tl.full((BLOCK_N,), 1.0, tl.float64)
    logs = tl.zeros((BLOCK_N,), tl.float64)
    valid = tl.full((BLOCK_N,), 1, tl.int32)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, M), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < M
        columns = offs_n.to(tl.int64)
        F = load_tile(F_ptr, offs_i, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N)
        if SCALAR_D:
            Q = converted(F, n, M, kind)
            corner += fold(mask_n.to(kind)[None, :], WIDTH, LAST)
            ones += fold(Q, WIDTH, LAST)
        else:
            d = tl.load(d_ptr + columns * stride_dn, mask=mask_n, other=1.0).to(kind)
            if not INVERTED and WIDE:
                logs += tl.log(d)
            if not INVERTED and not WIDE:
                bits = d.to(tl.int32, bitcast=True)
                exponents += (bits >> 23) - 127
                mantissas *= ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True).to(tl.float64)
                valid = tl.minimum(valid, ((bits >= 0x800000) & (bits < 0x7F800000)).to(tl.int32))
            if WIDE:  # noqa: SIM108
                scale = tl.sqrt(d) if INVERTED else 1.0 / tl.sqrt(d)
            else:
                scale = tl.sqrt(d) if INVERTED else tl.rsqrt(d)
            Q = scaled(F, scale[None, :], n, M, kind, OUTER)
            corner += fold(tl.where(mask_n, scale * scale, 0.0)[None, :], WIDTH, LAST)
            ones += fold(Q * scale[None, :], WIDTH, LAST)
        added = ()
        added_ones = ()
        for j in tl.static_range(RIDERS):
            at = tl.full((), j // CHANNELS, tl.int64)
            c = tl.full((), j % CHANNELS, tl.int64)
            x_row = x_ptr + at * stride_xs + c * stride_xc
            delta = tl.load(x_row + columns * stride_xn, mask=mask_n, other=0.0).to(kind)
            if WITH_LOC:
                loc_row = loc_ptr + at * stride_ls + c * stride_lc
                delta -= tl.load(loc_row + columns * stride_ln, mask=mask_n, other=0.0).to(kind)
            if not SCALAR_D:
                delta *= scale
            added = added + (w[j] + fold(Q * delta[None, :], WIDTH, LAST),)
            if not SCALAR_D:
                delta *= scale
            added_ones = added_ones + (w_ones[j] + fold(delta[None, :], WIDTH, LAST),)
        w = added
        w_ones = added_ones
        if TILES > 1:
            F_j = load_tile(F_ptr, offs_j, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N)
            Q_j = converted(F_j, n, M, kind) if SCALAR_D else scaled(F_j, scale[None, :], n, M, kind, OUTER)
        else:
            Q_j = Q
        if WIDE:
            first += _square(Q, Q_j, OUTER)
        elif SPLIT_TF32 and EXACT:
            first = tl.dot(Q, tl.trans(Q_j), first, input_precision="tf32")
        elif SPLIT_TF32:
            high, low = split(Q)
            if TILES > 1:
                high_j, low_j = split(Q_j)
                second = tl.dot(high, tl.trans(low_j), second, input_precision="tf32")
            else:
                high_j = high
            first = tl.dot(high, tl.trans(high_j), first, input_precision="tf32")
            second = tl.dot(low, tl.trans(high_j), second, input_precision="tf32")
        else:
            first = tl.dot(Q, tl.trans(Q_j), first, input_precision="ieee")
    G = first
    if SPLIT_TF32 and not EXACT:
        G += second
        if TILES == 1:
            G += tl.trans(second)
    out = pid.to(tl.int64)
    KT: tl.constexpr = K + 1
    G_ptr += out * KT * KT
    mask = (offs_i < K)[:, None] & (offs_j < K)[None, :] & (offs_j[None, :] <= offs_i[:, None])
    tl.store(G_ptr + offs_i[:, None] * KT + offs_j[None, :], G, mask=mask)
    if pid_j == 0:
        wF_ptr += out * RIDERS * KT
        tl.store(G_ptr + K * KT + offs_i, tl.sum(ones, 1), mask=offs_i < K)
        for j in tl.static_range(RIDERS):
            tl.store(wF_ptr + j * KT + offs_i, tl.sum(w[j], 1), mask=offs_i < K)
        if pid_i == 0:
            one = tl.arange(0, 1)
            tl.store(G_ptr + K * KT + K + one, tl.sum(corner, 1))
            for j in tl.static_range(RIDERS):
                tl.store(wF_ptr + j * KT + K + one, tl.sum(w_ones[j], 1))
            if not SCALAR_D and not INVERTED:
                if WIDE:
                    tl.store(logdet_ptr + out, tl.sum(logs, 0))
                else:
                    tl.store(logdet_ptr + out, _log_of_product(exponents, mantissas, valid))


def rides(S: int, C: int, d: Tensor) -> int:
    """Columns of x that ride on this pass with each group, 0 if they are too many for it."""
    columns = S * C if one_value(d) else S
    return columns if columns <= MAX_RIDERS else 0


def sums(
    x: Tensor, loc: Tensor | None, F: Tensor, d: Tensor, inverted: bool, kind: str, flags: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """G [B, C or 1, K+1, K+1], F̃D⁻¹(x − loc) [B, S, C, K+1] and log|D| [B], float64.

    S = 0 where the columns do not ride along; log|D| is none where d is one value per item. With `flags` only the items
    whose flag is set are made, and the others are not written.
    """
    (S, B, C, M), K = x.shape, F.shape[1]
    scalar_d, wide, P = one_value(d), kind == "float64", F.mT
    groups, count = 1 if scalar_d else C, rides(S, C, d)
    block_k = common.padded_rank(K)
    if wide:
        block_k = min(block_k, WIDE_ROWS)
    elif K > common.FUSED_R:
        block_k = common.TILED_R
    block = WIDE_BLOCK if wide else linear_common.block("linear_gram", BLOCKS, block_k, F)
    tiles = common.ceil_div(K, block_k)
    read = [x if count else None, loc if count else None, None if scalar_d else d]
    align, last = common.alignment(P, *(t for t in read if t is not None)), channels_last(F)
    lanes = min(block.columns, 32 * block.num_warps // max(1, block_k // 4))
    columns = columns_per_program(M, B * groups, 16 * K, block.columns)
    splits = max(1, common.ceil_div(M, columns))
    work = torch.float64 if wide else torch.float32
    G = F.new_empty(B, splits, groups, K + 1, K + 1, dtype=work)
    wF = F.new_empty(B, splits, groups, count, K + 1, dtype=work)
    logdet = F.new_empty(B, splits, groups, dtype=torch.float64)
    shift = x if loc is None else loc
    common.launch(
        linear_gram_kernel,
        (B * splits * groups, tiles * tiles),
        block.num_warps,
        block.num_stages,
        x_ptr=x,
        loc_ptr=shift,
        F_ptr=F,
        d_ptr=d,
        G_ptr=G,
        wF_ptr=wF,
        logdet_ptr=logdet,
        wide_ptr=flags if flags is not None else G,
        M=M,
        SPLITS=splits,
        COLUMNS=columns,
        GROUPS=groups,
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
        CHANNELS=C if scalar_d else 1,
        RIDERS=count,
        WITH_LOC=loc is not None,
        SCALAR_D=scalar_d,
        INVERTED=inverted,
        WIDE=wide,
        FLAGGED=flags is not None,
        SPLIT_TF32=kind == "tf32",
        EXACT=scalar_d and F.dtype.itemsize == 2,
        OUTER=wide and not common.matrix_float64(F.device),
        TILES=tiles,
        ALIGN=align,
        NARROW=common.narrow_offsets(P, block.columns),
        LAST=last,
        WIDTH=width(align, last, block.columns, lanes),
        BLOCK_K=block_k,
        BLOCK_N=block.columns,
    )
    lower = G.sum(1, dtype=torch.float64)
    G = lower.tril() + lower.tril(-1).mT
    wF = wF.sum(1, dtype=torch.float64)
    if scalar_d:
        precision = d[:, :, :, None].double() if inverted else d[:, :, :, None].double().reciprocal()
        return G * precision, (wF * precision)[:, 0].unflatten(1, (count // C, C)), None
    return G, wF.transpose(1, 2), logdet.sum((1, 2))


__all__ = ["rides", "sums"]
