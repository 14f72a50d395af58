# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
r"""The backward pass of a linear factor: read F, write its gradient, and grad_x, grad_d and F̃z on the way.

With a = ∂loss/∂q [S, B], b = ∂loss/∂log|Σ| [B], and the residual r that `linear_residual` stored before the last step
of v, whose share in u is `step`:

    z = D⁻¹(r − F̃ᵀ step)          grad_x = 2az                    F̃z, from which the gradients of W and m follow
    one d:        grad_F = A F̃ − 2 Σ a u zᵀ                        A = 2b/d Σ_c M_c, made beforehand
    per pixel:    grad_F = Σ_c 2b M_c F̃D_c⁻¹ − 2 Σ a u zᵀ           grad_d = bπ − Σₛ az²,  πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

F̃ᵀA and F̃ᵀM_c are products of a tile of F, which stays in the registers where tensor cores read it (`tiles`), and a
K × K matrix, in three tf32 products of high and low parts; 1/d scales the rows of F̃ᵀM_c afterwards, so that a tile is
split once for all channels. Operations for a pixel: 2K² with one d, 2CK² with a d per pixel, each three times over,
beside 6K for each of S·C columns in float32. A's parts stay in shared memory; those of M_c are made for every tile.

WIDE is for the items that needed float64 for C: every product in it, and each of the two kernels leaves the other's
items alone. F̃z is added up on the way if S·C ≤ MAX_RIDERS; beyond, `linear_residual` makes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, linear_common, tiles
from .common import Block, aligned, narrow, split
from .linear_common import MAX_RIDERS, both, columns_per_program, one_value
from .linear_tile import curvature, folded, precision, score, tile_of, times
from .tiles import places, result, rows_of, store_result

# With one d, A is kept in registers; where a group of four warps does not multiply straight from shared memory (before
# sm_90) or into memory of its own (sm_100), they last for a narrower tile, or for one that more warps share.
BLOCKS = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(4, 64), 128: Block(8, 32)}),
    (64, False): Block(4, 32),
    (64, False, "gfx"): Block(4, 64),
    (64, True, "sm_75"): Block(8, 32),
    (64, False, "sm_75"): Block(8, 32),
    (64, True, "sm_80"): Block(4, 32),
    (64, False, "sm_80"): Block(4, 32),
    (64, True, "sm_100"): Block(4, 32),
    (64, False, "sm_100"): Block(4, 16),
}
# M_c of each channel is loaded for every tile, and needs registers that the columns of a wider tile would have.
PIXEL_BLOCKS = {
    **both({16: Block(1, 64), 32: Block(1, 32), 64: Block(4, 32), 128: Block(8, 32)}),
    (64, True, "sm_75"): Block(8, 32),
    (64, False, "sm_75"): Block(8, 32),
    (64, True, "sm_80"): Block(4, 16),
    (64, False, "sm_80"): Block(4, 16),
    (64, True, "sm_100"): Block(4, 16),
    (64, False, "sm_100"): Block(4, 16),
}
WIDE_BLOCK = Block(4, 16)


@triton.jit
def linear_backward_kernel(
    a_ptr,  # [B, S]
    b_ptr,  # [B]
    r_ptr,  # [S, B, C, M]
    F_ptr,  # [B, K, M]
    d_ptr,  # [B, C, M], or [B, 1, 1] if SCALAR_D
    A_ptr,  # [B, GROUPS, K+1, LD] (`placed`): A if SCALAR_D, else M_c
    step_ptr,  # [B, S, C, LD] (`placed`)
    u_ptr,  # [B, S, C, LD] (`placed`): −2au
    wide_ptr,  # [B]
    grad_x_ptr,  # [S, B, C, M]
    grad_F_ptr,  # [B, K, M]
    grad_d_ptr,  # [B, C, M], or [B, SPLITS] of −Σ az² if SCALAR_D
    zF_ptr,  # [B, SPLITS, S, C, K+1], written if RIDERS
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
    RIDERS: tl.constexpr,  # S, if each of the S·C columns has sums in registers, else 0
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
    BY_COLUMN: tl.constexpr,
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
    if LIKE_F:  # the offsets of one are those of the other
        stride_gb = stride_fb
        stride_gk = stride_fk
        stride_gn = stride_fn
    KT: tl.constexpr = K + 1
    GROUPS: tl.constexpr = 1 if SCALAR_D else C
    kind: tl.constexpr = tl.float64 if WIDE else tl.float32
    F_ptr += item * stride_fb
    grad_F_ptr += item * stride_gb
    A_ptr += item * GROUPS * KT * LD
    step_ptr += item * S * C * LD
    u_ptr += item * S * C * LD
    offs_k = tl.arange(0, BLOCK_K)
    rows, columns = places(BY_COLUMN, J, W, BLOCK_K, BLOCK_N)
    b = tl.load(b_ptr + item).to(kind)
    if SCALAR_D:
        d_inv_one = 1.0 / tl.load(d_ptr + item * stride_db).to(kind)
    kept_A = ()
    if KEPT and NEED_F:
        whole = tl.load(A_ptr + offs_k[:, None] * LD + offs_k[None, :], mask=(offs_k < K)[:, None], other=0.0)
        high, low = split(whole)
        kept_A = (whole, high, low)
    zF = ()
    z_ones = ()
    for each in tl.static_range(RIDERS * C):  # noqa: B007
        z_ones = z_ones + (tl.zeros((BLOCK_N,), kind),)
    for each in tl.static_range(RIDERS * C * TILES):  # noqa: B007
        zF = zF + (tl.zeros((W, 8, BLOCK_K), kind),)
    az2_sum = tl.zeros((BLOCK_N,), tl.float64)
    vectors = (a_ptr + item * S, r_ptr, step_ptr, grad_x_ptr)
    diagonal = (d_ptr + item * stride_db, stride_dc, stride_dn)
    if not SCALAR_D:
        grad_d_ptr += item * C * M
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, M), BLOCK_N):
        features = (F_ptr, n, M, stride_fk, stride_fn, rows, columns)
        none = tl.zeros((BLOCK_N,), kind)
        added = ()
        added_ones = ()
        for tile in tl.static_range(TILES):
            offs_t = tile * BLOCK_K + offs_k
            F_tile = tile_of(features, tile, K, NARROW)
            F = result(F_tile).to(kind)
            # Columns that ride come first: their sums need F, what they add to grad_F only z.
            az2 = none
            scores = ()
            squares = ()
            for c in tl.static_range(C if RIDERS > 0 else 0):
                d_inv = d_inv_one if SCALAR_D else precision(diagonal, c, F, features, BY_COLUMN)
                if not SCALAR_D:
                    az2 = none
                for s in tl.static_range(RIDERS):
                    z, az2 = score(
                        s, c, item, az2, vectors, d_inv, F, features, B, K, C, LD,
                        NEED_X and tile == 0, TILES, NARROW, BY_COLUMN,
                    )  # fmt: skip
                    added = added + (zF[(tile * C + c) * RIDERS + s] + folded(F * z[:, None], W),)
                    if tile == 0:
                        added_ones = added_ones + (z_ones[c * RIDERS + s] + z,)
                    scores = scores + (z,)
                squares = squares + (az2,)
            if SCALAR_D and NEED_F:
                grad_F = times(
                    A_ptr, kept_A, F_tile, features, tile, K, LD, KEPT, SPLIT_TF32, TILES, NARROW, BY_COLUMN,
                    BLOCK_N, BLOCK_K, kind,
                )[0]  # fmt: skip
            else:
                grad_F = tl.zeros((BLOCK_N, BLOCK_K), kind)
            for j in tl.static_range(RIDERS * C if NEED_F else 0):  # of sample j % S
                u = tl.load(u_ptr + (j % RIDERS * C + j // RIDERS) * LD + offs_t)
                grad_F += scores[j][:, None] * u[None, :]
            if RIDERS == 0 or not SCALAR_D:
                for c in range(C):
                    d_inv = d_inv_one if SCALAR_D else precision(diagonal, c, F, features, BY_COLUMN)
                    if not SCALAR_D:
                        az2 = none
                    if RIDERS > 0:
                        for i in tl.static_range(C):
                            az2 = tl.where(c == i, squares[i], az2)
                    else:
                        for s in range(S):
                            z, az2 = score(
                                s, c, item, az2, vectors, d_inv, F, features, B, K, C, LD,
                                NEED_X and tile == 0, TILES, NARROW, BY_COLUMN,
                            )  # fmt: skip
                            grad_F += z[:, None] * tl.load(u_ptr + (s * C + c) * LD + offs_t)[None, :]
                    if (NEED_F or NEED_D) and not SCALAR_D:
                        grad_F = curvature(
                            grad_F, az2, c, b, A_ptr, grad_d_ptr, d_inv, F_tile, F, features, tile,
                            K, LD, NEED_D and tile == 0, SPLIT_TF32, TILES, NARROW, BY_COLUMN,
                        )  # fmt: skip
            if SCALAR_D and tile == 0:
                az2_sum += az2.to(tl.float64)
            if NEED_F:
                grad_F = narrow(grad_F, grad_F_ptr)
                store_result(grad_F_ptr, grad_F, tile, n, M, stride_gk, stride_gn, K, NARROW, BY_COLUMN, J, W)
        zF = added
        z_ones = added_ones
    out = item * SPLITS + pid_s
    if SCALAR_D:
        tl.store(grad_d_ptr + out, -tl.sum(az2_sum, 0))
    for c in tl.static_range(C if RIDERS > 0 else 0):
        for s in tl.static_range(RIDERS):
            zF_row = zF_ptr + ((out * RIDERS + s) * C + c) * KT
            tl.store(zF_row + K, tl.sum(z_ones[c * RIDERS + s], 0))
            for tile in tl.static_range(TILES):
                offs_t = tile * BLOCK_K + rows_of(offs_k)
                total = tl.sum(tl.sum(zF[(tile * C + c) * RIDERS + s], 0), 0)
                tl.store(zF_row + offs_t, total, mask=offs_t < K)


def gradients(
    a: Tensor,
    b: Tensor,
    r: Tensor,
    F: Tensor,
    d: Tensor,
    small: tuple[Tensor, Tensor, Tensor],
    wide: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    zF: Tensor,
    columns: int,
    kind: str,
    flagged: bool,
) -> None:
    """Fills what there is of `grads` of x, F and d (−Σ az² [B, SPLITS], if d is one value), and zF if it rides.

    zF is [B, SPLITS, S, C, K+1]; `small` is A [B, C or 1, K+1, …], step and −2au [B, S, C, …], all `placed` and of the
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
        (B * zF.shape[1],),
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
        zF_ptr=zF,
        S=S,
        B=B,
        M=M,
        SPLITS=zF.shape[1],
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
        RIDERS=S if rides(S, C) else 0,
        NEED_X=grad_x is not None,
        NEED_F=grad_F is not None,
        NEED_D=grad_d is not None,
        SCALAR_D=scalar_d,
        WIDE=is_wide,
        FLAGGED=flagged,
        SPLIT_TF32=kind == "tf32",
        # Without tensor cores a product needs whole columns of A in a thread: registers that keeping A would take.
        KEPT=scalar_d and kind == "tf32" and count == 1,
        TILES=count,
        ALIGN=min(common.alignment(F.mT, r, d), common.alignment(G.mT, r)),
        NARROW=common.narrow_offsets(F.mT, block.columns) and common.narrow_offsets(G.mT, block.columns),
        LIKE_F=G.stride() == F.stride(),
        BLOCK_K=block_k,
        BLOCK_N=block.columns,
        **_shape(block, F),
    )


def placed(t: Tensor, F: Tensor) -> Tensor:
    """The last dimension of `t`, K features and the row of ones, as the kernel reads it: as many features as tiles
    have, in the order of a result's columns, then the value for the ones and three zeros."""
    K, block_k = F.shape[1], _block_k(F)
    m = torch.arange(common.ceil_div(K, block_k) * block_k, device=t.device)
    features = torch.nn.functional.pad(t[..., :K], (0, len(m) - K))[..., rows_of.fn(m)]
    return torch.cat([features, t[..., K:], t.new_zeros(*t.shape[:-1], 3)], -1)


def rides(S: int, C: int) -> bool:
    """Whether F̃z of every column is added up on the way."""
    return 0 < S * C <= MAX_RIDERS


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
    columns = columns_per_program(M, B, 20 * K, _block(F, one_value(d)).columns)
    return max(1, common.ceil_div(M, columns)), columns


__all__ = ["gradients", "placed", "rides", "splits"]
