r"""The backward pass: read P, write grad_P, and grad_x, grad_loc, grad_d on the way; only what is asked for.

With a = ∂loss/∂q [S, B], b = ∂loss/∂log|Σ| [B], the residual r that `residual` stored before the last step of v,
z = D⁻¹(r − P step) and T = C⁻¹Pᵀ:

    grad_x = 2az = −grad_loc        grad_P = 2b D⁻¹Tᵀ − 2 Σₛ a z vᵀ
    grad_d = bπ − Σₛ az²            π = diag Σ⁻¹ = 1/d − diag(PT)/d²

T is made in three tf32 products of high and low parts (C⁻¹ is split once), what is dropped being 2⁻²² of what is kept.
r, which loses most of its size where d is small and v had far to go, gets its step in float64, and is
rounded once. Items that needed float64 for C need it for T too, whose
terms cancel as far: "float64" adds R products of a column of C⁻¹ and a row of P in float64, and as many with L⁻¹, whose
squares add up to diag PT; each of the two kernels leaves the other's items alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.heaviest import without_heaviest
from ....device.launch import Block, Table, TiledTable
from ....device.math import narrow, product, split
from ....device.tiles import (
    in_memory,
    load_placed,
    load_row,
    multiple,
    of_item,
    operand,
    ordered,
    places,
    result,
    rows_of,
    store_result,
)

# By padded rank, and whether neighbouring columns of P are neighbours in memory.
BLOCKS: Table = {
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
    (64, True, "sm_80"): Block(4, 32),
    (64, False, "sm_80"): Block(4, 32),
    (64, True, "sm_100"): Block(4, 64),
    (64, True, "gfx"): Block(4, 64),
    (32, True, "sm_75"): Block(2, 32),
    (32, False, "sm_75"): Block(2, 32),
    (64, True, "sm_75"): Block(8, 32),
    (64, False, "sm_75"): Block(8, 32),
}
# None or several samples, or values to be converted, take the registers that 128 columns of 64 rows just leave.
SPARING_BLOCKS: Table = {**BLOCKS, (64, True): Block(4, 64)}
# A walk over tiles of rows holds the accumulators of one and the products with another in registers at once.
TILED_BLOCKS: TiledTable = {
    True: Block(4, 64),
    False: Block(8, 32),
    (True, "sm_75"): Block(8, 32),
    (False, "sm_75"): Block(4, 16),
    (True, "sm_80"): Block(8, 32),
    (False, "sm_80"): Block(4, 16),
    (False, "gfx"): Block(4, 16),
}
WIDE_BLOCK = Block(8, 16)


@triton.jit
def _product_and_diagonal(tile, C_high, C_low, C, KIND: tl.constexpr):
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
        T1 = product(P1, C_high, C_low, C, KIND)
        diagonal1 = tl.sum(T1 * P1_result.to(tl.float32), 1)
        T2 = product(P2, C_high, C_low, C, KIND)
        diagonal2 = tl.sum(T2 * P2_result.to(tl.float32), 1)
        T = tl.reshape(tl.permute(tl.join(T1, T2), (2, 0, 1)), (columns, R))
        return T, tl.reshape(tl.permute(tl.join(diagonal1, diagonal2), (1, 0)), (columns,))
    else:
        T = product(P, C_high, C_low, C, KIND)
        return T, tl.sum(T * P_result.to(tl.float32), 1)


@triton.jit
def backward_kernel(
    a_at,  # [B, S]
    b_at,  # [B]
    r_at,  # [B, S, N], or none if there are no samples
    P_at,  # [B, R, N]
    d_at,  # [B, N], or [B, 1] if ONE_D
    inverses,  # C⁻¹ and L⁻¹ [B, R, R]
    v_ptr,  # [S, B, R], if there are samples
    step_ptr,  # [S, B, R], likewise
    marks,  # [B], items that products of KIND are for, none: all; [B, 1 + 2R], where pixels of large h go, or none
    grad_x_ptr,  # [S, B, N]; as the others, none where it is not needed
    grad_loc_ptr,  # [S, B, N], or [CHUNKS, B, N] of samples that share a mean
    grad_P_at,  # [B, CHUNKS, R, N]
    grad_d_ptr,  # [CHUNKS, B, N], or [CHUNKS, B, SPLITS] of −Σ az² if ONE_D
    sizes,  # S, B, N
    cut,  # programs for an item, columns for each, and CHUNKS that share the samples
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    SAMPLES: tl.constexpr,  # "one"; of several, whether they "share" a mean or have their "own"
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """z = D⁻¹(r − P step), T = C⁻¹Pᵀ: 2az, −2az, 2b D⁻¹Tᵀ − 2 Σₛ a z vᵀ and bπ − Σₛ az² of one split of the columns."""
    # One loop, and longer than a function should be: a tile of P in registers serves every gradient.
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    WIDE: tl.constexpr = KIND == "float64"
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    NEED_P: tl.constexpr = grad_P_at is not None
    EACH_D: tl.constexpr = grad_d_ptr is not None and not ONE_D
    SHARED_LOC: tl.constexpr = SAMPLES == "share"
    ONE_ROW: tl.constexpr = SAMPLES == "one" and TILES == 1  # of v and of its step: read once, not for every block
    S, B, N = sizes
    SPLITS, length, CHUNKS = cut
    pid = tl.program_id(0)
    item = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    own = tl.full((), 1, tl.int64) * chunk
    wide_ptr, heaviest_ptr = marks
    NEED_PI: tl.constexpr = EACH_D or heaviest_ptr is not None
    if wide_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if (tl.load(wide_ptr + item) != 0) != WIDE:
            return
    N = multiple(N, TILE.ALIGN)
    P_item = of_item(P_at, item, TILE.ALIGN)
    d_item = of_item(d_at, item, 1 if ONE_D else TILE.ALIGN)
    if r_at is not None:
        r_item = of_item(r_at, item, TILE.ALIGN)
    if NEED_P:
        if TILE.LIKE:  # the offsets of one are those of the other
            grad_P_ptr = grad_P_at[0] + own * grad_P_at[2] + item * multiple(P_at[1], TILE.ALIGN)
            grad_P_item = (grad_P_ptr, P_item[1], P_item[2])
        else:
            grad_P_item = of_item(of_item(grad_P_at, item, TILE.ALIGN), own, 1)
    C_inv_ptr = inverses[0] + item * R * R
    L_inv_ptr = inverses[1] + item * R * R
    offs_k = tl.arange(0, BLOCK_R)
    offs_r = rows_of(offs_k)  # in the order of a product's result, as whatever has BLOCK_R columns below
    rows, columns_p = places(TILE)
    b = tl.load(b_at[0] + item * b_at[1]).to(dtype)
    b = tl.where(chunk == 0, b, 0.0)  # what does not depend on the samples belongs to the first
    if ONE_D:
        d_inv_one = 1.0 / tl.load(d_item[0]).to(dtype)
    if (NEED_P or NEED_PI) and TILES == 1 and not WIDE:
        mask_C = (offs_k < R)[:, None] & (offs_r < R)[None, :]
        C_inv = tl.load(C_inv_ptr + offs_k[:, None] * R + offs_r[None, :], mask=mask_C, other=0.0).to(tl.float32)
        C_high, C_low = split(C_inv)
    if ONE_ROW:
        step_one = tl.load(step_ptr + item * R + offs_r, mask=offs_r < R, other=0.0)
        v_one = tl.load(v_ptr + item * R + offs_r, mask=offs_r < R, other=0.0).to(dtype)
    az2_sum = tl.zeros((BLOCK_N,), tl.float64)
    start = pid_s * length
    for n in range(start, min(start + length, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if ONE_D:
            d_inv = tl.full((BLOCK_N,), 1.0, dtype) * d_inv_one
        else:
            d_inv = ordered(1.0 / load_row(d_item, columns, mask_n, 1.0).to(dtype), TILE)
        pi = d_inv
        for tile in tl.static_range(TILES):
            offs_t = tile * BLOCK_R + offs_r
            P_tile = load_placed(P_item, tile * BLOCK_R + rows, columns_p, n, N, R, TILE)
            P = result(P_tile)
            if NEED_P or NEED_PI:
                if WIDE:
                    T = tl.zeros((BLOCK_N, BLOCK_R), tl.float64)
                    half = tl.zeros((BLOCK_N, BLOCK_R), tl.float64)  # PᵀL⁻ᵀ, so that π has a sum of squares
                    for k in range(R):
                        row = P_item[0] + tl.full((), 1, tl.int64) * k * P_item[1]
                        P_k = ordered(load_row((row, P_item[2]), columns, mask_n).to(tl.float64), TILE)
                        if NEED_P:
                            C_k = tl.load(C_inv_ptr + k * R + offs_t, mask=offs_t < R, other=0.0)
                            T += P_k[:, None] * C_k[None, :]
                        if NEED_PI:
                            L_k = tl.load(L_inv_ptr + offs_t * R + k, mask=offs_t < R, other=0.0)
                            half += P_k[:, None] * L_k[None, :]
                    diagonal = tl.sum(half * half, 1)
                elif TILES == 1:
                    T, diagonal = _product_and_diagonal(P_tile, C_high, C_low, C_inv, KIND)
                else:
                    T = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
                    for other in range(TILES):
                        rows_C = other * BLOCK_R + offs_k
                        mask_t = (rows_C < R)[:, None] & (offs_t < R)[None, :]
                        C_t = tl.load(C_inv_ptr + rows_C[:, None] * R + offs_t[None, :], mask=mask_t, other=0.0)
                        C_t = C_t.to(tl.float32)
                        high, low = split(C_t)
                        P_k = load_placed(P_item, other * BLOCK_R + rows, columns_p, n, N, R, TILE)
                        T += product(operand(P_k), high, low, C_t, KIND)
                    diagonal = tl.sum(T * P.to(tl.float32), 1)
                if NEED_PI:
                    pi -= diagonal * d_inv * d_inv
                if NEED_P:  # before the residual, so that fewer tiles are in registers at once
                    grad_P = T * (2.0 * b * d_inv)[:, None]
            grad_loc = tl.zeros((BLOCK_N,), dtype)
            az2 = tl.zeros((BLOCK_N,), dtype)
            if r_at is not None:
                for s in range(chunk, S, CHUNKS):
                    at = tl.full((), 1, tl.int64) * s
                    r = ordered(load_row(of_item(r_item, at, 1), columns, mask_n).to(tl.float64), TILE)
                    own_row = (at * B + item) * R
                    for other in tl.static_range(TILES):
                        P_k = P
                        if TILES > 1:
                            P_k = result(load_placed(P_item, other * BLOCK_R + rows, columns_p, n, N, R, TILE))
                        offs_v = other * BLOCK_R + offs_r
                        if ONE_ROW:  # noqa: SIM108  (decided when compiling)
                            step = step_one
                        else:
                            step = tl.load(step_ptr + own_row + offs_v, mask=offs_v < R, other=0.0)
                        r -= tl.sum(P_k.to(tl.float64) * step[None, :], 1)
                    a = tl.load(a_at[0] + item * a_at[1] + at * a_at[2]).to(dtype)
                    z = r.to(dtype) * d_inv
                    az = a * z
                    if NEED_P:
                        if ONE_ROW:
                            v = v_one
                        else:
                            v = tl.load(v_ptr + own_row + offs_t, mask=offs_t < R, other=0.0).to(dtype)
                        grad_P -= (2.0 * az)[:, None] * v[None, :]
                    if tile == 0:
                        az2 += az * z
                        where = (at * B + item) * N + columns
                        az = in_memory(2.0 * az, TILE)
                        if grad_x_ptr is not None:
                            tl.store(grad_x_ptr + where, narrow(az, grad_x_ptr), mask=mask_n)
                        if grad_loc_ptr is not None:
                            if SHARED_LOC:
                                grad_loc -= az
                            else:
                                tl.store(grad_loc_ptr + where, narrow(-az, grad_loc_ptr), mask=mask_n)
            if tile == 0:
                az2_sum += az2.to(tl.float64)
                if grad_loc_ptr is not None and SHARED_LOC:
                    tl.store(grad_loc_ptr + (own * B + item) * N + columns, narrow(grad_loc, grad_loc_ptr), mask=mask_n)
                az2_tile = az2
            if NEED_P:
                store_result(grad_P_item, narrow(grad_P, grad_P_at[0]), tile, n, N, R, TILE)
        if NEED_PI:
            if heaviest_ptr is not None:
                own_n = ordered(offs_n, TILE)
                found = heaviest_ptr + item * (1 + 2 * R)
                pi = without_heaviest(pi, d_inv, own_n, (own_n < N) & (chunk == 0), found, 2 * R)
            if EACH_D:
                grad_d = narrow(in_memory(b * pi - az2_tile, TILE), grad_d_ptr)
                tl.store(grad_d_ptr + (own * B + item) * N + columns, grad_d, mask=mask_n)
    if grad_d_ptr is not None and ONE_D:
        tl.store(grad_d_ptr + (own * B + item) * SPLITS + pid_s, -tl.sum(az2_sum, 0))


class Samples(NamedTuple):
    """What the gradients of q depend on, for S samples; a = ∂loss/∂q."""

    a: Tensor  # [S, B]
    r: Tensor  # [S, B, N], before the last step of v
    v: Tensor  # [S, B, R]
    step: Tensor  # [S, B, R], the last of v
    one_mean: bool = False  # whether they share one


class Gradients(NamedTuple):
    """What the kernel fills, none where it is not needed: partial sums over `chunks` of the samples."""

    x: Tensor | None  # [S, B, N]
    loc: Tensor | None  # [S, B, N], or [chunks, B, N] where the samples share one
    P: Tensor | None  # [chunks, B, N, R]
    d: Tensor | None  # [chunks, B, N]; where d is one value per item it only says that −Σ az² is wanted
    heaviest: Tensor | None = None  # [B, 1 + 2R], the pixels whose π is left out


def gradients(
    samples: Samples | None,
    b: Tensor,
    P: Tensor,
    d: Tensor,
    inverses: tuple[Tensor, Tensor],
    wide: Tensor | None,
    grads: Gradients,
    kind: str,
    chunks: int = 1,
) -> Tensor:
    """Fills `grads`, b [B] being ∂loss/∂log|Σ|, with C⁻¹ and L⁻¹; −Σ az² [B] where d is one value per item.

    With `wide` [B] only the items that products of that kind are for.
    """
    B, N, R = P.shape
    S = 0 if samples is None else samples.r.shape[0]
    block_r = launch.padded_rank(R) if launch.fused_rank(P.device) >= R else launch.TILED_R
    by_column, one_d = P.stride(1) == 1, d.shape[1] == 1
    if kind == "float64":
        block = WIDE_BLOCK
    elif block_r < R:
        block = launch.tiled_block(TILED_BLOCKS, by_column, P.device)
    else:
        sparing = S != 1 or P.element_size() <= 2
        name, table = ("backward_sparing", SPARING_BLOCKS) if sparing else ("backward", BLOCKS)
        block = launch.block(name, table, block_r, by_column, P.device)
    columns = launch.split_columns(N, R, block.columns)
    splits = max(1, launch.ceil_div(N, columns))
    sums = P.new_zeros(chunks, B, splits, dtype=torch.float64)
    vectors = [d] if samples is None else [samples.r, d]
    launch.launch(
        backward_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        a_at=None if samples is None else launch.at(samples.a.T),
        b_at=launch.at(b),
        r_at=None if samples is None else launch.samples_at(samples.r),
        P_at=launch.at(P.mT),
        d_at=launch.at(d),
        inverses=inverses,
        v_ptr=None if samples is None else samples.v,
        step_ptr=None if samples is None else samples.step,
        marks=(None if wide is None else wide.view(torch.uint8), grads.heaviest),
        grad_x_ptr=grads.x,
        grad_loc_ptr=grads.loc,
        grad_P_at=None if grads.P is None else launch.at(grads.P.permute(1, 0, 3, 2)),
        grad_d_ptr=sums if grads.d is not None and one_d else grads.d,
        sizes=(S, B, N),
        cut=(splits, columns, chunks),
        R=R,
        ONE_D=one_d,
        SAMPLES="one" if S == 1 else "share" if samples is not None and samples.one_mean else "own",
        KIND=kind,
        TILE=launch.placed(block, block_r, P, P if grads.P is None else grads.P[0], vectors),
    )
    return sums.sum((0, 2))


__all__ = ["Gradients", "Samples", "gradients"]
