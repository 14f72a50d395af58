r"""Pass 1: C − I = PᵀD⁻¹P, w = PᵀD⁻¹δ and log|D|, from one read of P.

One program adds up one split of the columns n of one item (and, for R > 128, one pair of tiles of R); nothing is
atomic, so that results repeat bit for bit. With Q = D^(−1/2) P, each value is q = high + low, 11 significant bits
and the rest, and in tensor cores

    QᵀQ ≈ highᵀhigh + lowᵀhigh + (lowᵀhigh)ᵀ

where what is dropped, lowᵀlow, is at most 2⁻²² of what is kept, and the transpose is added once, after the loop.
Only the lower triangle is stored. Where the padding of R leaves two rows free and P is [B, R, N] in memory, x and loc
stand in them (STACKED), copied like rows of P, and w is the difference of two rows of the same product. What rounding
costs there, 2⁻²² of |loc|/|δ|, pass 2 takes back: it makes the residual in float64 and corrects v by it, whatever v
was. With few rows, and P as [B, N, R], δ stands in a free row (AUGMENTED). Elsewhere w is summed beside the product.
log|D| is a sum of exponents, exact, and the logarithm of a product of mantissas in float64: the same rounding error at
each of N pixels would add up to N errors.

With WIDE every product is in float64: for float64 inputs, or to make an item again whose flag says so, on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Block, aligned, fold, load_tile, scaled, split, tile_offsets

# By padded rank, and whether neighbouring columns of P are neighbours in memory. A single warp multiplies every column
# of its tile with itself, so that neither operand goes through another warp. With two stages the tile is copied to
# shared memory by the memory system, and both operands are read and split from there: one write and two reads of it,
# without bank conflicts as long as nothing but the operands reads it (STACKED, or no w). From 64 rows on four warps are
# a tensor-core group of sm_90, which wants columns that are neighbours in shared memory; writing them there from
# [B, N, R] costs four times the clocks, and two warps are faster.
BLOCKS = {
    (16, True): Block(num_warps=1, columns=64, num_stages=2),
    (16, False): Block(num_warps=1, columns=64),
    (32, True): Block(num_warps=1, columns=32, num_stages=2),
    (32, False): Block(num_warps=1, columns=16),
    (32, False, "sm_75"): Block(num_warps=1, columns=32),
    (64, True): Block(num_warps=4, columns=32),
    (64, True, "sm_80"): Block(num_warps=2, columns=16),
    (64, False): Block(num_warps=2, columns=16),
    (64, False, "sm_80"): Block(num_warps=4, columns=32),
    (128, True): Block(num_warps=8, columns=32),
    (128, True, "sm_80"): Block(num_warps=8, columns=16),
    (128, False): Block(num_warps=8, columns=16),
}

# With float64 products; rarely run. At most 32 rows: from 64 on, Triton 3.7 takes a float64 product for sm_100 to that
# target's tensor memory, which has none, and fails to compile.
WIDE_BLOCK, WIDE_ROWS = Block(num_warps=4, columns=16), 32


@triton.jit
def _square(a, b, OUTER: tl.constexpr):
    """abᵀ of float64 tiles [R, n]."""
    if OUTER:  # a sum of products, for targets without float64 matrix products
        return tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        return tl.dot(a, tl.trans(b), out_dtype=tl.float64)


@triton.jit
def _fold_far(a, FAR: tl.constexpr):
    """Sums over FAR columns that lie as far apart as can be: [R, n] -> [R, n / FAR]."""
    if FAR == 1:
        return a
    else:
        return tl.sum(tl.reshape(a, (a.shape[0], FAR, a.shape[1] // FAR)), 1)


@triton.jit
def _log_of_product(exponents, mantissas, valid):
    """Σ log d from Σ exponents and Π mantissas, NaN unless every value was positive and normal."""
    log2 = tl.full((), 0.6931471805599453, tl.float64)  # a bare number would be a float32
    total = tl.sum(exponents.to(tl.float64) * log2 + tl.log(mantissas), 0)
    return tl.where(tl.min(valid, 0) > 0, total, float("nan"))


@triton.jit
def _load_stacked(
    x_ptr,
    loc_ptr,
    P_ptr,
    offs_r,
    n,
    N,
    stride_xn,
    stride_ln,
    stride_pr,
    stride_pn,
    R: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `load_tile`, with x in row R and loc in row R + 1."""
    offs_n = n + tl.arange(0, BLOCK_N)
    tile = P_ptr + tl.full((), 1, tl.int64) * n * stride_pn
    tile += tile_offsets(offs_r, stride_pr, stride_pn, NARROW, BLOCK_N)
    x = (x_ptr + offs_n.to(tl.int64) * stride_xn)[None, :]
    loc = (loc_ptr + offs_n.to(tl.int64) * stride_ln)[None, :]
    tile = tl.where((offs_r == R)[:, None], x, tl.where((offs_r == R + 1)[:, None], loc, tile))
    return tl.load(tile, mask=(offs_r < R + 2)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def capacitance_kernel(
    x_ptr,  # [B, N]
    loc_ptr,  # [B, N]
    P_ptr,  # [B, N, R]
    d_ptr,  # [B, N], or [B, 1] if SCALAR_D; the diagonal of D⁻¹ if INVERTED
    C_ptr,  # [B, SPLITS, R, R], the lower triangle of C − I
    w_ptr,  # [B, SPLITS, R]
    logdet_ptr,  # [B, SPLITS], log|D|
    wide_ptr,  # [B]
    N,
    SPLITS,
    COLUMNS,
    stride_xb,
    stride_xn,
    stride_lb,
    stride_ln,
    stride_pb,
    stride_pr,
    stride_pn,
    stride_db,
    stride_dn,
    R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    INVERTED: tl.constexpr,
    WITH_W: tl.constexpr,
    WIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    OUTER: tl.constexpr,
    TILES: tl.constexpr,
    STACKED: tl.constexpr,
    AUGMENTED: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_i = tl.program_id(1) // TILES
    pid_j = tl.program_id(1) % TILES
    if pid_j > pid_i:
        return
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(wide_ptr + b) == 0:
            return
    stride_pb, stride_pr = aligned((stride_pb, stride_pr), ALIGN)
    N, stride_xb = aligned((N, stride_xb), VECTORS)
    (stride_lb,) = aligned((stride_lb,), VECTORS)
    if not SCALAR_D:
        (stride_db,) = aligned((stride_db,), VECTORS)
    # Sums of w within a thread: over neighbouring columns where it holds some, over distant ones where it does not.
    NEAR: tl.constexpr = 4 if ALIGN >= 4 and not WIDE else 1
    FAR: tl.constexpr = 4 if ALIGN == 1 and not WIDE and BLOCK_N >= 16 else 1
    x_ptr += b * stride_xb
    loc_ptr += b * stride_lb
    P_ptr += b * stride_pb
    d_ptr += b * stride_db
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    offs_i = pid_i * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = pid_j * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.zeros((BLOCK_R, BLOCK_R), kind)
    second = tl.zeros((BLOCK_R, BLOCK_R), kind)
    w = tl.zeros((BLOCK_R, BLOCK_N // (NEAR * FAR)), kind)
    exponents = tl.zeros((BLOCK_N,), tl.int32)
    mantissas = tl.full((BLOCK_N,), 1.0, tl.float64)
    logs = tl.zeros((BLOCK_N,), tl.float64)
    valid = tl.full((BLOCK_N,), 1, tl.int32)
    if SCALAR_D:
        # One value in every column, loaded as such: Triton moves the conversion to the layout of an operand above
        # elementwise operations only as far as a load.
        d = tl.load(d_ptr + tl.zeros((BLOCK_N,), tl.int32)).to(kind)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        if STACKED:
            P = _load_stacked(
                x_ptr, loc_ptr, P_ptr, offs_i, n, N, stride_xn, stride_ln, stride_pr, stride_pn, R, NARROW, BLOCK_N
            ).to(kind)
        else:
            P = load_tile(P_ptr, offs_i, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N).to(kind)
        if not SCALAR_D:
            d = tl.load(d_ptr + offs_n.to(tl.int64) * stride_dn, mask=mask_n, other=1.0).to(kind)
            if not INVERTED and WIDE:
                logs += tl.log(d)
            if not INVERTED and not WIDE:
                bits = d.to(tl.int32, bitcast=True)
                exponents += (bits >> 23) - 127
                mantissas *= ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True).to(tl.float64)
                valid = tl.minimum(valid, ((bits >= 0x800000) & (bits < 0x7F800000)).to(tl.int32))
        if WIDE:  # noqa: SIM108
            scale = tl.sqrt(d) if INVERTED else 1.0 / tl.sqrt(d)
        else:  # fast instructions: an error of 2⁻²² of C, the same for C and w
            scale = tl.sqrt(d) if INVERTED else tl.rsqrt(d)
        if WITH_W and not STACKED:
            x = tl.load(x_ptr + offs_n.to(tl.int64) * stride_xn, mask=mask_n, other=0.0)
            loc = tl.load(loc_ptr + offs_n.to(tl.int64) * stride_ln, mask=mask_n, other=0.0)
            delta = x.to(kind) - loc.to(kind)
        if AUGMENTED:
            P = tl.where((offs_i == R)[:, None], delta[None, :], P)
        Q = scaled(P, scale[None, :], n, N, kind, OUTER)
        if WITH_W and not AUGMENTED and not STACKED:
            w += fold(_fold_far(Q * (delta * scale)[None, :], FAR), NEAR)
        if TILES > 1:
            P_j = load_tile(P_ptr, offs_j, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N)
            Q_j = scaled(P_j, scale[None, :], n, N, kind, OUTER)
        else:
            Q_j = Q
        if WIDE:
            first += _square(Q, Q_j, OUTER)
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
    C = first
    if SPLIT_TF32:
        C += second
        if TILES == 1:
            C += tl.trans(second)
    out = b * SPLITS + pid_s
    mask = (offs_i < R)[:, None] & (offs_j < R)[None, :] & (offs_j[None, :] <= offs_i[:, None])
    tl.store(C_ptr + out * R * R + offs_i[:, None] * R + offs_j[None, :], C, mask=mask)
    if pid_j == 0:
        if STACKED:
            sign = (offs_i == R).to(tl.float32) - (offs_i == R + 1).to(tl.float32)
            tl.store(w_ptr + out * R + offs_j, tl.sum(C * sign[:, None], 0), mask=offs_j < R)
        elif AUGMENTED:
            w_row = (offs_i == R)[:, None] & (offs_j < R)[None, :]
            tl.store(w_ptr + out * R + offs_i[:, None] * 0 + offs_j[None, :], C, mask=w_row)
        elif WITH_W:
            tl.store(w_ptr + out * R + offs_i, tl.sum(w, 1), mask=offs_i < R)
        if pid_i == 0 and not SCALAR_D and not INVERTED:
            if WIDE:
                tl.store(logdet_ptr + out, tl.sum(logs, 0))
            else:
                tl.store(logdet_ptr + out, _log_of_product(exponents, mantissas, valid))


def partial_sums(
    x: Tensor, loc: Tensor, P: Tensor, d: Tensor, inverted: bool, kind: str, flags: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums over the splits, C [B, SPLITS, R, R], w [B, SPLITS, R] and log|D| [B, SPLITS].

    x and loc are [S, B, N]; w is made if S = 1. With `flags` only the items whose flag is set are made.
    """
    B, N, R = P.shape
    wide = kind == "float64"
    block_r = common.padded_rank(R)
    if wide:
        block_r = min(block_r, WIDE_ROWS)
    elif R > common.FUSED_R:
        block_r = common.TILED_R
    tiles = common.ceil_div(R, block_r)
    align = common.alignment(P, x, loc, d)
    block = WIDE_BLOCK if wide else common.block("capacitance", BLOCKS, block_r, P.stride(1) == 1, P.device)
    columns = common.split_columns(N, R, block.columns)
    splits = max(1, common.ceil_div(N, columns))
    work = torch.float64 if wide else torch.float32
    C = P.new_empty(B, splits, R, R, dtype=work)
    w = P.new_empty(B, splits, R, dtype=work)
    logdet = P.new_empty(B, splits, dtype=torch.float64)
    with_w = x.shape[0] == 1
    by_column = P.stride(1) == 1
    stacked = with_w and by_column and kind == "tf32" and block_r >= R + 2 and x.dtype == loc.dtype == P.dtype
    stages = block.num_stages if stacked or not with_w else 1
    x, loc = (x[0], loc[0]) if with_w else (d, d)
    common.launch(
        capacitance_kernel,
        (B * splits, tiles * tiles),
        block.num_warps,
        stages,
        x_ptr=x,
        loc_ptr=loc,
        P_ptr=P,
        d_ptr=d,
        C_ptr=C,
        w_ptr=w,
        logdet_ptr=logdet,
        wide_ptr=flags if flags is not None else C,
        N=N,
        SPLITS=splits,
        COLUMNS=columns,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_lb=loc.stride(0),
        stride_ln=loc.stride(1),
        stride_pb=P.stride(0),
        stride_pr=P.stride(2),
        stride_pn=P.stride(1),
        stride_db=d.stride(0),
        stride_dn=d.stride(1),
        R=R,
        SCALAR_D=d.shape[1] == 1,
        INVERTED=inverted,
        WITH_W=with_w,
        WIDE=wide,
        FLAGGED=flags is not None,
        SPLIT_TF32=kind == "tf32",
        OUTER=wide and not common.matrix_float64(P.device),
        TILES=tiles,
        STACKED=stacked,
        AUGMENTED=with_w and not wide and block_r == 16 and R < 16 and not by_column,
        ALIGN=align,
        VECTORS=common.vector_alignment(N, x, loc, d),
        NARROW=common.narrow_offsets(P, block.columns),
        BLOCK_R=block_r,
        BLOCK_N=block.columns,
    )
    return C, w, logdet


__all__ = ["partial_sums"]
