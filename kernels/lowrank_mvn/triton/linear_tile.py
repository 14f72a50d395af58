"""What `linear_backward` does with one tile of F: the products with A or M_c, and what one column adds to the gradient.

A tile lies in registers as `tiles` has it, so that it is the left operand of F̃ᵀA as it is; results are [columns,
features]. What has a value for each feature (A's columns, step, u) is stored in the order of a result's columns, with
the value for the row of ones after them (`linear_backward.placed`). `features` is F's pointer, the tile's first pixel,
M, the strides of features and pixels, and the places of a tile's values. A pixel's features are one tile up to FUSED_R
of them; beyond, a function that needs all of them loads tile after tile.
"""

import triton
import triton.language as tl

from .common import narrow, split
from .tiles import in_memory, load_placed, operand, ordered, product, result


@triton.jit
def tile_of(features, tile, K: tl.constexpr, NARROW: tl.constexpr):
    """Tile number `tile` of the features of these pixels, in F's own dtype."""
    F_ptr, n, M, stride_fk, stride_fn, rows, columns = features
    rows += tile * 8 * rows.shape[0]
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
def folded(a, W: tl.constexpr):
    """Sums over the pixels that one lane has, [columns, features] -> [W, 8, features]."""
    a = tl.reshape(a, (a.shape[0] // (16 * W), W, 2, 8, a.shape[1]))
    return tl.sum(tl.sum(a, 2), 0)


@triton.jit
def times(
    A_ptr,
    kept,  # A, its high and its low part, if KEPT
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
):
    """Columns `tile` of F̃ᵀA, and the row of A that meets the row of ones; F_tile is that tile of F."""
    offs_t = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    T = tl.zeros((BLOCK_N, BLOCK_K), KIND)
    if KIND == tl.float64:  # noqa: SIM300  (not a constant before it is compiled)
        F_ptr, n, M, stride_fk, stride_fn, _, _ = features
        offs_n = n + tl.arange(0, BLOCK_N)
        for k in range(K):
            A_k = tl.load(A_ptr + k * LD + offs_t)
            row = F_ptr + tl.full((), 1, tl.int64) * k * stride_fk
            F_k = tl.load(row + offs_n.to(tl.int64) * stride_fn, mask=offs_n < M, other=0.0).to(tl.float64)
            T += _in_order(F_k, features, BY_COLUMN)[:, None] * A_k[None, :]
    elif KEPT:
        T = product(operand(F_tile), kept[1], kept[2], kept[0], SPLIT_TF32)
    else:
        for other in range(TILES):
            offs_o = other * BLOCK_K + tl.arange(0, BLOCK_K)
            A_t = tl.load(A_ptr + offs_o[:, None] * LD + offs_t[None, :], mask=(offs_o < K)[:, None], other=0.0)
            high, low = split(A_t)
            F_o = tile_of(features, other, K, NARROW) if TILES > 1 else F_tile
            T += product(operand(F_o), high, low, A_t, SPLIT_TF32)
    constant = tl.load(A_ptr + K * LD + offs_t)
    return T + constant[None, :], constant


@triton.jit
def score(
    s,
    c,
    item,
    az2,
    vectors,  # pointers to a, r, step and grad_x
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
    a_ptr, r_ptr, step_ptr, grad_x_ptr = vectors
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
def precision(diagonal, c, F, features, BY_COLUMN: tl.constexpr):
    """1/d of a tile's pixels in channel c."""
    d_ptr, stride_dc, stride_dn = diagonal
    offs_n = features[1] + tl.arange(0, F.shape[0])
    where = tl.full((), 1, tl.int64) * c * stride_dc + offs_n.to(tl.int64) * stride_dn
    d = tl.load(d_ptr + where, mask=offs_n < features[2], other=1.0).to(F.dtype)
    return 1.0 / _in_order(d, features, BY_COLUMN)


@triton.jit
def curvature(
    grad_F,
    az2,
    c,
    b,
    A_ptr,
    grad_d_ptr,  # of the item
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
):
    """grad_F + 2b D_c⁻¹F̃ᵀM_c; with NEED_D writes grad_d of channel c."""
    BLOCK_N: tl.constexpr = F.shape[0]
    BLOCK_K: tl.constexpr = F.shape[1]
    A_ptr += tl.full((), 1, tl.int64) * c * (K + 1) * LD
    T, constant = times(
        A_ptr, (), F_tile, features, tile, K, LD, False, SPLIT_TF32, TILES, NARROW, BY_COLUMN, BLOCK_N, BLOCK_K, F.dtype
    )
    if NEED_D:
        if TILES > 1:  # f̃ᵀM_cf̃ of all tiles, less the corner of M_c
            form = tl.zeros((BLOCK_N,), F.dtype)
            for other in range(TILES):
                F_o = tile_of(features, other, K, NARROW)
                T_o, constant_o = times(
                    A_ptr, (), F_o, features, other, K, LD, False, SPLIT_TF32, TILES, NARROW, BY_COLUMN,
                    BLOCK_N, BLOCK_K, F.dtype,
                )  # fmt: skip
                form += tl.sum((T_o + constant_o[None, :]) * result(F_o).to(F.dtype), 1)
        else:
            form = tl.sum((T + constant[None, :]) * F, 1)
        pi = d_inv - (form + tl.load(A_ptr + K * LD + TILES * BLOCK_K)) * d_inv * d_inv
        offs_n = features[1] + tl.arange(0, BLOCK_N)
        where = tl.full((), 1, tl.int64) * c * features[2] + offs_n
        grad_d = _back(b * pi - az2, features, BY_COLUMN)
        tl.store(grad_d_ptr + where, narrow(grad_d, grad_d_ptr), mask=offs_n < features[2])
    return grad_F + T * (2.0 * b * d_inv)[:, None]


__all__ = ["curvature", "folded", "precision", "score", "tile_of", "times"]
