"""What `linear_backward` does with one tile of F: the products with A or M_c, and what one column adds to the gradient.

A tile lies in registers as `tiles` has it, so that it is the left operand of F̃ᵀA as it is; results are [columns,
features]. What has a value for each feature (A's columns, step, u) is stored in the order of a result's columns, with
the value for the row of ones after them. A is symmetric: of its rows, in that order, those of an operand's columns are
neighbours, as tensor cores want them (`linear_backward.placed`).

`features` is F's pointer, the tile's first pixel, M, the strides of features and pixels, and the places of a tile's
values. A pixel's features are one tile up to FUSED_R of them; beyond, a function that needs all of them loads tile
after tile.
"""

import triton
import triton.language as tl

from .common import narrow, split
from .tiles import halves, in_memory, load_placed, operand, operand_rows, ordered, product, result


@triton.jit
def tile_of(features, tile, K: tl.constexpr, NARROW: tl.constexpr):
    """Tile number `tile` of the features of these pixels, in F's own dtype."""
    F_ptr, n, M, stride_fk, stride_fn, rows, columns = features
    rows += tile * 4 * rows.shape[0] * rows.shape[1]
    return load_placed(F_ptr, rows, columns, n, M, stride_fk, stride_fn, K, NARROW)


@triton.jit
def _in_order(a, features, BY_COLUMN: tl.constexpr):
    """Values of the pixels as they are loaded, in the order of a result's rows."""
    return ordered(a, BY_COLUMN, features[6].shape[3], features[6].shape[4])


@triton.jit
def _back(a, features, BY_COLUMN: tl.constexpr):
    """The inverse of `_in_order`."""
    return in_memory(a, BY_COLUMN, features[6].shape[3], features[6].shape[4])


@triton.jit
def times(
    A_ptr,
    kept,  # if KEPT, for products in tf32: high and low parts of A's two halves of rows, or of A if BLOCK_K is 16
    F_tile,
    features,
    tile,
    K: tl.constexpr,
    LD: tl.constexpr,
    KEPT: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BY_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
):
    """Columns `tile` of F̃ᵀA, and the part of A that meets the row of ones; F_tile is that tile of F."""
    offs_t = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    T = tl.zeros((BLOCK_N, BLOCK_K), KIND)
    if KIND == tl.float64:  # noqa: SIM300  (not a constant before it is compiled)
        F_ptr, n, M, stride_fk, stride_fn, _, _ = features
        offs_n = n + tl.arange(0, BLOCK_N)
        for k in range(TILES * BLOCK_K):
            A_k = tl.load(A_ptr + offs_t * LD + k)
            row = operand_rows(k, BY_ROW)
            F_row = F_ptr + tl.full((), 1, tl.int64) * row * stride_fk
            inside = (offs_n < M) & (row < K)
            F_k = tl.load(F_row + offs_n.to(tl.int64) * stride_fn, mask=inside, other=0.0).to(tl.float64)
            T += _in_order(F_k, features, BY_COLUMN)[:, None] * A_k[None, :]
    elif KEPT and BLOCK_K == 16:
        T = product(operand(F_tile), kept[0], kept[1], None, True)
    elif KEPT:  # in two halves of the features: the parts of one are in registers, not those of both
        first, second = halves(F_tile)
        T = product(operand(first), kept[0], kept[1], None, True)
        T = product(operand(second), kept[2], kept[3], None, True, T)
    else:
        for other in range(TILES):
            offs_o = other * BLOCK_K + tl.arange(0, BLOCK_K)
            A_t = tl.load(A_ptr + offs_o[:, None] + offs_t[None, :] * LD)
            high, low = split(A_t)
            F_o = tile_of(features, other, K, NARROW) if TILES > 1 else F_tile
            T += product(operand(F_o), high, low, A_t, SPLIT_TF32)
    constant = tl.load(A_ptr + TILES * BLOCK_K * LD + offs_t)
    return T + constant[None, :], constant


@triton.jit
def _score(
    s,
    c,
    item,
    az2,
    vectors,  # pointers to a, r, step, −2au and grad_x
    d_inv,
    F,  # the tile [columns, features], if there is only one
    features,
    B,
    K: tl.constexpr,
    C: tl.constexpr,
    LD: tl.constexpr,
    NEED_X: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    """z = D⁻¹(r − F̃ᵀ step) of one column, and az2 + az²; with NEED_X writes grad_x."""
    a_ptr, r_ptr, step_ptr, _, grad_x_ptr = vectors
    BLOCK_K: tl.constexpr = F.shape[1]
    offs_n = features[1] + tl.arange(0, F.shape[0])
    mask_n = offs_n < features[2]
    row = ((tl.full((), 1, tl.int64) * s * B + item) * C + c) * features[2]
    step_ptr += (s * C + c) * LD
    r = _in_order(tl.load(r_ptr + row + offs_n, mask=mask_n, other=0.0).to(F.dtype), features, BY_COLUMN)
    r -= tl.load(step_ptr + TILES * BLOCK_K)
    for tile in tl.static_range(TILES):
        F_t = result(tile_of(features, tile, K, NARROW)).to(F.dtype) if TILES > 1 else F
        r -= tl.sum(F_t * tl.load(step_ptr + tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :], 1)
    z = tl.where(_in_order(mask_n, features, BY_COLUMN), r * d_inv, 0.0)
    az = tl.load(a_ptr + s).to(F.dtype) * z
    if NEED_X:
        tl.store(grad_x_ptr + row + offs_n, narrow(_back(2.0 * az, features, BY_COLUMN), grad_x_ptr), mask=mask_n)
    return z, az2 + az * z


@triton.jit
def _curvature(
    grad_F,
    b,
    A_ptr,  # M_c
    d_inv,
    F_tile,
    F,
    features,
    tile,
    K: tl.constexpr,
    LD: tl.constexpr,
    NEED_D: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """grad_F + 2b D_c⁻¹F̃ᵀM_c and, with NEED_D, π of channel c."""
    BLOCK_N: tl.constexpr = F.shape[0]
    BLOCK_K: tl.constexpr = F.shape[1]
    T, constant = times(
        A_ptr, (), F_tile, features, tile, K, LD, False, SPLIT_TF32, TILES, NARROW, BY_COLUMN, BY_ROW,
        BLOCK_N, BLOCK_K, F.dtype,
    )  # fmt: skip
    pi = d_inv
    if NEED_D:
        if TILES > 1:  # f̃ᵀM_cf̃ of all tiles, less the corner of M_c
            form = tl.zeros((BLOCK_N,), F.dtype)
            for other in range(TILES):
                F_o = tile_of(features, other, K, NARROW)
                T_o, constant_o = times(
                    A_ptr, (), F_o, features, other, K, LD, False, SPLIT_TF32, TILES, NARROW, BY_COLUMN, BY_ROW,
                    BLOCK_N, BLOCK_K, F.dtype,
                )  # fmt: skip
                form += tl.sum((T_o + constant_o[None, :]) * result(F_o).to(F.dtype), 1)
        else:
            form = tl.sum((T + constant[None, :]) * F, 1)
        pi -= (form + tl.load(A_ptr + TILES * BLOCK_K * (LD + 1))) * d_inv * d_inv
    return grad_F + T * (2.0 * b * d_inv)[:, None], pi


@triton.jit
def channel(
    grad_F,
    az2,
    c,
    item,
    A_ptr,  # M_0
    vectors,  # as `_score` has it
    diagonal,  # d's pointer, or 1/d if SCALAR_D, the strides of channels and pixels, grad_d's pointer, and b
    F_tile,
    features,
    tile,
    S,
    B,
    K: tl.constexpr,
    C: tl.constexpr,
    LD: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_F: tl.constexpr,
    NEED_D: tl.constexpr,
    SCALAR_D: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """What channel c adds to a tile of grad_F, and Σₛ az² (of all channels if SCALAR_D); the first tile of a pixel
    writes grad_x, and grad_d where there is one for each pixel."""
    BLOCK_K: tl.constexpr = grad_F.shape[1]
    d, stride_dc, stride_dn, grad_d_ptr, b = diagonal
    F = result(F_tile).to(grad_F.dtype)
    offs_n = features[1] + tl.arange(0, F.shape[0])
    mask_n = offs_n < features[2]
    if SCALAR_D:
        d_inv = d
    else:
        where = tl.full((), 1, tl.int64) * c * stride_dc + offs_n.to(tl.int64) * stride_dn
        d_inv = 1.0 / _in_order(tl.load(d + where, mask=mask_n, other=1.0).to(F.dtype), features, BY_COLUMN)
        az2 = tl.zeros((F.shape[0],), F.dtype)
        if NEED_F or NEED_D:
            A_ptr += tl.full((), 1, tl.int64) * c * ((TILES * BLOCK_K + 1) * LD)
            grad_F, pi = _curvature(
                grad_F, b, A_ptr, d_inv, F_tile, F, features, tile, K, LD, NEED_D and tile == 0,
                SPLIT_TF32, TILES, NARROW, BY_COLUMN, BY_ROW,
            )  # fmt: skip
    for s in range(S):
        z, az2 = _score(
            s, c, item, az2, vectors, d_inv, F, features, B, K, C, LD, NEED_X and tile == 0, TILES, NARROW, BY_COLUMN
        )
        if NEED_F:
            u = tl.load(vectors[3] + (s * C + c) * LD + tile * BLOCK_K + tl.arange(0, BLOCK_K))
            grad_F += z[:, None] * u[None, :]
    if NEED_D and tile == 0 and not SCALAR_D:
        grad_d = narrow(_back(b * pi - az2, features, BY_COLUMN), grad_d_ptr)
        tl.store(grad_d_ptr + tl.full((), 1, tl.int64) * c * features[2] + offs_n, grad_d, mask=mask_n)
    return grad_F, az2


__all__ = ["channel", "tile_of", "times"]
