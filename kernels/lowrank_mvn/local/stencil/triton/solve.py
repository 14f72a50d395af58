"""Tᵀy = x by back-substitution, and Ty = x by forward substitution: a program walks over the fronts of an item.

The pixels of one front a·n do not depend on each other (`grid.steps`). A barrier lies between two fronts: a program's
threads read what others of its own have stored. With T = U diag(t), Uᵀy = x/t, or Uu = x and y = u/t.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.tiles import load_row, of_item
from ..grid import Sizes, steps
from .window import Window, kind, neighbour, pair, three, ties_at, work_dtype

# Samples that a program solves for at once, which share the weights that it reads.
BLOCK_S = 8


@triton.jit
def _tied(m_item, y_row, c, n, inside, sizes, TRANSPOSED: tl.constexpr, dtype: tl.constexpr):
    """Σ m y over the channels of these pixels that are solved already: the later ones, or the earlier ones."""
    _, _, channels, pixels = sizes
    total = tl.zeros(inside.shape, dtype)
    first, last = c + 1, channels
    if TRANSPOSED:
        first, last = 0, c
    for other in range(first, last):
        which = pair(other, c, channels) if TRANSPOSED else pair(c, other, channels)
        tie = load_row(of_item(m_item, which, 1), n[None, :], inside).to(dtype)
        total += tie * tl.load(y_row + other * pixels + n[None, :], mask=inside, other=0.0)
    return total


@triton.jit
def stencil_solve_kernel(
    x_at,  # [B, S, channels, pixels]
    log_t_at,  # [B, channels, pixels]; as `s_at`, with the stride 0 where all channels share a stencil
    s_at,  # [B, channels, neighbours, pixels]
    m_at,  # [B, pairs, pixels], or none
    y_ptr,  # [S, B, channels, pixels]
    sizes,  # S, B, channels, pixels
    image,  # planes, rows and columns
    STEPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """yₙ = xₙ/tₙ − Σₖ sₙₖ yₙ₊ₖ − Σ_c' m yₙ_c', or with TRANSPOSED uₙ = xₙ − Σₖ sₙ₋ₖ,ₖ uₙ₋ₖ − Σ_c'' m uₙ_c''.

    A program has some samples of an item, and one channel or, where they are tied, all of them.
    """
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    S, B, channels, pixels = sizes
    D, H, W = image
    chunks = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    offs_s = tl.program_id(0) % chunks * BLOCK_S + tl.arange(0, BLOCK_S)
    x_ptr, x_stride_s, x_stride_c, x_stride_n = of_item(x_at, b, 1)
    s_item, log_t_item = of_item(s_at, b, 1), of_item(log_t_at, b, 1)
    m_item = None if m_at is None else of_item(m_at, b, 1)
    x_rows = x_ptr + (offs_s.to(tl.int64) * x_stride_s)[:, None]
    y_rows = y_ptr + ((offs_s.to(tl.int64) * B + b) * channels * pixels)[:, None]
    own = tl.program_id(1)
    turns = 1 if m_at is None else channels
    fronts = STEPS.D * (D - 1) + STEPS.H * (H - 1) + W
    for turn in range(fronts):
        front = turn if TRANSPOSED else fronts - 1 - turn
        for d in range(D):
            rest = front - STEPS.D * d
            # The first row whose column is inside of the image; as many rows follow as the front can have.
            h = tl.maximum(0, (rest - W + STEPS.H) // STEPS.H) + tl.arange(0, BLOCK_H)
            w = rest - STEPS.H * h
            place = (d, h, w)
            mask_n = (h < H) & (w >= 0) & (w < W)
            inside = mask_n[None, :] & (offs_s < S)[:, None]
            n = ((d * H + h) * W + w).to(tl.int64)
            for i in range(turns):
                c = own
                if m_at is not None:
                    c = i if TRANSPOSED else channels - 1 - i
                s_row = of_item(s_item, c, 1)
                y_row = y_rows + c * pixels
                y = tl.load(x_rows + c * x_stride_c + n[None, :] * x_stride_n, mask=inside, other=0.0).to(dtype)
                if not TRANSPOSED:
                    y = y / tl.exp(load_row(of_item(log_t_item, c, 1), n, mask_n).to(dtype))[None, :]
                for k in tl.static_range((WINDOW.D * WINDOW.H * WINDOW.W) // 2):
                    there, has = neighbour(place, image, k, SIGN, WINDOW)
                    has &= mask_n
                    weight = load_row(of_item(s_row, k, 1), there if TRANSPOSED else n, has).to(dtype)
                    near = tl.load(y_row + there[None, :], mask=inside & has[None, :], other=0.0)
                    y -= weight[None, :] * near
                if m_at is not None:
                    y -= _tied(m_item, y_rows, c, n, inside, sizes, TRANSPOSED, dtype)
                tl.store(y_row + n[None, :], y, mask=inside)
                if m_at is not None:
                    tl.debug_barrier()
        tl.debug_barrier()


def solve(
    x: Tensor,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    transposed: bool,
) -> Tensor:
    """y [S, B, channels, pixels] with Tᵀy = x, or Ty = x if `transposed`."""
    S, B, channels, pixels = x.shape
    image, window = three(spatial), three(neighbourhood)
    front_steps = steps(window)
    KIND = kind(x, log_diagonal, neighbours)
    y = x.new_empty(x.shape, dtype=work_dtype(KIND))
    rows = min(image[1], launch.ceil_div(image[2], front_steps[1]))
    block_s, block_h = (int(triton.next_power_of_2(max(1, size))) for size in (min(S, BLOCK_S), rows))
    launch.launch(
        stencil_solve_kernel,
        (B * launch.ceil_div(S, block_s), 1 if ties is not None else channels),
        max(1, min(8, math.ceil(block_s * block_h / 64))),
        x_at=launch.samples_at(x),
        log_t_at=launch.at(log_diagonal.expand(-1, channels, -1)),
        s_at=launch.at(neighbours.expand(-1, channels, -1, -1)),
        m_at=ties_at(ties),
        y_ptr=y,
        sizes=(S, B, channels, pixels),
        image=image,
        STEPS=Window(*front_steps),
        TRANSPOSED=transposed,
        KIND=KIND,
        WINDOW=Window(*window),
        BLOCK_S=block_s,
        BLOCK_H=block_h,
    )
    return y.div_(log_diagonal.to(y.dtype).exp()) if transposed else y
