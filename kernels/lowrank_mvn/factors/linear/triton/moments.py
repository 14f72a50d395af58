# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
r"""Pass 1 of a linear factor: the moments G = F̃D⁻¹F̃ᵀ, F̃D⁻¹(x − loc) and log|D|, from one read of F.

With one value of d there is one G for all channels: the kernel adds up F̃F̃ᵀ and F̃(x − loc)ᵀ, and d divides after the
last sum. With a value per pixel each channel has its own, and a program per channel reads the same tile of F, those
after the first from the cache:

    operations for a pixel           G, one d      G_c, d per pixel        from tiles of P_c = W_cF̃
    (symmetric, counted in full)     2K²           2K² for each channel    2RK + 2R² for each channel

At K = 64, R = 25 (padded 32) and three channels the last two are 24.6 and 18.4 thousand, and both are held by the
instructions that scale and split operands, not by the products: G it is, which the gradients of W need in any case.

Half precision with one d is EXACT as a tensor core's operand, so that one product does in place of three. The row of
ones and the rows δ are too thin for a matrix product: they are sums, added up in the threads that hold F. Only the
lower triangle of G is stored, its last row the sums over F and the number of pixels (Σ 1/d). Nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import add_gram, add_logs, gram_of, no_logs, sum_of_logs
from ....device.tiles import converted, fold, load_row, load_tile, multiple, of_item, scaled
from ...dense.triton.capacitance import WIDE_BLOCK, WIDE_ROWS
from ..forms import one_d
from .columns import MAX_RIDERS, both, columns_per_program, nothing
from .columns import block as block_of
from .columns import tile as tile_of

# By padded number of features: one warp multiplies every column of its tile with itself; from 64 rows on four warps are
# one tensor-core group, for which neighbouring features would be turned in shared memory.
BLOCKS: Table = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(4, 32), 128: Block(8, 32)}),
    (64, False): Block(2, 16),
    (64, False, "sm_75"): Block(4, 32),
    (64, False, "sm_80"): Block(4, 32),
    (64, False, "sm_100"): Block(4, 32),
    (64, False, "gfx"): Block(4, 32),
}


@triton.jit
def linear_moments_kernel(
    x_at,  # [B, channels, S, pixels], read if there are RIDERS
    loc_at,  # [B, channels, S, pixels], or none
    F_at,  # [B, K, pixels]
    d_at,  # [B, channels, pixels], not read if ONE_D; the diagonal of D⁻¹ if INVERTED
    moments_ptr,  # [B, SPLITS, GROUPS, K+1, K+1]; times d if ONE_D
    wF_ptr,  # [B, SPLITS, GROUPS, RIDERS, K+1]; times d if ONE_D
    logdet_ptr,  # [B, SPLITS, GROUPS], unless ONE_D or INVERTED
    flag_ptr,  # [B], or none for all items
    pixels,
    cut,  # programs for an item and a group, pixels for each, and GROUPS of channels
    K: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one group
    RIDERS: tl.constexpr,
    ONE_D: tl.constexpr,
    INVERTED: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σ f̃ₙf̃ₙᵀ/dₙ (its lower triangle), Σ f̃ₙ(xₙ − locₙ)/dₙ and Σ log dₙ over one split of the pixels n of an item."""
    # One loop, and longer than a function should be: a tile of F in registers serves every sum.
    BLOCK_K: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    WIDTH: tl.constexpr = TILE.WIDTH
    LAST: tl.constexpr = TILE.LAST
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDE: tl.constexpr = KIND == "float64" or KIND == "outer"
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    SPLITS, length, GROUPS = cut
    pid = tl.program_id(0)
    pid_i = tl.program_id(1) // TILES
    pid_j = tl.program_id(1) % TILES
    if pid_j > pid_i:
        return
    b = (pid // GROUPS // SPLITS).to(tl.int64)
    pid_s = pid // GROUPS % SPLITS
    group = (pid % GROUPS).to(tl.int64)
    if flag_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    pixels = multiple(pixels, TILE.ALIGN)
    F_item = of_item(F_at, b, TILE.ALIGN)
    if RIDERS > 0:
        x_item = of_item(x_at, b, TILE.ALIGN)
        if loc_at is not None:
            loc_item = of_item(loc_at, b, TILE.ALIGN)
    if not ONE_D:
        d_group = of_item(of_item(d_at, b, TILE.ALIGN), group, 1)
    offs_i = pid_i * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_j = pid_j * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K, BLOCK_K), dtype), tl.zeros((BLOCK_K, BLOCK_K), dtype)
    ones = tl.zeros((BLOCK_K, BLOCK_N // WIDTH), dtype)
    corner = tl.zeros((1, BLOCK_N // WIDTH), dtype)
    w = nothing(RIDERS, BLOCK_K, BLOCK_N // WIDTH, dtype)
    w_ones = nothing(RIDERS, 1, BLOCK_N // WIDTH, dtype)
    logs = no_logs(BLOCK_N)
    start = pid_s * length
    for n in range(start, min(start + length, pixels), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < pixels
        columns = offs_n.to(tl.int64)
        F = load_tile(F_item, offs_i, n, pixels, K, TILE)
        if ONE_D:
            Q = converted(F, n, pixels, dtype)
            corner += fold(mask_n.to(dtype)[None, :], WIDTH, LAST)
            ones += fold(Q, WIDTH, LAST)
        else:
            d = load_row(d_group, columns, mask_n, 1.0).to(dtype)
            if not INVERTED:
                logs = add_logs(logs, d)
            if WIDE:  # noqa: SIM108
                scale = tl.sqrt(d) if INVERTED else 1.0 / tl.sqrt(d)
            else:
                scale = tl.sqrt(d) if INVERTED else tl.rsqrt(d)
            Q = scaled(F, scale[None, :], n, pixels, dtype, KIND)
            corner += fold(tl.where(mask_n, scale * scale, 0.0)[None, :], WIDTH, LAST)
            ones += fold(Q * scale[None, :], WIDTH, LAST)
        added = ()
        added_ones = ()
        for j in tl.static_range(RIDERS):
            s = tl.full((), j // CHANNELS, tl.int64)
            c = group + tl.full((), j % CHANNELS, tl.int64)
            delta = load_row(of_item(of_item(x_item, c, 1), s, 1), columns, mask_n).to(dtype)
            if loc_at is not None:
                delta -= load_row(of_item(of_item(loc_item, c, 1), s, 1), columns, mask_n).to(dtype)
            if not ONE_D:
                delta *= scale
            added = added + (w[j] + fold(Q * delta[None, :], WIDTH, LAST),)
            if not ONE_D:
                delta *= scale
            added_ones = added_ones + (w_ones[j] + fold(delta[None, :], WIDTH, LAST),)
        w = added
        w_ones = added_ones
        if TILES > 1:
            F_j = load_tile(F_item, offs_j, n, pixels, K, TILE)
            Q_j = converted(F_j, n, pixels, dtype) if ONE_D else scaled(F_j, scale[None, :], n, pixels, dtype, KIND)
        else:
            Q_j = Q
        sums = add_gram(sums, Q, Q_j, KIND, TILES == 1, EXACT)
    moments = gram_of(sums, KIND, TILES == 1, EXACT)
    out = pid.to(tl.int64)
    KT: tl.constexpr = K + 1
    moments_ptr += out * KT * KT
    mask = (offs_i < K)[:, None] & (offs_j < K)[None, :] & (offs_j[None, :] <= offs_i[:, None])
    tl.store(moments_ptr + offs_i[:, None] * KT + offs_j[None, :], moments, mask=mask)
    if pid_j == 0:
        wF_ptr += out * RIDERS * KT
        tl.store(moments_ptr + K * KT + offs_i, tl.sum(ones, 1), mask=offs_i < K)
        for j in tl.static_range(RIDERS):
            tl.store(wF_ptr + j * KT + offs_i, tl.sum(w[j], 1), mask=offs_i < K)
        if pid_i == 0:
            one = tl.arange(0, 1)
            tl.store(moments_ptr + K * KT + K + one, tl.sum(corner, 1))
            for j in tl.static_range(RIDERS):
                tl.store(wF_ptr + j * KT + K + one, tl.sum(w_ones[j], 1))
            if not ONE_D and not INVERTED:
                tl.store(logdet_ptr + out, sum_of_logs(logs, WIDE))


def rides(S: int, channels: int, d: Tensor) -> int:
    """Columns of x that ride on this pass with each group, 0 if they are too many for it."""
    columns = S * channels if one_d(d) else S
    return columns if columns <= MAX_RIDERS else 0


def sums(
    x: Tensor | None,
    loc: Tensor | None,
    F: Tensor,
    d: Tensor,
    channels: int,
    kind: str,
    inverted: bool = False,
    flags: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """G [B, channels or 1, K+1, K+1], F̃D⁻¹(x − loc) [B, S, channels, K+1] and log|D| [B], float64.

    S = 0 where the columns do not ride along; log|D| is none where d is one value per item. With `flags` only the items
    whose flag is set are made, and the others are not written.
    """
    (B, K, pixels), one, wide = F.shape, one_d(d), kind == "float64"
    groups = 1 if one else channels
    count = 0 if x is None else rides(x.shape[0], channels, d)
    if not count:
        x = loc = None
    block_k = launch.padded_rank(K)
    if wide:
        block_k = min(block_k, WIDE_ROWS)
    elif K > launch.FUSED_R:
        block_k = launch.TILED_R
    block = WIDE_BLOCK if wide else block_of("linear_moments", BLOCKS, block_k, F)
    columns = columns_per_program(pixels, B * groups, 16 * K, block.columns)
    splits = max(1, launch.ceil_div(pixels, columns))
    work = torch.float64 if wide else torch.float32
    moments = F.new_empty(B, splits, groups, K + 1, K + 1, dtype=work)
    wF = F.new_empty(B, splits, groups, count, K + 1, dtype=work)
    logdet = F.new_empty(B, splits, groups, dtype=torch.float64)
    launch.launch(
        linear_moments_kernel,
        (B * splits * groups, launch.ceil_div(K, block_k) ** 2),
        block.num_warps,
        block.num_stages,
        x_at=None if x is None else launch.samples_at(x, by_channel=True),
        loc_at=None if loc is None else launch.samples_at(loc, by_channel=True),
        F_at=launch.at(F),
        d_at=None if one else launch.at(d),
        moments_ptr=moments,
        wF_ptr=wF,
        logdet_ptr=logdet,
        flag_ptr=flags,
        pixels=pixels,
        cut=(splits, columns, groups),
        K=K,
        CHANNELS=channels if one else 1,
        RIDERS=count,
        ONE_D=one,
        INVERTED=inverted,
        KIND=launch.of_matrices(kind, F.device),
        EXACT=one and F.dtype.itemsize == 2,
        TILE=tile_of(F, [t for t in (x, loc, None if one else d) if t is not None], block, block_k),
    )
    lower = moments.sum(1, dtype=torch.float64)
    moments = lower.tril() + lower.tril(-1).mT
    wF = wF.sum(1, dtype=torch.float64)
    if one:
        precision = d.unsqueeze(3).double() if inverted else d.unsqueeze(3).double().reciprocal()
        return moments * precision, (wF * precision)[:, 0].unflatten(1, (count // channels, channels)), None
    return moments, wF.transpose(1, 2), logdet.sum((1, 2))


__all__ = ["rides", "sums"]
