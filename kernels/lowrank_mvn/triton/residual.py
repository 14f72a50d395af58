r"""Pass 2: rᵀD⁻¹r and PᵀD⁻¹r with r = δ − Pv, and with v = 0 the projection w = PᵀD⁻¹δ.

Where d is small, r is what is left of numbers hundreds of times its size, and q is a sum of N squares that is wanted
to 1e-8 of itself: r, its square and its projection are made in float64. That takes one conversion and two fused
multiply-adds for each value of P, which data-centre GPUs do several times faster than memory delivers the values; it
also makes this pass the same for items whose C needed float64 and for the others.

One program does one split of the columns of one item and one sample; samples come first in the grid, so that those
after the first find P in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Block, fold, load_tile, reciprocal

# By padded rank: one warp and at most 32 values of P in the registers of a lane, in float64 beside float32.
BLOCKS = {
    (block_r, by_column): block
    for block_r, block in {16: Block(1, 64), 32: Block(1, 32), 64: Block(1, 16), 128: Block(2, 16)}.items()
    for by_column in (True, False)
}


@triton.jit
def residual_kernel(
    x_ptr,  # [S, B, N]
    loc_ptr,  # [S, B, N]
    P_ptr,  # [B, N, R]
    d_ptr,  # [B, N], or [B, 1] if SCALAR_D; the diagonal of D⁻¹ if INVERTED
    v_ptr,  # [S, B, R], read if WITH_V
    g_ptr,  # [S, B, SPLITS, R]
    q_ptr,  # [S, B, SPLITS], written if WITH_V
    S,
    B,
    N,
    SPLITS,
    COLUMNS,
    stride_xs,
    stride_xb,
    stride_xn,
    stride_ls,
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
    WITH_V: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_g = tl.program_id(1)  # the tile of R whose projection is made
    s = (pid % S).to(tl.int64)
    b = (pid // S // SPLITS).to(tl.int64)
    pid_s = pid // S % SPLITS
    if ALIGN > 1:
        N = tl.multiple_of(N, ALIGN)
        stride_pb = tl.multiple_of(stride_pb, ALIGN)
        stride_pr = tl.multiple_of(stride_pr, ALIGN)
        stride_xs = tl.multiple_of(stride_xs, ALIGN)
        stride_xb = tl.multiple_of(stride_xb, ALIGN)
        stride_ls = tl.multiple_of(stride_ls, ALIGN)
        stride_lb = tl.multiple_of(stride_lb, ALIGN)
        if not SCALAR_D:
            stride_db = tl.multiple_of(stride_db, ALIGN)
    VEC: tl.constexpr = 4 if ALIGN >= 4 else 1
    x_ptr += s * stride_xs + b * stride_xb
    loc_ptr += s * stride_ls + b * stride_lb
    P_ptr += b * stride_pb
    d_ptr += b * stride_db
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = pid_g * BLOCK_R + offs_r
    v_ptr += (s * B + b) * R
    if WITH_V and TILES == 1:
        v = tl.load(v_ptr + offs_r, mask=offs_r < R, other=0.0)
    if SCALAR_D:
        d_one = tl.load(d_ptr).to(tl.float64)
        d_inv_one = d_one if INVERTED else 1.0 / d_one
    g = tl.zeros((BLOCK_R, BLOCK_N // VEC), tl.float64)
    q = tl.zeros((BLOCK_N,), tl.float64)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        P = load_tile(P_ptr, offs_g, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N).to(tl.float64)
        x = tl.load(x_ptr + offs_n.to(tl.int64) * stride_xn, mask=mask_n, other=0.0)
        loc = tl.load(loc_ptr + offs_n.to(tl.int64) * stride_ln, mask=mask_n, other=0.0)
        r = x.to(tl.float64) - loc.to(tl.float64)
        if WITH_V:
            if TILES == 1:
                r -= tl.sum(P * v[:, None], 0)
            else:
                for tile in range(TILES):
                    offs_t = tile * BLOCK_R + offs_r
                    v = tl.load(v_ptr + offs_t, mask=offs_t < R, other=0.0)
                    P_t = load_tile(P_ptr, offs_t, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N).to(tl.float64)
                    r -= tl.sum(P_t * v[:, None], 0)
        if SCALAR_D:
            z = r * d_inv_one
        else:
            d = tl.load(d_ptr + offs_n.to(tl.int64) * stride_dn, mask=mask_n, other=1.0)
            z = r * (d.to(tl.float64) if INVERTED else reciprocal(d))
        if WITH_V:
            q += r * z
        g += fold(P * z[None, :], VEC)
    out = (s * B + b) * SPLITS + pid_s
    tl.store(g_ptr + out * R + offs_g, tl.sum(g, 1), mask=offs_g < R)
    if WITH_V and pid_g == 0:
        tl.store(q_ptr + out, tl.sum(q, 0))


def partial_sums(
    x: Tensor, loc: Tensor, P: Tensor, d: Tensor, v: Tensor | None, inverted: bool = False
) -> tuple[Tensor, Tensor]:
    """Partial sums over the splits: PᵀD⁻¹r [S, B, SPLITS, R] and rᵀD⁻¹r [S, B, SPLITS]; r = δ where v is None."""
    S, (B, N, R) = x.shape[0], P.shape
    block_r = min(common.padded_rank(R), common.FUSED_R)
    block = common.block("residual", BLOCKS, block_r, P.stride(1) == 1, P.device)
    columns = common.split_columns(N, R, block.columns)
    splits = max(1, common.ceil_div(N, columns))
    g = P.new_empty(S, B, splits, R, dtype=torch.float64)
    q = P.new_empty(S, B, splits, dtype=torch.float64)
    tiles = common.ceil_div(R, block_r)
    common.launch(
        residual_kernel,
        (S * B * splits, tiles),
        block.num_warps,
        block.num_stages,
        x_ptr=x,
        loc_ptr=loc,
        P_ptr=P,
        d_ptr=d,
        v_ptr=v if v is not None else q,
        g_ptr=g,
        q_ptr=q,
        S=S,
        B=B,
        N=N,
        SPLITS=splits,
        COLUMNS=columns,
        stride_xs=x.stride(0),
        stride_xb=x.stride(1),
        stride_xn=x.stride(2),
        stride_ls=loc.stride(0) if loc.shape[0] > 1 else 0,
        stride_lb=loc.stride(1),
        stride_ln=loc.stride(2),
        stride_pb=P.stride(0),
        stride_pr=P.stride(2),
        stride_pn=P.stride(1),
        stride_db=d.stride(0),
        stride_dn=d.stride(1),
        R=R,
        SCALAR_D=d.shape[1] == 1,
        INVERTED=inverted,
        WITH_V=v is not None,
        TILES=tiles,
        ALIGN=common.alignment(P, x, loc, d),
        NARROW=common.narrow_offsets(P, block.columns),
        BLOCK_R=block_r,
        BLOCK_N=block.columns,
    )
    return g, q


__all__ = ["partial_sums"]
