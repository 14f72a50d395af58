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
from .common import Block, aligned, reciprocal
from .tiles import load_placed

# By padded rank: one warp and at most 32 values of P in the registers of a lane, in float64 beside float32.
BLOCKS = {
    (16, True): Block(1, 64),
    (16, False): Block(1, 32),
    (32, True): Block(1, 32),
    (32, False): Block(1, 32),
    (64, True): Block(1, 16),
    (64, False): Block(1, 16),
    (128, True): Block(2, 16),
    (128, False): Block(2, 8),
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
    J: tl.constexpr,
    Q: tl.constexpr,
    L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_g = tl.program_id(1)  # the tile of R whose projection is made
    s = (pid % S).to(tl.int64)
    b = (pid // S // SPLITS).to(tl.int64)
    pid_s = pid // S % SPLITS
    N, stride_pb, stride_pr = aligned((N, stride_pb, stride_pr), ALIGN)
    stride_xs, stride_xb = aligned((stride_xs, stride_xb), ALIGN)
    stride_ls, stride_lb = aligned((stride_ls, stride_lb), ALIGN)
    if not SCALAR_D:
        (stride_db,) = aligned((stride_db,), ALIGN)
    x_ptr += s * stride_xs + b * stride_xb
    loc_ptr += s * stride_ls + b * stride_lb
    P_ptr += b * stride_pb
    d_ptr += b * stride_db
    H: tl.constexpr = BLOCK_N // (J * Q)
    I: tl.constexpr = BLOCK_R // L
    rows, columns_p = _places(I, H, J, Q, L)
    v_ptr += (s * B + b) * R
    if WITH_V and TILES == 1:
        v = _coefficients(v_ptr, 0, rows, R)
    if SCALAR_D:
        d_one = tl.load(d_ptr).to(tl.float64)
        d_inv_one = d_one if INVERTED else 1.0 / d_one
    g = tl.zeros((I, Q, L), tl.float64)
    q = tl.zeros((H, J, Q), tl.float64)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        rows_g = pid_g * BLOCK_R + rows
        P = load_placed(P_ptr, rows_g, columns_p, n, N, stride_pr, stride_pn, R, NARROW).to(tl.float64)
        x = tl.load(x_ptr + offs_n.to(tl.int64) * stride_xn, mask=mask_n, other=0.0)
        loc = tl.load(loc_ptr + offs_n.to(tl.int64) * stride_ln, mask=mask_n, other=0.0)
        r = _placed(x.to(tl.float64) - loc.to(tl.float64), H, J, Q)
        if WITH_V:
            if TILES == 1:
                r -= tl.sum(tl.sum(P * v, 0), 3)
            else:
                for tile in tl.static_range(TILES):
                    rows_t = tile * BLOCK_R + rows
                    P_t = load_placed(P_ptr, rows_t, columns_p, n, N, stride_pr, stride_pn, R, NARROW).to(tl.float64)
                    r -= tl.sum(tl.sum(P_t * _coefficients(v_ptr, tile * BLOCK_R, rows, R), 0), 3)
        if SCALAR_D:
            z = r * d_inv_one
        else:
            d = tl.load(d_ptr + offs_n.to(tl.int64) * stride_dn, mask=mask_n, other=1.0)
            z = r * _placed(d.to(tl.float64) if INVERTED else reciprocal(d), H, J, Q)
        if WITH_V:
            q += r * z
        g += tl.sum(tl.sum(P * z[None, :, :, :, None], 1), 1)
    out = (s * B + b) * SPLITS + pid_s
    rows_g = pid_g * BLOCK_R + tl.reshape(rows, (I, L))
    tl.store(g_ptr + out * R + rows_g, tl.sum(g, 1), mask=rows_g < R)
    if WITH_V and pid_g == 0:
        tl.store(q_ptr + out, tl.sum(tl.sum(tl.sum(q, 0), 0), 0))


@triton.jit
def _places(I: tl.constexpr, H: tl.constexpr, J: tl.constexpr, Q: tl.constexpr, L: tl.constexpr):
    """Row and column of each value of a tile [I, H, J, Q, L], which go to the lanes from the last dimension on."""
    i = tl.arange(0, I)[:, None, None, None, None]
    h = tl.arange(0, H)[None, :, None, None, None]
    j = tl.arange(0, J)[None, None, :, None, None]
    q = tl.arange(0, Q)[None, None, None, :, None]
    p = tl.arange(0, L)[None, None, None, None, :]
    return i * L + p, (h * Q + q) * J + j


@triton.jit
def _coefficients(v_ptr, first, rows, R: tl.constexpr):
    """v of a tile's rows from `first` on, to multiply it with."""
    rows = first + tl.reshape(rows, (rows.shape[0], rows.shape[4]))
    return tl.load(v_ptr + rows, mask=rows < R, other=0.0)[:, None, None, None, :]


@triton.jit
def _placed(a, H: tl.constexpr, J: tl.constexpr, Q: tl.constexpr):
    """Values of the columns [BLOCK_N] as [H, J, Q]."""
    return tl.permute(tl.reshape(a, (H, Q, J)), (0, 2, 1))


def _lanes(block: Block, block_r: int, by_column: bool) -> dict[str, int]:
    """How a tile lies in the lanes: L rows and Q times J columns, four values of 4 bytes to a lane where it can be."""
    if by_column:
        Q = min(8, block.columns // 4)
        return {"J": 4, "Q": Q, "L": 32 // Q}
    return {"J": 1, "Q": 4, "L": 8 if block_r <= 32 else 32}


def partial_sums(
    x: Tensor, loc: Tensor, P: Tensor, d: Tensor, v: Tensor | None, inverted: bool = False
) -> tuple[Tensor, Tensor]:
    """Partial sums over the splits: PᵀD⁻¹r [S, B, SPLITS, R] and rᵀD⁻¹r [S, B, SPLITS]; r = δ where v is None."""
    S, (B, N, R) = x.shape[0], P.shape
    block_r = min(common.padded_rank(R), common.FUSED_R)
    by_column = P.stride(1) == 1
    block = common.block("residual", BLOCKS, block_r, by_column, P.device)
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
        **_lanes(block, block_r, by_column),
        BLOCK_R=block_r,
        BLOCK_N=block.columns,
    )
    return g, q


__all__ = ["partial_sums"]
