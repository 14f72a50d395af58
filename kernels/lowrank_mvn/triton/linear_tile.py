"""What `linear_backward` does with one tile of F: the products with A or M_c, and what one column adds to the gradient.

A pixel's features are one tile up to FUSED_R of them. Beyond, a function that needs all of them loads tile after tile.
`features` is F's pointer, the first pixel of the tile, M and the strides of features and pixels.
"""

import triton
import triton.language as tl

from .common import load_tile, narrow, split


@triton.jit
def tile_of(features, offs, K: tl.constexpr, NARROW: tl.constexpr, BLOCK_N: tl.constexpr, KIND: tl.constexpr):
    """F[offs, n : n + BLOCK_N] of `features` = (pointer, n, M, strides)."""
    F_ptr, n, M, stride_fk, stride_fn = features
    return load_tile(F_ptr, offs, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N).to(KIND)


@triton.jit
def _product(A_high, A_low, A, F, SPLIT_TF32: tl.constexpr):
    """AF of float32 tiles."""
    if SPLIT_TF32:
        high, low = split(F)
        T = tl.dot(A_high, low, input_precision="tf32")
        T = tl.dot(A_low, high, T, input_precision="tf32")
        return tl.dot(A_high, high, T, input_precision="tf32")
    else:
        return tl.dot(A, F, input_precision="ieee")


@triton.jit
def rows(
    A_ptr,
    kept,  # A, its high and its low part, if KEPT
    F,
    features,
    offs_t,
    K: tl.constexpr,
    LD: tl.constexpr,
    KEPT: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Rows offs_t of AF̃, and the column of A that meets the row of ones; F is the tile, if there is only one."""
    BLOCK_K: tl.constexpr = F.shape[0]
    BLOCK_N: tl.constexpr = F.shape[1]
    T = tl.zeros((BLOCK_K, BLOCK_N), F.dtype)
    if F.dtype == tl.float64:
        F_ptr, n, M, stride_fk, stride_fn = features
        offs_n = n + tl.arange(0, BLOCK_N)
        for k in range(K):
            A_k = tl.load(A_ptr + k * LD + offs_t, mask=offs_t < K, other=0.0)
            row = F_ptr + tl.full((), 1, tl.int64) * k * stride_fk
            F_k = tl.load(row + offs_n.to(tl.int64) * stride_fn, mask=offs_n < M, other=0.0).to(tl.float64)
            T += A_k[:, None] * F_k[None, :]
    elif KEPT:
        T = _product(kept[1], kept[2], kept[0], F, SPLIT_TF32)
    else:
        for other in range(TILES):
            offs_o = other * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = (offs_t < K)[:, None] & (offs_o < K)[None, :]
            A_t = tl.load(A_ptr + offs_t[:, None] * LD + offs_o[None, :], mask=inside, other=0.0)
            high, low = split(A_t)
            F_o = tile_of(features, offs_o, K, NARROW, BLOCK_N, tl.float32) if TILES > 1 else F
            T += _product(high, low, A_t, F_o, SPLIT_TF32)
    constant = tl.load(A_ptr + K * LD + offs_t, mask=offs_t < K, other=0.0)
    return T + constant[:, None], constant


@triton.jit
def _quadratic(
    A_ptr,
    features,
    F,
    K: tl.constexpr,
    LD: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """f̃ᵀAf̃ of every pixel, less the corner of A, where a pixel's features are several tiles."""
    total = tl.zeros((F.shape[1],), F.dtype)
    for tile in range(TILES):
        offs_t = tile * F.shape[0] + tl.arange(0, F.shape[0])
        F_t = tile_of(features, offs_t, K, NARROW, F.shape[1], F.dtype)
        T, constant = rows(A_ptr, (), F_t, features, offs_t, K, LD, False, SPLIT_TF32, TILES, NARROW)
        total += tl.sum((T + constant[:, None]) * F_t, 0)
    return total


@triton.jit
def _score(
    r_ptr,
    step_ptr,
    step,  # its rows, if KEPT
    d_inv,
    F,
    features,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """z = D⁻¹(r − F̃ᵀ step) of one column."""
    offs_n = features[1] + tl.arange(0, F.shape[1])
    mask_n = offs_n < features[2]
    r = tl.load(r_ptr + offs_n, mask=mask_n, other=0.0).to(F.dtype) - tl.load(step_ptr + K)
    if KEPT:
        r -= tl.sum(F * step[:, None], 0)
    else:
        for tile in range(TILES):
            offs_t = tile * F.shape[0] + tl.arange(0, F.shape[0])
            step_t = tl.load(step_ptr + offs_t, mask=offs_t < K, other=0.0)
            F_t = tile_of(features, offs_t, K, NARROW, F.shape[1], F.dtype) if TILES > 1 else F
            r -= tl.sum(F_t * step_t[:, None], 0)
    return tl.where(mask_n, r * d_inv, 0.0)


@triton.jit
def column(
    grad_F,
    az2,
    s,
    c,
    item,
    vectors,  # pointers to a, r, step, −2au and grad_x
    kept,  # the rows of step and −2au, if KEPT
    d_inv,
    F,
    features,
    offs_t,
    B,
    K: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    NEED_X: tl.constexpr,
    KEPT: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """What a column adds to a tile of grad_F and to az², and its z; FIRST, the first tile of a pixel, writes grad_x."""
    a_ptr, r_ptr, step_ptr, u_ptr, grad_x_ptr = vectors
    offs_n = features[1] + tl.arange(0, F.shape[1])
    row = ((tl.full((), 1, tl.int64) * s * B + item) * C + c) * features[2]
    where = (s * C + c) * (K + 1)
    step = kept[0] if KEPT else None
    z = _score(r_ptr + row, step_ptr + where, step, d_inv, F, features, K, KEPT, TILES, NARROW)
    u = kept[1] if KEPT else tl.load(u_ptr + where + offs_t, mask=offs_t < K, other=0.0)
    az = tl.load(a_ptr + s).to(F.dtype) * z
    if FIRST and NEED_X:
        tl.store(grad_x_ptr + row + offs_n, narrow(2.0 * az, grad_x_ptr), mask=offs_n < features[2])
    return grad_F + u[:, None] * z[None, :], az2 + az * z, z


@triton.jit
def precision(diagonal, c, F, features):
    """1/d of a tile's pixels in channel c."""
    d_ptr, stride_dc, stride_dn = diagonal
    offs_n = features[1] + tl.arange(0, F.shape[1])
    where = tl.full((), 1, tl.int64) * c * stride_dc + offs_n.to(tl.int64) * stride_dn
    return 1.0 / tl.load(d_ptr + where, mask=offs_n < features[2], other=1.0).to(F.dtype)


@triton.jit
def curvature(
    grad_F,
    az2,
    c,
    b,
    A_ptr,
    grad_d_ptr,  # of the item
    d_inv,
    F,
    features,
    offs_t,
    K: tl.constexpr,
    LD: tl.constexpr,
    FIRST: tl.constexpr,
    SPLIT_TF32: tl.constexpr,
    TILES: tl.constexpr,
    NARROW: tl.constexpr,
):
    """grad_F + 2b M_cF̃D_c⁻¹; FIRST writes grad_d of channel c."""
    A_ptr += tl.full((), 1, tl.int64) * c * (K + 1) * LD
    T, constant = rows(A_ptr, (), F, features, offs_t, K, LD, False, SPLIT_TF32, TILES, NARROW)
    if FIRST:
        if TILES > 1:
            form = _quadratic(A_ptr, features, F, K, LD, SPLIT_TF32, TILES, NARROW)
        else:
            form = tl.sum((T + constant[:, None]) * F, 0)
        pi = d_inv - (form + tl.load(A_ptr + K * LD + K)) * d_inv * d_inv
        offs_n = features[1] + tl.arange(0, F.shape[1])
        where = tl.full((), 1, tl.int64) * c * features[2] + offs_n
        tl.store(grad_d_ptr + where, narrow(b * pi - az2, grad_d_ptr), mask=offs_n < features[2])
    return grad_F + T * (2.0 * b * d_inv)[None, :]


__all__ = ["column", "curvature", "precision", "rows", "tile_of"]
