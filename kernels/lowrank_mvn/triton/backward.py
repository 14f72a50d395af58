r"""The backward pass: read P, write grad_P, and grad_x, grad_loc, grad_d on the way; only what is asked for.

With a = ∂loss/∂q [S, B], b = ∂loss/∂log|Σ| [B], z = D⁻¹(δ − Pv) and T = C⁻¹Pᵀ:

    grad_x = 2az = −grad_loc        grad_P = 2b D⁻¹Tᵀ − 2 Σₛ a z vᵀ
    grad_d = bπ − Σₛ az²            π = diag Σ⁻¹ = 1/d − diag(PT)/d²

The residual is made in float64, as in `residual`, and rounded once; T in three tf32 products of high and low parts (C⁻¹
is split once), what is dropped being 2⁻²² of what is kept. Items that needed float64 for C need it for T too, whose
terms cancel as far: WIDE adds R products of a column of C⁻¹ and a row of P in float64, and each of the two kernels
leaves the other's items alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, tiles
from .common import Block, aligned, narrow, split
from .tiles import in_memory, load_placed, operand, ordered, places, product, result, rows_of, store_result

# By padded rank, and whether neighbouring columns of P are neighbours in memory.
BLOCKS = {
    (16, True): Block(1, 64),
    (16, False): Block(1, 32),
    (32, True): Block(1, 32),
    (32, False): Block(1, 32),
    (64, True): Block(4, 128),
    (64, False): Block(4, 64),
    (128, True): Block(8, 16),
    (128, False): Block(8, 16),
    # Registers are short elsewhere. On sm_75 products are made without tensor cores.
    (32, False, "sm_80"): Block(1, 16),
    (32, False, "sm_100"): Block(4, 64),
    (64, True, "sm_80"): Block(4, 64),
    (64, False, "sm_80"): Block(4, 32),
    (64, True, "sm_100"): Block(4, 64),
    (64, True, "gfx"): Block(4, 64),
    (32, True, "sm_75"): Block(2, 32),
    (32, False, "sm_75"): Block(2, 32),
    (64, True, "sm_75"): Block(8, 32),
    (64, False, "sm_75"): Block(8, 32),
}
# None or several samples, or values to be converted, take the registers that 128 columns of 64 rows just leave.
SPARING_BLOCKS = {**BLOCKS, (64, True): Block(4, 64)}
# Where tiles of rows are walked over, the accumulators of one and the products with another are in registers at once.
TILED_BLOCKS = {
    True: Block(4, 64),
    False: Block(8, 32),
    (True, "sm_75"): Block(8, 32),
    (False, "sm_75"): Block(4, 16),
    (True, "sm_80"): Block(8, 32),
    (False, "sm_80"): Block(4, 16),
    (False, "gfx"): Block(4, 16),
}
WIDE_BLOCK = Block(4, 16)


@triton.jit
def backward_kernel(
    a_ptr,  # [S, B]
    b_ptr,  # [B]
    x_ptr,  # [S, B, N]
    loc_ptr,  # [S or 1, B, N]
    P_ptr,  # [B, N, R]
    d_ptr,  # [B, N], or [B, 1] if SCALAR_D
    C_inv_ptr,  # [B, R, R]
    v_ptr,  # [S, B, R]
    wide_ptr,  # [B]
    grad_x_ptr,  # [S, B, N]
    grad_loc_ptr,  # [S, B, N], or [CHUNKS, B, N] if SHARED_LOC
    grad_P_ptr,  # [CHUNKS, B, N, R]
    grad_d_ptr,  # [CHUNKS, B, N], or [CHUNKS, B, SPLITS] of −Σ az² if SCALAR_D
    S,
    B,
    N,
    SPLITS,
    COLUMNS,
    CHUNKS,
    stride_as,
    stride_ab,
    stride_bb,
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
    stride_gc,
    stride_gb,
    stride_gr,
    stride_gn,
    R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    SHARED_LOC: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_LOC: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_D: tl.constexpr,
    WIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    LIKE_P: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    item = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if (tl.load(wide_ptr + item) != 0) != WIDE:
            return
    N, stride_pb, stride_pr = aligned((N, stride_pb, stride_pr), ALIGN)
    stride_gb, stride_gr = aligned((stride_gb, stride_gr), ALIGN)
    stride_xs, stride_xb = aligned((stride_xs, stride_xb), ALIGN)
    stride_ls, stride_lb = aligned((stride_ls, stride_lb), ALIGN)
    if not SCALAR_D:
        (stride_db,) = aligned((stride_db,), ALIGN)
    if LIKE_P:  # the offsets of one are those of the other
        stride_gb = stride_pb
        stride_gr = stride_pr
        stride_gn = stride_pn
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    WITH_T: tl.constexpr = NEED_P or (NEED_D and not SCALAR_D)
    P_ptr += item * stride_pb
    d_ptr += item * stride_db
    C_inv_ptr += item * R * R
    own = tl.full((), 1, tl.int64) * chunk
    grad_P_ptr += own * stride_gc + item * stride_gb
    offs_k = tl.arange(0, BLOCK_R)
    offs_r = rows_of(offs_k)  # in the order of a product's result, as whatever has BLOCK_R columns below
    rows, columns_p = places(BY_COLUMN, J, W, BLOCK_R, BLOCK_N)
    b = tl.load(b_ptr + item * stride_bb).to(kind)
    b = tl.where(chunk == 0, b, 0.0)  # what does not depend on the samples belongs to the first
    if SCALAR_D:
        d_inv_one = 1.0 / tl.load(d_ptr).to(kind)
    if WITH_T and TILES == 1 and not WIDE:
        mask_C = (offs_k < R)[:, None] & (offs_r < R)[None, :]
        C_inv = tl.load(C_inv_ptr + offs_k[:, None] * R + offs_r[None, :], mask=mask_C, other=0.0).to(tl.float32)
        C_high, C_low = split(C_inv)
    az2_sum = tl.zeros((BLOCK_N,), tl.float64)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if SCALAR_D:
            d_inv = tl.full((BLOCK_N,), 1.0, kind) * d_inv_one
        else:
            d_inv = 1.0 / tl.load(d_ptr + columns * stride_dn, mask=mask_n, other=1.0).to(kind)
            d_inv = ordered(d_inv, BY_COLUMN, J, W)
        pi = d_inv
        for tile in tl.static_range(TILES):
            offs_t = tile * BLOCK_R + offs_r
            P_tile = load_placed(P_ptr, tile * BLOCK_R + rows, columns_p, n, N, stride_pr, stride_pn, R, NARROW)
            P = result(P_tile)
            if WITH_T:
                if WIDE:
                    T = tl.zeros((BLOCK_N, BLOCK_R), tl.float64)
                    for k in range(R):
                        C_k = tl.load(C_inv_ptr + k * R + offs_t, mask=offs_t < R, other=0.0)
                        row = P_ptr + tl.full((), 1, tl.int64) * k * stride_pr
                        P_k = tl.load(row + columns * stride_pn, mask=mask_n, other=0.0).to(tl.float64)
                        T += ordered(P_k, BY_COLUMN, J, W)[:, None] * C_k[None, :]
                    diagonal = tl.sum(T * P.to(tl.float64), 1)
                elif TILES == 1:
                    T, diagonal = _product_and_diagonal(P_tile, C_high, C_low, C_inv, SPLIT_TF32)
                else:
                    T = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
                    for other in range(TILES):
                        rows_C = other * BLOCK_R + offs_k
                        mask_t = (rows_C < R)[:, None] & (offs_t < R)[None, :]
                        C_t = tl.load(C_inv_ptr + rows_C[:, None] * R + offs_t[None, :], mask=mask_t, other=0.0)
                        C_t = C_t.to(tl.float32)
                        high, low = split(C_t)
                        rows_k = other * BLOCK_R + rows
                        P_k = load_placed(P_ptr, rows_k, columns_p, n, N, stride_pr, stride_pn, R, NARROW)
                        T += product(operand(P_k), high, low, C_t, SPLIT_TF32)
                    diagonal = tl.sum(T * P.to(tl.float32), 1)
                if NEED_D and not SCALAR_D:
                    pi -= diagonal * d_inv * d_inv
                if NEED_P:  # before the residual, so that fewer tiles are in registers at once
                    grad_P = T * (2.0 * b * d_inv)[:, None]
            grad_loc = tl.zeros((BLOCK_N,), kind)
            az2 = tl.zeros((BLOCK_N,), kind)
            for s in range(chunk, S, CHUNKS):
                at = tl.full((), 1, tl.int64) * s
                x = tl.load(x_ptr + at * stride_xs + item * stride_xb + columns * stride_xn, mask=mask_n, other=0.0)
                where_loc = at * stride_ls + item * stride_lb
                loc = tl.load(loc_ptr + where_loc + columns * stride_ln, mask=mask_n, other=0.0)
                v_row = v_ptr + (at * B + item) * R
                v = tl.load(v_row + offs_t, mask=offs_t < R, other=0.0)
                r = ordered(x.to(tl.float64) - loc.to(tl.float64), BY_COLUMN, J, W)
                if TILES == 1:
                    r -= tl.sum(P.to(tl.float64) * v[None, :], 1)
                else:
                    for other in range(TILES):
                        rows_k = other * BLOCK_R + rows
                        P_k = load_placed(P_ptr, rows_k, columns_p, n, N, stride_pr, stride_pn, R, NARROW)
                        offs_v = other * BLOCK_R + offs_r
                        v_k = tl.load(v_row + offs_v, mask=offs_v < R, other=0.0)
                        r -= tl.sum(result(P_k).to(tl.float64) * v_k[None, :], 1)
                a = tl.load(a_ptr + at * stride_as + item * stride_ab).to(kind)
                z = r.to(kind) * d_inv
                az = a * z
                if NEED_P:
                    grad_P -= (2.0 * az)[:, None] * v.to(kind)[None, :]
                if tile == 0:
                    az2 += az * z
                    where = (at * B + item) * N + columns
                    az = in_memory(2.0 * az, BY_COLUMN, J, W)
                    if NEED_X:
                        tl.store(grad_x_ptr + where, narrow(az, grad_x_ptr), mask=mask_n)
                    if NEED_LOC:
                        if SHARED_LOC:
                            grad_loc -= az
                        else:
                            tl.store(grad_loc_ptr + where, narrow(-az, grad_loc_ptr), mask=mask_n)
            if tile == 0:
                az2_sum += az2.to(tl.float64)
                if NEED_LOC and SHARED_LOC:
                    tl.store(grad_loc_ptr + (own * B + item) * N + columns, narrow(grad_loc, grad_loc_ptr), mask=mask_n)
                az2_tile = az2
            if NEED_P:
                grad_P = narrow(grad_P, grad_P_ptr)
                store_result(grad_P_ptr, grad_P, tile, n, N, stride_gr, stride_gn, R, NARROW, BY_COLUMN, J, W)
        if NEED_D and not SCALAR_D:
            grad_d = narrow(in_memory(b * pi - az2_tile, BY_COLUMN, J, W), grad_d_ptr)
            tl.store(grad_d_ptr + (own * B + item) * N + columns, grad_d, mask=mask_n)
    if NEED_D and SCALAR_D:
        tl.store(grad_d_ptr + (own * B + item) * SPLITS + pid_s, -tl.sum(az2_sum, 0))


@triton.jit
def _product_and_diagonal(tile, C_high, C_low, C, SPLIT_TF32: tl.constexpr):
    """T = PᵀC of a tile [columns, rows], and the diagonal of TP [columns].

    In two halves where a tile has twice the columns that a matrix instruction takes at once: the parts of P for one
    product, not two, are in registers.
    """
    P = operand(tile)
    P_result = result(tile)
    columns: tl.constexpr = P.shape[0]
    if columns > 64:
        half: tl.constexpr = columns // 2
        R: tl.constexpr = P.shape[1]
        P1, P2 = tl.split(tl.permute(tl.reshape(P, (2, half, R)), (1, 2, 0)))
        P1_result, P2_result = tl.split(tl.permute(tl.reshape(P_result, (2, half, R)), (1, 2, 0)))
        T1 = product(P1, C_high, C_low, C, SPLIT_TF32)
        diagonal1 = tl.sum(T1 * P1_result.to(tl.float32), 1)
        T2 = product(P2, C_high, C_low, C, SPLIT_TF32)
        diagonal2 = tl.sum(T2 * P2_result.to(tl.float32), 1)
        T = tl.reshape(tl.permute(tl.join(T1, T2), (2, 0, 1)), (columns, R))
        return T, tl.reshape(tl.permute(tl.join(diagonal1, diagonal2), (1, 0)), (columns,))
    else:
        T = product(P, C_high, C_low, C, SPLIT_TF32)
        return T, tl.sum(T * P_result.to(tl.float32), 1)


def gradients(
    a: Tensor,
    b: Tensor,
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    wide: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    chunks: int,
    kind: str,
    flagged: bool,
) -> Tensor:
    """Writes `grads` of x [S, B, N] and of loc, P and d: partial sums [chunks, B, ...], or, if each sample has a loc of
    its own, [S, B, N] of it. Where d is one value per item, grad_d only says that −Σ az² [B] is wanted: the result."""
    S, (B, N, R) = x.shape[0], P.shape
    grad_x, grad_loc, grad_P, grad_d = grads
    is_wide = kind == "float64"
    G = grad_P[0] if grad_P is not None else P
    block_r = common.padded_rank(R) if common.fused_rank(P.device) >= R else common.TILED_R
    align = min(common.alignment(P, x, loc, d), common.alignment(G, x, loc))
    by_column = P.stride(1) == 1
    if is_wide:
        block = WIDE_BLOCK
    elif block_r < R:
        block = common.tiled_block(TILED_BLOCKS, by_column, P.device)
    else:
        sparing = S != 1 or P.element_size() <= 2
        name, table = ("backward_sparing", SPARING_BLOCKS) if sparing else ("backward", BLOCKS)
        block = common.block(name, table, block_r, by_column, P.device)
    columns = common.split_columns(N, R, block.columns)
    splits = max(1, common.ceil_div(N, columns))
    sums = P.new_zeros(chunks, B, splits, dtype=torch.float64)
    scalar_d, need_d = d.shape[1] == 1, grad_d is not None
    grad_d = sums if scalar_d else grad_d
    common.launch(
        backward_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        a_ptr=a,
        b_ptr=b,
        x_ptr=x,
        loc_ptr=loc,
        P_ptr=P,
        d_ptr=d,
        C_inv_ptr=C_inv,
        v_ptr=v,
        wide_ptr=wide.view(torch.uint8),
        grad_x_ptr=grad_x if grad_x is not None else x,
        grad_loc_ptr=grad_loc if grad_loc is not None else loc,
        grad_P_ptr=grad_P if grad_P is not None else P,
        grad_d_ptr=grad_d if grad_d is not None else d,
        S=S,
        B=B,
        N=N,
        SPLITS=splits,
        COLUMNS=columns,
        CHUNKS=chunks,
        stride_as=a.stride(0),
        stride_ab=a.stride(1),
        stride_bb=b.stride(0),
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
        stride_gc=grad_P.stride(0) if grad_P is not None else 0,
        stride_gb=G.stride(0),
        stride_gr=G.stride(2),
        stride_gn=G.stride(1),
        R=R,
        SCALAR_D=scalar_d,
        SHARED_LOC=loc.shape[0] != S,
        NEED_X=grad_x is not None,
        NEED_LOC=grad_loc is not None,
        NEED_P=grad_P is not None,
        NEED_D=need_d,
        WIDE=is_wide,
        FLAGGED=flagged,
        SPLIT_TF32=kind == "tf32",
        TILES=common.ceil_div(R, block_r),
        ALIGN=align,
        NARROW=common.narrow_offsets(P, block.columns) and common.narrow_offsets(G, block.columns),
        BLOCK_R=block_r,
        BLOCK_N=block.columns,
        LIKE_P=G.stride() == P.stride(),
        **tiles.shape(block, by_column),
    )
    return sums.sum((0, 2))


__all__ = ["gradients"]
