r"""Pass 1: C − I = PᵀD⁻¹P, w = PᵀD⁻¹δ and log|D|, from one read of P.

One program adds up one split of the columns n of one item (and, for R > 128, one pair of tiles of R); nothing is
atomic, so that results repeat bit for bit. With Q = D^(−1/2)P it sums QQᵀ (`add_gram`); only the lower triangle is
stored. How w is made is the choice PROJECTION:

    "none"        not at all: there is no x, or there are several samples
    "stacked"     x and loc stand in two rows that the padding of R leaves free, copied like rows of P, where P is
                  [B, R, N] in memory; w is the difference of two rows of the same product. What rounding costs there,
                  2⁻²² of |loc|/|δ|, pass 2 takes back: it makes the residual in float64 and corrects v by it, whatever
                  v was.
    "augmented"   δ stands in a free row, with few rows and P as [B, N, R]
    "beside"      w is summed beside the product

log|D| is a sum of exponents, exact, and the logarithm of a product of mantissas in float64. In "float64" every product
is: for float64 inputs, or to make an item again whose flag says so, on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import add_gram, add_logs, gram_of, no_logs, sum_of_logs
from ....device.tiles import Tile, fold, from_column, load_row, load_tile, multiple, of_item, scaled, tile_offsets

# By padded rank, and whether neighbouring columns of P are neighbours in memory. A single warp multiplies every column
# of its tile with itself, so that neither operand goes through another warp. With two stages the tile is copied to
# shared memory by the memory system, and both operands are read and split from there: one write and two reads of it,
# without bank conflicts as long as nothing but the operands reads it ("stacked", or no w). From 64 rows on four warps
# are a tensor-core group of sm_90, which wants columns that are neighbours in shared memory; writing them there from
# [B, N, R] costs four times the clocks, and two warps are faster.
BLOCKS: Table = {
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
WIDE_ALONE = Block(num_warps=8, columns=16)  # without w, where four warps spill on sm_90


@triton.jit
def _load_stacked(x, loc, P, offs_r, n, N, R: tl.constexpr, TILE: tl.constexpr):
    """As `load_tile`, with x in row R and loc in row R + 1."""
    offs_n = n + tl.arange(0, TILE.COLUMNS)
    tile = from_column(P, n) + tile_offsets(P, offs_r, TILE)
    x_row = (x[0] + offs_n.to(tl.int64) * x[1])[None, :]
    loc_row = (loc[0] + offs_n.to(tl.int64) * loc[1])[None, :]
    tile = tl.where((offs_r == R)[:, None], x_row, tl.where((offs_r == R + 1)[:, None], loc_row, tile))
    return tl.load(tile, mask=(offs_r < R + 2)[:, None] & (offs_n < N)[None, :], other=0.0)


@triton.jit
def _mixed(P, mix_ptr, pid, scale, n, N, R: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr):
    """Tile `pid` of the rows AQ, with A lower triangular [R, R] and Q = P·scale, in float64."""
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    local = tl.arange(0, BLOCK_R)
    offs_i = pid * BLOCK_R + local
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float64)
    for tile in range(pid + 1):
        offs_k = tile * BLOCK_R + local
        Q = scaled(load_tile(P, offs_k, n, N, R, TILE), scale[None, :], n, N, tl.float64, KIND)
        mask = (offs_i < R)[:, None] & (offs_k < R)[None, :]
        A = tl.load(mix_ptr + offs_i[:, None] * R + offs_k[None, :], mask=mask, other=0.0)
        if KIND == "outer":
            total += tl.sum(A[:, :, None] * Q[None, :, :], 1)
        else:
            total += tl.dot(A, Q, out_dtype=tl.float64)
    return total


@triton.jit
def capacitance_kernel(
    x_at,  # [B, N], unless PROJECTION is "none"
    loc_at,  # [B, N], likewise
    P_at,  # [B, R, N]
    d_at,  # [B, N], or [B, 1] if ONE_D; the diagonal of D⁻¹ if INVERTED
    gram_ptr,  # [B, SPLITS, R, R]
    w_ptr,  # [B, SPLITS, R], unless PROJECTION is "none"
    logdet_ptr,  # [B, SPLITS], unless ONE_D or INVERTED
    flag_ptr,  # [B], or none for all items
    mix_ptr,  # [B, R, R], lower triangular, that columns of P are multiplied by, or none; in float64 only
    N,
    cut,  # programs for an item, columns for each
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    INVERTED: tl.constexpr,
    KIND: tl.constexpr,
    PROJECTION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ pₙpₙᵀ/dₙ (its lower triangle), Σ pₙδₙ/dₙ and Σ log dₙ over one split of the columns n of an item."""
    # One loop, and longer than a function should be: a tile of P in registers serves every sum.
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    WIDE: tl.constexpr = KIND == "float64" or KIND == "outer"
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    # Sums of w within a thread: over neighbouring columns where it holds some, over distant ones where it does not.
    NEAR: tl.constexpr = 4 if TILE.ALIGN >= 4 and not WIDE else 1
    FAR: tl.constexpr = 4 if TILE.ALIGN == 1 and not WIDE and BLOCK_N >= 16 else 1
    SPLITS, length = cut
    pid = tl.program_id(0)
    pid_i = tl.program_id(1) // TILES
    pid_j = tl.program_id(1) % TILES
    if pid_j > pid_i:
        return
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    if flag_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    N = multiple(N, TILE.VECTORS)
    P_item = of_item(P_at, b, TILE.ALIGN)
    d_item = of_item(d_at, b, 1 if ONE_D else TILE.VECTORS)
    if PROJECTION != "none":
        x_item = of_item(x_at, b, TILE.VECTORS)
        loc_item = of_item(loc_at, b, TILE.VECTORS)
    offs_i = pid_i * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = pid_j * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_R), dtype), tl.zeros((BLOCK_R, BLOCK_R), dtype)
    w = tl.zeros((BLOCK_R, BLOCK_N // (NEAR * FAR)), dtype)
    logs = no_logs(BLOCK_N)
    if ONE_D:
        # One value in every column, loaded as such: Triton moves the conversion to the layout of an operand above
        # elementwise operations only as far as a load.
        d = tl.load(d_item[0] + tl.zeros((BLOCK_N,), tl.int32)).to(dtype)
    start = pid_s * length
    for n in range(start, min(start + length, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if PROJECTION == "stacked":
            P = _load_stacked(x_item, loc_item, P_item, offs_i, n, N, R, TILE).to(dtype)
        else:
            P = load_tile(P_item, offs_i, n, N, R, TILE).to(dtype)
        if not ONE_D:
            d = load_row(d_item, columns, mask_n, 1.0).to(dtype)
            if not INVERTED:
                logs = add_logs(logs, d)
        if WIDE:  # noqa: SIM108
            scale = tl.sqrt(d) if INVERTED else 1.0 / tl.sqrt(d)
        else:  # fast instructions: an error of 2⁻²² of C, the same for C and w
            scale = tl.sqrt(d) if INVERTED else tl.rsqrt(d)
        if PROJECTION == "augmented" or PROJECTION == "beside":
            delta = load_row(x_item, columns, mask_n).to(dtype) - load_row(loc_item, columns, mask_n).to(dtype)
        if PROJECTION == "augmented":
            P = tl.where((offs_i == R)[:, None], delta[None, :], P)
        if mix_ptr is not None:
            Q = _mixed(P_item, mix_ptr + b * R * R, pid_i, scale, n, N, R, KIND, TILE)
        else:
            Q = scaled(P, scale[None, :], n, N, dtype, KIND)
        if PROJECTION == "beside":
            w += fold(fold(Q * (delta * scale)[None, :], FAR, True), NEAR)
        if TILES > 1 and mix_ptr is not None:
            Q_j = _mixed(P_item, mix_ptr + b * R * R, pid_j, scale, n, N, R, KIND, TILE)
        elif TILES > 1:
            Q_j = scaled(load_tile(P_item, offs_j, n, N, R, TILE), scale[None, :], n, N, dtype, KIND)
        else:
            Q_j = Q
        sums = add_gram(sums, Q, Q_j, KIND, TILES == 1)
    gram = gram_of(sums, KIND, TILES == 1)
    out = b * SPLITS + pid_s
    mask = (offs_i < R)[:, None] & (offs_j < R)[None, :] & (offs_j[None, :] <= offs_i[:, None])
    tl.store(gram_ptr + out * R * R + offs_i[:, None] * R + offs_j[None, :], gram, mask=mask)
    if pid_j == 0:
        if PROJECTION == "stacked":
            sign = (offs_i == R).to(tl.float32) - (offs_i == R + 1).to(tl.float32)
            tl.store(w_ptr + out * R + offs_j, tl.sum(gram * sign[:, None], 0), mask=offs_j < R)
        elif PROJECTION == "augmented":
            w_row = (offs_i == R)[:, None] & (offs_j < R)[None, :]
            tl.store(w_ptr + out * R + offs_i[:, None] * 0 + offs_j[None, :], gram, mask=w_row)
        elif PROJECTION == "beside":
            tl.store(w_ptr + out * R + offs_i, tl.sum(w, 1), mask=offs_i < R)
        if pid_i == 0 and not ONE_D and not INVERTED:
            tl.store(logdet_ptr + out, sum_of_logs(logs, WIDE))


Parts = tuple[Tensor, Tensor | None, Tensor]  # PᵀD⁻¹P [B, SPLITS, R, R], w [B, SPLITS, R] and log|D| [B, SPLITS]


def partial_sums(
    vectors: tuple[Tensor, Tensor] | None,
    P: Tensor,
    d: Tensor,
    kind: str,
    inverted: bool = False,
    flags: Tensor | None = None,
    mix: Tensor | None = None,
) -> Parts:
    """Partial sums over the splits; `vectors` are x and loc [B, N], without which w is not made.

    With `flags` only the items whose flag is set are made. In float64 with `mix` [B, R, R], which is lower triangular,
    rows pₙ of P are mix·pₙ.
    """
    B, N, R = P.shape
    wide, by_column = kind == "float64", P.stride(1) == 1
    block_r = launch.padded_rank(R)
    if wide:
        block_r = min(block_r, WIDE_ROWS)
    elif R > launch.FUSED_R:
        block_r = launch.TILED_R
    if wide:
        block = WIDE_BLOCK if vectors else WIDE_ALONE
    else:
        block = launch.block("capacitance", BLOCKS, block_r, by_column, P.device)
    columns = launch.split_columns(N, R, block.columns)
    splits = max(1, launch.ceil_div(N, columns))
    work = torch.float64 if wide else torch.float32
    gram = P.new_empty(B, splits, R, R, dtype=work)
    w = None if vectors is None else P.new_empty(B, splits, R, dtype=work)
    logdet = P.new_empty(B, splits, dtype=torch.float64)
    read = (*(vectors or ()), d)
    if vectors is None:
        projection = "none"
    elif by_column and kind == "tf32" and block_r >= R + 2 and all(t.dtype == P.dtype for t in vectors):
        projection = "stacked"
    else:
        projection = "augmented" if not wide and block_r == 16 and R < 16 and not by_column else "beside"
    launch.launch(
        capacitance_kernel,
        (B * splits, launch.ceil_div(R, block_r) ** 2),
        block.num_warps,
        block.num_stages if projection in ("stacked", "none") else 1,
        x_at=None if vectors is None else launch.at(vectors[0]),
        loc_at=None if vectors is None else launch.at(vectors[1]),
        P_at=launch.at(P.mT),
        d_at=launch.at(d),
        gram_ptr=gram,
        w_ptr=w,
        logdet_ptr=logdet,
        flag_ptr=flags,
        mix_ptr=mix,
        N=N,
        cut=(splits, columns),
        R=R,
        ONE_D=d.shape[1] == 1,
        INVERTED=inverted,
        KIND=launch.of_matrices(kind, P.device),
        PROJECTION=projection,
        TILE=Tile(
            ROWS=block_r,
            COLUMNS=block.columns,
            ALIGN=launch.alignment(P, *read),
            VECTORS=launch.vector_alignment(N, *read),
            NARROW=launch.narrow_offsets(P, block.columns),
        ),
    )
    return gram, w, logdet


__all__ = ["partial_sums"]
