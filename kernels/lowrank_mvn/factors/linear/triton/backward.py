# Triton's tuples are concatenated, and grow:
# mypy: disable-error-code="assignment, misc"
r"""The backward pass of a linear factor: read F, write its gradient, and grad_x and grad_d on the way.

With a = ∂loss/∂q [S, B], b = ∂loss/∂log|Σ| [B], and the residual r that `linear_residual` stored before the last step
of v, whose share in u is `step`:

    z = D⁻¹(r − F̃ᵀ step)          grad_x = 2az
    one d:        grad_F = A F̃ − 2 Σ a u zᵀ                        A = 2b/d Σ_c M_c, made beforehand
    per pixel:    grad_F = Σ_c 2b M_c F̃D_c⁻¹ − 2 Σ a u zᵀ           grad_d = bπ − Σₛ az²,  πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

F̃z, from which the gradients of W and m follow, the forward pass has left behind. F̃ᵀA and F̃ᵀM_c are products of a tile
of F, which stays in the registers where tensor cores read it (`device.tiles`), and a K × K matrix, in three tf32
products of high and low parts; 1/d scales the rows of F̃ᵀM_c afterwards, so that a tile is split once for all channels.
Operations for a pixel: 2K² with one d, 2K² for each channel with a d per pixel, each three times over, beside 4K in
float32 for each channel of each sample. A's parts stay in shared memory, or registers; those of M_c are made for every
tile. Items that needed float64 for C get every product in it, and each of the two kernels leaves the other's items
alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import narrow, split
from ....device.tiles import Placed, multiple, of_item, operand_rows, places, rows_of, store_result
from ..forms import one_d
from .columns import block as block_of
from .columns import both, columns_per_program
from .tile import channel, tile_of, times

# By padded number of features. On sm_90 groups of four warps with 64 columns each multiply straight from shared memory;
# two of them share what is loaded for a tile: step, u and a row of A.
BLOCKS: Table = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(8, 128), 128: Block(8, 32)}),
    (64, True, "sm_75"): Block(8, 16),
    (64, False, "sm_75"): Block(8, 32),
    (64, True, "sm_80"): Block(4, 64),
    (64, False, "sm_80"): Block(4, 32),
    (64, True, "sm_100"): Block(4, 64),
    (64, False, "sm_100"): Block(4, 64),
    (64, True, "gfx"): Block(4, 64),
    (64, False, "gfx"): Block(4, 64),
}
# With a d per pixel, parts of M_c of each channel are made for every tile, and need registers elsewhere.
PIXEL_BLOCKS: Table = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(4, 64), 128: Block(8, 16)}),
    (32, True): Block(2, 32),
    (64, True, "sm_75"): Block(8, 16),
    (64, False, "sm_75"): Block(8, 16),
    (64, True, "sm_80"): Block(8, 32),
    (64, False, "sm_80"): Block(4, 32),
    (64, True, "sm_100"): Block(4, 32),
    (64, False, "sm_100"): Block(4, 32),
}
WIDE_BLOCK = Block(8, 16)
WRITTEN = tl.constexpr(4)  # channels up to which the loop over them is written out, if there is one d


@triton.jit
def _item(ptr, at, item, TILE: tl.constexpr):
    """An item, from `ptr` on, of what is laid out as `at` says; as `of_item`, also where rows are neighbours."""
    if TILE.BY_ROW:
        return ptr + item * multiple(at[1], TILE.ROW_ALIGN), at[2], multiple(at[3], TILE.ROW_ALIGN)
    else:
        return of_item((ptr, at[1], at[2], at[3]), item, TILE.ALIGN)


@triton.jit
def linear_backward_kernel(
    a_ptr,  # [B, S], or none if there are no samples
    b_ptr,  # [B]
    r_ptr,  # [S, B, channels, pixels]; as step and u, read if there are samples
    F_at,  # [B, K, pixels]
    d_at,  # [B, channels, pixels], or [B, 1, 1] if ONE_D
    A_ptr,  # [B, 1, rows + 1, LD] (`placed`): A if ONE_D; else M_c, for each channel
    step_ptr,  # [B, S, channels, LD] (`placed`)
    u_ptr,  # [B, S, channels, LD] (`placed`): −2au
    marks,  # [B], items that products of KIND are for, none: all; [B, 1 + ROOM], where pixels of large h go, or none
    grad_x_ptr,  # [S, B, channels, pixels]; as the others, none where it is not needed
    grad_F_at,  # [B, K, pixels]
    grad_d_ptr,  # [B, channels, pixels], or [B, SPLITS] of −Σ az² if ONE_D
    sizes,  # S, B, pixels
    cut,  # programs for an item, pixels for each
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    ONE_D: tl.constexpr,
    ROOM: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """z = D⁻¹(r − F̃ᵀ step): 2az, AF̃ − 2 Σ a u zᵀ (or Σ_c 2b M_cF̃D_c⁻¹ − …) and bπ − Σₛ az² of a split of the pixels."""
    # One loop, and longer than a function should be: a tile of F in registers serves every gradient.
    BLOCK_K: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LD: tl.constexpr = TILES * BLOCK_K + 4
    NEED_F: tl.constexpr = grad_F_at is not None
    WIDE: tl.constexpr = KIND == "float64"
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    S, B, pixels = sizes
    SPLITS, length = cut
    pid = tl.program_id(0)
    item = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    wide_ptr, heaviest_ptr = marks
    if wide_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if (tl.load(wide_ptr + item) != 0) != WIDE:
            return
    pixels = multiple(pixels, TILE.ALIGN)
    F_item = _item(F_at[0], F_at, item, TILE)
    if NEED_F:
        # If LIKE, the offsets of one are those of the other.
        grad_F_item = _item(grad_F_at[0], F_at if TILE.LIKE else grad_F_at, item, TILE)
    d_item = of_item(d_at, item, 1 if ONE_D else TILE.ALIGN)
    A_ptr += item * (1 if ONE_D else CHANNELS) * ((TILES * BLOCK_K + 1) * LD)
    vectors = None
    if a_ptr is not None:
        columns_at = item * S * CHANNELS * LD
        vectors = (a_ptr + item * S, r_ptr, step_ptr + columns_at, u_ptr + columns_at, grad_x_ptr)
    rows, columns = places(TILE)
    b = tl.load(b_ptr + item).to(dtype)
    kept = None
    if NEED_F and ONE_D and KIND == "tf32" and TILES == 1:
        HALF: tl.constexpr = BLOCK_K // 2 if BLOCK_K > 16 else 16
        half_ptr = A_ptr + tl.arange(0, HALF)[:, None] + tl.arange(0, BLOCK_K)[None, :] * LD
        kept = split(tl.load(half_ptr))
        if BLOCK_K > 16:
            kept = kept + split(tl.load(half_ptr + HALF))
    az2_sum = tl.zeros((BLOCK_N,), tl.float64)
    if ONE_D:
        diagonal = (1.0 / tl.load(d_item[0]).to(dtype), grad_d_ptr, b, None)
    elif grad_d_ptr is None:
        diagonal = (d_item, None, b, None)
    else:
        diagonal = (d_item, grad_d_ptr + item * CHANNELS * pixels, b, heaviest_ptr + item * (1 + ROOM))
    start = pid_s * length
    for n in range(start, min(start + length, pixels), BLOCK_N):
        features = (F_item, n, pixels, rows, columns)
        for tile in tl.static_range(TILES):
            F_tile = tile_of(features, tile, K, TILE)
            if ONE_D and NEED_F:
                grad_F = times(A_ptr, kept, F_tile, features, tile, K, KIND, TILE)[0]
            else:
                grad_F = tl.zeros((BLOCK_N, BLOCK_K), dtype)
            az2 = tl.zeros((BLOCK_N,), dtype)
            all_sizes = (S, CHANNELS, B, item)
            if ONE_D and CHANNELS <= WRITTEN:
                for c in tl.static_range(CHANNELS):
                    grad_F, az2 = channel(
                        grad_F, az2, c, all_sizes, A_ptr, vectors, diagonal, F_tile, features, tile,
                        K, NEED_F, ONE_D, ROOM, KIND, TILE,
                    )  # fmt: skip
            else:
                for c in range(CHANNELS):
                    grad_F, az2 = channel(
                        grad_F, az2, c, all_sizes, A_ptr, vectors, diagonal, F_tile, features, tile,
                        K, NEED_F, ONE_D, ROOM, KIND, TILE,
                    )  # fmt: skip
            if ONE_D and tile == 0:
                az2_sum += az2.to(tl.float64)
            if NEED_F:
                store_result(grad_F_item, narrow(grad_F, grad_F_at[0]), tile, n, pixels, K, TILE)
    if ONE_D and grad_d_ptr is not None:
        tl.store(grad_d_ptr + item * SPLITS + pid_s, -tl.sum(az2_sum, 0))


class Samples(NamedTuple):
    """What the gradients of q depend on, for S samples; a = ∂loss/∂q."""

    a: Tensor  # [B, S]
    r: Tensor  # [S, B, channels, pixels]
    step: Tensor  # [B, S, channels, K+1]
    minus_2au: Tensor  # [B, S, channels, K+1]


class Gradients(NamedTuple):
    """What the kernel fills, none where it is not needed."""

    x: Tensor | None  # [S, B, channels, pixels]
    F: Tensor | None  # [B, K, pixels]
    d: Tensor | None  # [B, channels, pixels]; where d is one value per item it only says that −Σ az² is wanted
    heaviest: Tensor | None  # [B, 1 + ROOM], where d is not one value per item: the pixels whose π is left out


def gradients(
    samples: Samples | None,
    b: Tensor,
    F: Tensor,
    d: Tensor,
    A: Tensor,
    channels: int,
    wide: Tensor,
    grads: Gradients,
    kind: str,
) -> Tensor:
    """Fills `grads`, b [B] being ∂loss/∂log|Σ| and A [B, 1 or channels, K+1, K+1] in float64; −Σ az² [B] if d is one
    value per item. Products are of that kind, or in float64 for the items that `wide` [B] says."""
    (B, K, pixels), one = F.shape, one_d(d)
    block_k = _block_k(F)
    usual = _block(F, one)
    columns = columns_per_program(pixels, B, 32 * K, usual.columns)  # the same with products of any kind
    splits = max(1, launch.ceil_div(pixels, columns))
    sums = F.new_zeros(B, splits, dtype=torch.float64)
    made, vectors, small = F if grads.F is None else grads.F, [d], [placed(A, F, matrix=True)]
    if samples is not None:
        vectors.append(samples.r)
        small += placed(samples.step, F), placed(samples.minus_2au, F)
    for products in dict.fromkeys((kind, "float64")):
        block = WIDE_BLOCK if products == "float64" else usual
        A, *of_samples = (t if products == "float64" else t.float() for t in small)
        step, minus_2au = of_samples or (None, None)
        launch.launch(
            linear_backward_kernel,
            (B * splits,),
            block.num_warps,
            block.num_stages,
            a_ptr=None if samples is None else samples.a,
            b_ptr=b,
            r_ptr=None if samples is None else samples.r,
            F_at=launch.at(F),
            d_at=launch.at(d[:, 0] if one else d),
            A_ptr=A,
            step_ptr=step,
            u_ptr=minus_2au,
            marks=(None if kind == "float64" else wide.view(torch.uint8), grads.heaviest),
            grad_x_ptr=grads.x,
            grad_F_at=None if grads.F is None else launch.at(grads.F),
            grad_d_ptr=sums if grads.d is not None and one else grads.d,
            sizes=(0 if samples is None else samples.r.shape[0], B, pixels),
            cut=(splits, columns),
            K=K,
            CHANNELS=channels,
            ONE_D=one,
            ROOM=0 if grads.heaviest is None else grads.heaviest.shape[1] - 1,
            KIND=products,
            TILE=_tile(block, block_k, F, made, vectors),
        )
    return sums.sum(1)


def placed(t: Tensor, F: Tensor, matrix: bool = False) -> Tensor:
    """The last dimension of `t`, K features and the row of ones, as the kernel reads it: as many features as tiles
    have, in the order of a result's columns, then the value for the ones and three zeros. A symmetric `matrix` has rows
    in that order, each in the order of an operand's columns, and what meets the row of ones as its last row."""
    K, size, by_row = F.shape[1], launch.ceil_div(F.shape[1], _block_k(F)) * _block_k(F), _by_row(F)
    k = torch.arange(size, device=t.device)
    of_result, of_operand = rows_of.fn(k, by_row), operand_rows.fn(k, by_row)
    whole = nn.functional.pad(t[..., :K], (0, size - K))
    vectors = torch.cat([whole[..., of_result], t[..., K:], t.new_zeros(*t.shape[:-1], 3)], -1)
    if not matrix:
        return vectors
    square = nn.functional.pad(whole[..., :K, :], (0, 0, 0, size - K))[..., of_result, :][..., of_operand]
    return torch.cat([nn.functional.pad(square, (0, 4)), vectors[..., K:, :]], -2)


def _by_row(F: Tensor) -> bool:
    """Whether a lane takes four neighbouring features at once."""
    return F.stride(1) == 1 and F.stride(2) != 1 and F.stride(2) % 4 == 0 and F.stride(0) % 4 == 0


def _tile(block: Block, block_k: int, F: Tensor, made: Tensor, vectors: Sequence[Tensor]) -> Placed:
    """A warp's rows are in one piece, where tiles are no wider than a group of four warps."""
    strides = (t.stride(i) for t in (F, made) for i in (0, 2))
    tile = launch.placed(block, block_k, F.mT, made.mT, vectors)
    tile = tile._replace(BY_ROW=_by_row(F), ROW_ALIGN=launch.divisor(*strides))
    if tile.J == 4 and block.columns < 32 * block.num_warps:
        return tile._replace(J=2, WARPS=min(block.num_warps, block.columns // 16))
    return tile


def _block_k(F: Tensor) -> int:
    K = F.shape[1]
    return launch.padded_rank(K) if launch.fused_rank(F.device) >= K else launch.TILED_R


def _block(F: Tensor, one: bool) -> Block:
    if one:
        return block_of("linear_backward", BLOCKS, _block_k(F), F)
    return block_of("linear_backward_pixel", PIXEL_BLOCKS, _block_k(F), F)


__all__ = ["Gradients", "Samples", "gradients"]
