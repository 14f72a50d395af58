"""y = Tᵀ(x − μ), ‖y‖² and log|Σ|: x, μ and every weight are read once, y is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.tiles import load_row, of_item
from ..grid import Sizes
from .window import BLOCK_N, WARPS, Window, coordinates, kind, load_delta, neighbour, pair, three, ties_at, work_dtype


@triton.jit
def stencil_product_kernel(
    x_at,  # [B, S, channels, pixels]
    loc_at,  # [B, S, channels, pixels], or none
    log_t_at,  # [B, channels, pixels]; as `s_at`, with the stride 0 where all channels share a stencil
    s_at,  # [B, channels, neighbours, pixels]
    m_at,  # [B, pairs, pixels], or none
    y_ptr,  # [S, B, channels, pixels]
    squares_ptr,  # [S, B, programs]
    logs_ptr,  # [B, programs]
    sizes,  # S, B, channels
    image,  # planes, rows and columns
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """yₙ = tₙ (δₙ + Σₖ sₙₖ δₙ₊ₖ + Σ_c' mₙ_c' δₙ_c') of some pixels of a channel, Σ yₙ² and Σ log tₙ."""
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    S, B, channels = sizes
    D, H, W = image
    pixels = D * H * W
    blocks = tl.cdiv(pixels, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    c = tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < pixels
    place = coordinates(offs_n, image)
    n = offs_n.to(tl.int64)
    x_item = of_item(x_at, b, 1)
    s_row = of_item(of_item(s_at, b, 1), c, 1)
    loc_item = None if loc_at is None else of_item(loc_at, b, 1)
    log_t = load_row(of_item(of_item(log_t_at, b, 1), c, 1), n, mask_n).to(dtype)
    part = c * blocks + block
    parts = channels * blocks
    tl.store(logs_ptr + b * parts + part, tl.sum(log_t.to(tl.float64), 0))
    for sample in range(S):
        s = tl.full((), 1, tl.int64) * sample
        y = load_delta(x_item, loc_item, s, c, n, mask_n, dtype)
        for k in tl.static_range((WINDOW.D * WINDOW.H * WINDOW.W) // 2):
            there, inside = neighbour(place, image, k, 1, WINDOW)
            inside &= mask_n
            weight = load_row(of_item(s_row, k, 1), n, inside).to(dtype)
            y += weight * load_delta(x_item, loc_item, s, c, there, inside, dtype)
        if m_at is not None:
            for later in range(c + 1, channels):
                tie = load_row(of_item(of_item(m_at, b, 1), pair(c, later, channels), 1), n, mask_n).to(dtype)
                y += tie * load_delta(x_item, loc_item, s, later, n, mask_n, dtype)
        y *= tl.exp(log_t)
        tl.store(y_ptr + ((s * B + b) * channels + c) * pixels + n, y, mask=mask_n)
        wide = y.to(tl.float64)
        tl.store(squares_ptr + (s * B + b) * parts + part, tl.sum(wide * wide, 0))


def product(
    x: Tensor,
    loc: Tensor | None,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = Tᵀ(x − μ) [S, B, channels, pixels], ‖y‖² [S, B] and log|Σ| = −2 Σ log t [B], both float64."""
    S, B, channels, pixels = x.shape
    KIND = kind(x, loc, log_diagonal, neighbours)
    blocks = launch.ceil_div(pixels, BLOCK_N)
    y = x.new_empty(x.shape, dtype=work_dtype(KIND))
    squares = x.new_empty(S, B, channels * blocks, dtype=torch.float64)
    logs = x.new_empty(B, channels * blocks, dtype=torch.float64)
    launch.launch(
        stencil_product_kernel,
        (B * blocks, channels),
        WARPS,
        x_at=launch.samples_at(x),
        loc_at=None if loc is None else launch.samples_at(loc),
        log_t_at=launch.at(log_diagonal.expand(-1, channels, -1)),
        s_at=launch.at(neighbours.expand(-1, channels, -1, -1)),
        m_at=ties_at(ties),
        y_ptr=y,
        squares_ptr=squares,
        logs_ptr=logs,
        sizes=(S, B, channels),
        image=three(spatial),
        KIND=KIND,
        WINDOW=Window(*three(neighbourhood)),
        BLOCK_N=BLOCK_N,
    )
    return y, squares.sum(2), -2 * logs.sum(1)
