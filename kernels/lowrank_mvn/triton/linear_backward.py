# Triton's tuples are concatenated, and grow:
# mypy: disable-error-code="assignment, misc"
r"""The backward pass of a linear factor: read F, write its gradient, and grad_x and grad_d on the way.

With a = ∂loss/∂q [S, B], b = ∂loss/∂log|Σ| [B], and the residual r that `linear_residual` stored before the last step
of v, whose share in u is `step`:

    z = D⁻¹(r − F̃ᵀ step)          grad_x = 2az
    one d:        grad_F = A F̃ − 2 Σ a u zᵀ                        A = 2b/d Σ_c M_c, made beforehand
    per pixel:    grad_F = Σ_c 2b M_c F̃D_c⁻¹ − 2 Σ a u zᵀ           grad_d = bπ − Σₛ az²,  πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

F̃z, from which the gradients of W and m follow, the forward pass has left behind. F̃ᵀA and F̃ᵀM_c are products of a tile
of F, which stays in the registers where tensor cores read it (`tiles`), and a K × K matrix, in three tf32 products of
high and low parts; 1/d scales the rows of F̃ᵀM_c afterwards, so that a tile is split once for all channels. Operations
for a pixel: 2K² with one d, 2CK² with a d per pixel, each three times over, beside 4K for each of S·C columns in
float32. A's parts stay in shared memory, or registers; those of M_c are made for every tile.

WIDE is for the items that needed float64 for C: every product in it, and each of the two kernels leaves the other's
items alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, linear_common, tiles
from .common import Block, aligned, divisor, narrow, split
from .linear_common import both, columns_per_program, one_value
from .linear_tile import channel, tile_of, times
from .tiles import operand_rows, places, rows_of, store_result

# By padded number of features. On sm_90 groups of four warps with 64 columns each multiply straight from shared memory;
# two of them share what is loaded for a tile: step, u and a row of A.
BLOCKS = {
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
PIXEL_BLOCKS = {
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
MAX_WRITTEN = 4  # channels


@triton.jit
def linear_backward_kernel(
    a_ptr,  # [B, S]
    b_ptr,  # [B]
    r_ptr,  # [S, B, C, M]
    F_ptr,  # [B, K, M]
    d_ptr,  # [B, C, M], or [B, 1, 1] if SCALAR_D
    A_ptr,  # [B, GROUPS, TILES · BLOCK_K + 1, LD] (`placed`): A if SCALAR_D, else M_c
    step_ptr,  # [B, S, C, LD] (`placed`)
    u_ptr,  # [B, S, C, LD] (`placed`): −2au
    wide_ptr,  # [B]
    grad_x_ptr,  # [S, B, C, M]
    grad_F_ptr,  # [B, K, M]
    grad_d_ptr,  # [B, C, M], or [B, SPLITS] of −Σ az² if SCALAR_D
    S,
    B,
    M,
    SPLITS,
    COLUMNS,
    stride_fb,
    stride_fk,
    stride_fn,
    stride_db,
    stride_dc,
    stride_dn,
    stride_gb,
    stride_gk,
    stride_gn,
    K: tl.constexpr,
    C: tl.constexpr,
    LD: tl.constexpr,
    WRITTEN: tl.constexpr,  # whether the loop over channels is written out
    NEED_X: tl.constexpr,
    NEED_F: tl.constexpr,
    NEED_D: tl.constexpr,
    SCALAR_D: tl.constexpr,
    WIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    KEPT: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BY_ROW: tl.constexpr,
    LIKE_F: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    item = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if (tl.load(wide_ptr + item) != 0) != WIDE:
            return
    M, stride_fb, stride_fk = aligned((M, stride_fb, stride_fk), ALIGN)
    stride_gb, stride_gk = aligned((stride_gb, stride_gk), ALIGN)
    if not SCALAR_D:
        stride_db, stride_dc = aligned((stride_db, stride_dc), ALIGN)
    if BY_ROW:
        stride_fb, stride_fn, stride_gb, stride_gn = aligned((stride_fb, stride_fn, stride_gb, stride_gn), ROW_ALIGN)
    if LIKE_F:  # the offsets of one are those of the other
        stride_gb = stride_fb
        stride_gk = stride_fk
        stride_gn = stride_fn
    GROUPS: tl.constexpr = 1 if SCALAR_D else C
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    F_ptr += item * stride_fb
    grad_F_ptr += item * stride_gb
    HALF: tl.constexpr = max(16, BLOCK_K // 2)
    MATRIX: tl.constexpr = (TILES * BLOCK_K + 1) * LD
    A_ptr += item * GROUPS * MATRIX
    step_ptr += item * S * C * LD
    u_ptr += item * S * C * LD
    offs_k = tl.arange(0, BLOCK_K)
    rows, columns = places(BY_COLUMN, J, W, BLOCK_K, BLOCK_N, BY_ROW)
    b = tl.load(b_ptr + item).to(kind)
    kept = ()
    if KEPT:
        half_ptr = A_ptr + tl.arange(0, HALF)[:, None] + offs_k[None, :] * LD
        kept = split(tl.load(half_ptr))
        if BLOCK_K > 16:
            kept = kept + split(tl.load(half_ptr + HALF))
    az2_sum = tl.zeros((BLOCK_N,), tl.float64)
    vectors = (a_ptr + item * S, r_ptr, step_ptr, u_ptr, grad_x_ptr)
    d_ptr += item * stride_db
    if SCALAR_D:
        diagonal = (1.0 / tl.load(d_ptr).to(kind), stride_dc, stride_dn, grad_d_ptr, b)
    else:
        diagonal = (d_ptr, stride_dc, stride_dn, grad_d_ptr + item * C * M, b)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, M), BLOCK_N):
        features = (F_ptr, n, M, stride_fk, stride_fn, rows, columns)
        for tile in tl.static_range(TILES):
            F_tile = tile_of(features, tile, K, NARROW)
            if SCALAR_D and NEED_F:
                grad_F = times(
                    A_ptr, kept, F_tile, features, tile, K, LD, KEPT, SPLIT_TF32, TILES, NARROW,
                    BY_COLUMN, BY_ROW, BLOCK_N, BLOCK_K, kind,
                )[0]  # fmt: skip
            else:
                grad_F = tl.zeros((BLOCK_N, BLOCK_K), kind)
            az2 = tl.zeros((BLOCK_N,), kind)
            for c in tl.static_range(C if WRITTEN else 0):
                grad_F, az2 = channel(
                    grad_F, az2, c, item, A_ptr, vectors, diagonal, F_tile, features, tile, S, B, K, C, LD,
                    NEED_X, NEED_F, NEED_D, SCALAR_D, SPLIT_TF32, TILES, NARROW, BY_COLUMN, BY_ROW,
                )  # fmt: skip
            for c in range(0 if WRITTEN else C):
                grad_F, az2 = channel(
                    grad_F, az2, c, item, A_ptr, vectors, diagonal, F_tile, features, tile, S, B, K, C, LD,
                    NEED_X, NEED_F, NEED_D, SCALAR_D, SPLIT_TF32, TILES, NARROW, BY_COLUMN, BY_ROW,
                )  # fmt: skip
            if SCALAR_D and tile == 0:
                az2_sum += az2.to(tl.float64)
            if NEED_F:
                grad_F = narrow(grad_F, grad_F_ptr)
                store_result(grad_F_ptr, grad_F, tile, n, M, stride_gk, stride_gn, K, NARROW, BY_COLUMN, J, W, BY_ROW)
    out = item * SPLITS + pid_s
    if SCALAR_D:
        tl.store(grad_d_ptr + out, -tl.sum(az2_sum, 0))


def gradients(
    a: Tensor,
    b: Tensor,
    r: Tensor,
    F: Tensor,
    d: Tensor,
    small: tuple[Tensor, Tensor, Tensor],
    wide: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    splits: int,
    columns: int,
    kind: str,
    flagged: bool,
) -> None:
    """Fills what there is of `grads` of x, F and d (−Σ az² [B, SPLITS], if d is one value).

    `small` is A [B, C or 1, K+1, …], step and −2au [B, S, C, …], all `placed` and of the
    kind of the products.
    """
    A, step, u = small
    (S, B, C, M), K = r.shape, F.shape[1]
    grad_x, grad_F, grad_d = grads
    G = grad_F if grad_F is not None else F
    is_wide, scalar_d = kind == "float64", one_value(d)
    block_k = _block_k(F)
    block = WIDE_BLOCK if is_wide else _block(F, scalar_d)
    count = common.ceil_div(K, block_k)
    common.launch(
        linear_backward_kernel,
        (B * splits,),
        block.num_warps,
        block.num_stages,
        a_ptr=a,
        b_ptr=b,
        r_ptr=r,
        F_ptr=F,
        d_ptr=d,
        A_ptr=A,
        step_ptr=step,
        u_ptr=u,
        wide_ptr=wide.view(torch.uint8),
        grad_x_ptr=grad_x if grad_x is not None else r,
        grad_F_ptr=G,
        grad_d_ptr=grad_d if grad_d is not None else d,
        S=S,
        B=B,
        M=M,
        SPLITS=splits,
        COLUMNS=columns,
        stride_fb=F.stride(0),
        stride_fk=F.stride(1),
        stride_fn=F.stride(2),
        stride_db=d.stride(0),
        stride_dc=d.stride(1),
        stride_dn=d.stride(2),
        stride_gb=G.stride(0),
        stride_gk=G.stride(1),
        stride_gn=G.stride(2),
        K=K,
        C=C,
        LD=A.shape[-1],
        WRITTEN=scalar_d and C <= MAX_WRITTEN,
        NEED_X=grad_x is not None,
        NEED_F=grad_F is not None,
        NEED_D=grad_d is not None,
        SCALAR_D=scalar_d,
        WIDE=is_wide,
        FLAGGED=flagged,
        SPLIT_TF32=kind == "tf32",
        KEPT=grad_F is not None and scalar_d and kind == "tf32" and count == 1,
        TILES=count,
        ALIGN=min(common.alignment(F.mT, r, d), common.alignment(G.mT, r)),
        NARROW=common.narrow_offsets(F.mT, block.columns) and common.narrow_offsets(G.mT, block.columns),
        ROW_ALIGN=divisor(F.stride(0), F.stride(2), G.stride(0), G.stride(2)),
        LIKE_F=G.stride() == F.stride(),
        BLOCK_K=block_k,
        BLOCK_N=block.columns,
        BY_ROW=_by_row(F),
        **_shape(block, F),
    )


def placed(t: Tensor, F: Tensor, matrix: bool = False) -> Tensor:
    """The last dimension of `t`, K features and the row of ones, as the kernel reads it: as many features as tiles
    have, in the order of a result's columns, then the value for the ones and three zeros. A symmetric `matrix` has rows
    in that order, each in the order of an operand's columns, and what meets the row of ones as its last row."""
    K, size, by_row = F.shape[1], common.ceil_div(F.shape[1], _block_k(F)) * _block_k(F), _by_row(F)
    k = torch.arange(size, device=t.device)
    of_result, of_operand = rows_of.fn(k, by_row), operand_rows.fn(k, by_row)
    whole = torch.nn.functional.pad(t[..., :K], (0, size - K))
    vectors = torch.cat([whole[..., of_result], t[..., K:], t.new_zeros(*t.shape[:-1], 3)], -1)
    if not matrix:
        return vectors
    square = torch.nn.functional.pad(whole[..., :K, :], (0, 0, 0, size - K))[..., of_result, :][..., of_operand]
    return torch.cat([torch.nn.functional.pad(square, (0, 4)), vectors[..., K:, :]], -2)


def _by_row(F: Tensor) -> bool:
    """Whether a lane takes four neighbouring features at once."""
    return F.stride(1) == 1 and F.stride(2) != 1 and F.stride(2) % 4 == 0 and F.stride(0) % 4 == 0


def _shape(block: Block, F: Tensor) -> dict:
    """As `tiles.shape`, but a warp's rows in one piece, where tiles are no wider than a group of four warps."""
    found = tiles.shape(block, by_column=F.stride(2) == 1)
    if found["J"] == 4 and block.columns < 32 * block.num_warps:
        found |= {"J": 2, "W": min(block.num_warps, block.columns // 16)}
    return found


def _block_k(F: Tensor) -> int:
    K = F.shape[1]
    return common.padded_rank(K) if common.fused_rank(F.device) >= K else common.TILED_R


def _block(F: Tensor, scalar_d: bool) -> Block:
    if scalar_d:
        return linear_common.block("linear_backward", BLOCKS, _block_k(F), F)
    return linear_common.block("linear_backward_pixel", PIXEL_BLOCKS, _block_k(F), F)


def splits(F: Tensor, d: Tensor) -> tuple[int, int]:
    """Programs for one item, and the columns of each, the same with products of any kind."""
    B, K, M = F.shape
    columns = columns_per_program(M, B, 32 * K, _block(F, one_value(d)).columns)
    return max(1, common.ceil_div(M, columns)), columns


__all__ = ["gradients", "placed", "splits"]
