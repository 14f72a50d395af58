"""What `backward` does with one tile of F: the products with A or M_c, and what one column adds to the gradient.

A tile lies in registers as `device.tiles` has it, so that it is the left operand of F̃ᵀA as it is; results are
[columns, features]. What has a value for each feature (A's columns, step, u) is stored in the order of a result's
columns, with the value for the row of ones after them, `LD` values in all. A is symmetric: of its rows, in that order,
those of an operand's columns are neighbours, as tensor cores want them (`backward.placed`).

`features` is (F of the item, first pixel of the tile, pixels, rows, columns), the last two the places of a tile's
values. A pixel's features are one tile up to FUSED_R of them; beyond, a function that needs all of them loads tile
after tile.
"""

import triton
import triton.language as tl

from ....device.heaviest import without_heaviest
from ....device.math import narrow, product, split
from ....device.tiles import halves, in_memory, load_placed, load_row, operand, operand_rows, ordered, result


@triton.jit
def tile_of(features, tile, K: tl.constexpr, TILE: tl.constexpr):
    """Tile number `tile` of the features of these pixels, in F's own dtype."""
    F_item, n, pixels, rows, columns = features
    return load_placed(F_item, rows + tile * TILE.ROWS, columns, n, pixels, K, TILE)


@triton.jit
def times(A_ptr, kept, F_tile, features, tile, K: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr):
    """Columns `tile` of F̃ᵀA, and the part of A that meets the row of ones; F_tile is that tile of F.

    `kept` is none, or for products in tf32 high and low parts of A's two halves of rows, or of A if ROWS is 16.
    """
    BLOCK_K: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LD: tl.constexpr = TILES * BLOCK_K + 4
    offs_t = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    T = tl.zeros((BLOCK_N, BLOCK_K), tl.float64 if KIND == "float64" else tl.float32)
    if KIND == "float64":
        F_item, n, pixels, _, _ = features
        offs_n = n + tl.arange(0, BLOCK_N)
        for k in range(TILES * BLOCK_K):
            A_k = tl.load(A_ptr + offs_t * LD + k)
            row = operand_rows(k, TILE.BY_ROW)
            F_row = (F_item[0] + tl.full((), 1, tl.int64) * row * F_item[1], F_item[2])
            F_k = load_row(F_row, offs_n.to(tl.int64), (offs_n < pixels) & (row < K)).to(tl.float64)
            T += ordered(F_k, TILE)[:, None] * A_k[None, :]
    elif kept is not None and BLOCK_K == 16:
        T = product(operand(F_tile), kept[0], kept[1], None, KIND)
    elif kept is not None:  # in two halves of the features: the parts of one are in registers, not those of both
        first, second = halves(F_tile)
        T = product(operand(first), kept[0], kept[1], None, KIND)
        T = product(operand(second), kept[2], kept[3], None, KIND, T)
    else:
        for other in range(TILES):
            offs_o = other * BLOCK_K + tl.arange(0, BLOCK_K)
            A_t = tl.load(A_ptr + offs_o[:, None] + offs_t[None, :] * LD)
            high, low = split(A_t)
            F_o = tile_of(features, other, K, TILE) if TILES > 1 else F_tile
            T += product(operand(F_o), high, low, A_t, KIND)
    constant = tl.load(A_ptr + TILES * BLOCK_K * LD + offs_t)
    return T + constant[None, :], constant


@triton.jit
def score(
    s,
    c,
    sizes,  # S, channels, B and the item
    vectors,  # pointers to a, r, step, −2au and grad_x
    d_inv,
    F,  # the tile [columns, features], if there is only one
    features,
    FIRST: tl.constexpr,  # whether this is the first tile, which writes grad_x
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """z = D⁻¹(r − F̃ᵀ step) of one column, and az²; writes grad_x where there is one."""
    BLOCK_K: tl.constexpr = TILE.ROWS
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LD: tl.constexpr = TILES * BLOCK_K + 4
    _, channels, B, item = sizes
    a_ptr, r_ptr, step_ptr, _, grad_x_ptr = vectors
    _, n, pixels, _, _ = features
    offs_n = n + tl.arange(0, TILE.COLUMNS)
    mask_n = offs_n < pixels
    row = ((tl.full((), 1, tl.int64) * s * B + item) * channels + c) * pixels
    step_ptr += (s * channels + c) * LD
    r = ordered(tl.load(r_ptr + row + offs_n, mask=mask_n, other=0.0).to(F.dtype), TILE)
    r -= tl.load(step_ptr + TILES * BLOCK_K)
    for tile in tl.static_range(TILES):
        F_t = result(tile_of(features, tile, K, TILE)).to(F.dtype) if TILES > 1 else F
        r -= tl.sum(F_t * tl.load(step_ptr + tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :], 1)
    z = tl.where(ordered(mask_n, TILE), r * d_inv, 0.0)
    az = tl.load(a_ptr + s).to(F.dtype) * z
    if FIRST and grad_x_ptr is not None:
        tl.store(grad_x_ptr + row + offs_n, narrow(in_memory(2.0 * az, TILE), grad_x_ptr), mask=mask_n)
    return z, az * z


@triton.jit
def curvature(
    b,
    M_ptr,  # M_c
    d_inv,
    F_tile,
    features,
    tile,
    NEED_PI: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """2b D_c⁻¹F̃ᵀM_c and, if NEED_PI, π of channel c."""
    BLOCK_K: tl.constexpr = TILE.ROWS
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    LD: tl.constexpr = TILES * BLOCK_K + 4
    T, constant = times(M_ptr, None, F_tile, features, tile, K, KIND, TILE)
    pi = d_inv
    if NEED_PI:
        if TILES > 1:  # f̃ᵀM_cf̃ of all tiles, less the corner of M_c
            form = tl.zeros(d_inv.shape, d_inv.dtype)
            for other in range(TILES):
                F_o = tile_of(features, other, K, TILE)
                T_o, constant_o = times(M_ptr, None, F_o, features, other, K, KIND, TILE)
                form += tl.sum((T_o + constant_o[None, :]) * result(F_o).to(d_inv.dtype), 1)
        else:
            form = tl.sum((T + constant[None, :]) * result(F_tile).to(d_inv.dtype), 1)
        pi -= (form + tl.load(M_ptr + TILES * BLOCK_K * (LD + 1))) * d_inv * d_inv
    return T * (2.0 * b * d_inv)[:, None], pi


@triton.jit
def channel(
    grad_F,
    az2,
    c,
    sizes,  # S, channels, B and the item
    A_ptr,  # M_0
    vectors,  # as `score` has it
    diagonal,  # d of the item, or 1/d if ONE_D; grad_d's pointer for it, or none; b; `device.heaviest`'s list, or none
    F_tile,
    features,
    tile: tl.constexpr,
    K: tl.constexpr,
    NEED_F: tl.constexpr,
    ONE_D: tl.constexpr,
    ROOM: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """What channel c adds to a tile of grad_F, and Σₛ az² (of all channels if ONE_D); the first tile of a pixel writes
    grad_x, and grad_d where there is one for each pixel."""
    BLOCK_K: tl.constexpr = TILE.ROWS
    LD: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K + 4
    S, channels, _, _ = sizes
    d, grad_d_ptr, b, heaviest_ptr = diagonal
    _, n, pixels, _, _ = features
    NEED_PI: tl.constexpr = grad_d_ptr is not None and not ONE_D and tile == 0
    F = result(F_tile).to(grad_F.dtype)
    offs_n = n + tl.arange(0, TILE.COLUMNS)
    mask_n = offs_n < pixels
    at = tl.full((), 1, tl.int64) * c
    if ONE_D:
        d_inv = d
    else:
        d_row = (d[0] + at * d[1], d[2])
        d_inv = 1.0 / ordered(load_row(d_row, offs_n.to(tl.int64), mask_n, 1.0).to(F.dtype), TILE)
        az2 = tl.zeros((F.shape[0],), F.dtype)
        if NEED_F or NEED_PI:
            M_ptr = A_ptr + at * ((LD - 3) * LD)
            added, pi = curvature(b, M_ptr, d_inv, F_tile, features, tile, NEED_PI, K, KIND, TILE)
            grad_F += added
    if vectors is not None:
        for s in range(S):
            z, az2_s = score(s, c, sizes, vectors, d_inv, F, features, tile == 0, K, TILE)
            az2 += az2_s
            if NEED_F:
                u = tl.load(vectors[3] + (s * channels + c) * LD + tile * BLOCK_K + tl.arange(0, BLOCK_K))
                grad_F += z[:, None] * u[None, :]
    if NEED_PI:
        if heaviest_ptr is not None:
            own_n = ordered(offs_n, TILE)
            pi = without_heaviest(pi, d_inv, c * pixels + own_n, own_n < pixels, heaviest_ptr, ROOM)
        grad_d = narrow(in_memory(b * pi - az2, TILE), grad_d_ptr)
        tl.store(grad_d_ptr + at * pixels + offs_n, grad_d, mask=mask_n)
    return grad_F, az2


__all__ = ["channel", "tile_of", "times"]
