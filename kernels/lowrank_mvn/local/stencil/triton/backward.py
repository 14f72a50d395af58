"""Every gradient of y = Tᵀ(x − μ), ‖y‖² and log|Σ| in one pass, and Tx, which is the gradient of x alone.

With g = grad_y + 2 grad_‖y‖² y and u = tg:

    grad_x = Tg = −grad_loc        grad_log t = gy − 2 grad_log|Σ|        grad_s_k = uₙ δₙ₊ₖ        grad_m = u_c δ_c'
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.math import narrow
from ....device.tiles import load_row, of_item
from ..grid import Sizes
from .window import (
    BLOCK_N,
    WARPS,
    Window,
    coordinates,
    kind,
    load_delta,
    load_g,
    neighbour,
    pair,
    three,
    ties_at,
    work_dtype,
)


@triton.jit
def _scale(grad_q_ptr, row, dtype: tl.constexpr):
    """2 ∂loss/∂‖y‖² of one sample of an item, or none."""
    if grad_q_ptr is None:
        return None
    else:
        return (2.0 * tl.load(grad_q_ptr + row)).to(dtype)


@triton.jit
def _grad_x(
    grad_y_item,
    y_item,
    scale,
    log_t_item,
    s_item,
    m_item,
    s,
    c,
    pixels,
    channels,
    image,
    dtype: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """(Tg)ₙ = uₙ + Σₖ sₙ₋ₖ,ₖ uₙ₋ₖ + Σ_c'' m_c''c u_c'' of one sample and channel."""
    n, mask_n, place = pixels
    log_t_row = of_item(log_t_item, c, 1)
    s_row = of_item(s_item, c, 1)
    grad = tl.exp(load_row(log_t_row, n, mask_n).to(dtype)) * load_g(grad_y_item, y_item, scale, s, c, n, mask_n, dtype)
    for k in tl.static_range((WINDOW.D * WINDOW.H * WINDOW.W) // 2):
        before, inside = neighbour(place, image, k, -1, WINDOW)
        inside &= mask_n
        weight = load_row(of_item(s_row, k, 1), before, inside).to(dtype)
        weight *= tl.exp(load_row(log_t_row, before, inside).to(dtype))
        grad += weight * load_g(grad_y_item, y_item, scale, s, c, before, inside, dtype)
    if m_item is not None:
        for earlier in range(c):
            tie = load_row(of_item(m_item, pair(earlier, c, channels), 1), n, mask_n).to(dtype)
            tie *= tl.exp(load_row(of_item(log_t_item, earlier, 1), n, mask_n).to(dtype))
            grad += tie * load_g(grad_y_item, y_item, scale, s, earlier, n, mask_n, dtype)
    return grad


@triton.jit
def _g_delta(grad_y_item, y_item, grad_q_ptr, x_item, loc_item, b, c, other, n, there, mask, S, B, dtype: tl.constexpr):
    """Σₛ gₙ of channel c times δ of a channel `other` at the pixels `there`; 0 outside of the mask."""
    total = tl.zeros(n.shape, dtype)
    for sample in range(S):
        s = tl.full((), 1, tl.int64) * sample
        g = load_g(grad_y_item, y_item, _scale(grad_q_ptr, s * B + b, dtype), s, c, n, mask, dtype)
        total += g * load_delta(x_item, loc_item, s, other, there, mask, dtype)
    return total


@triton.jit
def stencil_backward_kernel(
    x_at,  # [B, S, channels, pixels], or none where no weight needs it
    loc_at,  # [B, S, channels, pixels], or none
    log_t_at,  # [B, channels, pixels]; as `s_at`, with the stride 0 where all channels share a stencil
    s_at,  # [B, channels, neighbours, pixels]
    m_at,  # [B, pairs, pixels], or none
    y_at,  # [B, S, channels, pixels]; as the cotangents, none where it is not needed
    grad_y_at,  # [B, S, channels, pixels]
    grad_q_ptr,  # [S, B]
    grad_logdet_ptr,  # [B]
    grad_x_ptr,  # [S, B, channels, pixels]; as the other gradients, none where it is not needed
    grad_loc_ptr,  # [S or 1, B, channels, pixels]
    grad_log_t_ptr,  # [B, stencils, pixels]
    grad_s_ptr,  # [B, stencils, neighbours, pixels]
    grad_m_ptr,  # [B, pairs, pixels]
    sizes,  # S, B, channels
    image,  # planes, rows and columns
    ONE_LOC: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All gradients of some pixels of the channels that share a stencil: one kernel, for what all of them read."""
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    NEIGHBOURS: tl.constexpr = (WINDOW.D * WINDOW.H * WINDOW.W) // 2
    S, B, channels = sizes
    D, H, W = image
    pixels = D * H * W
    blocks = tl.cdiv(pixels, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    stencil = tl.program_id(1)
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < pixels
    place = coordinates(offs_n, image)
    n = offs_n.to(tl.int64)
    # One stencil is shared by all channels.
    first, last = stencil, tl.where(tl.num_programs(1) == 1, channels, stencil + 1)
    log_t_item, s_item = of_item(log_t_at, b, 1), of_item(s_at, b, 1)
    m_item = None if m_at is None else of_item(m_at, b, 1)
    y_item = None if y_at is None else of_item(y_at, b, 1)
    grad_y_item = None if grad_y_at is None else of_item(grad_y_at, b, 1)
    x_item = None if x_at is None else of_item(x_at, b, 1)
    loc_item = None if loc_at is None else of_item(loc_at, b, 1)
    if grad_x_ptr is not None or grad_loc_ptr is not None:
        for c in range(first, last):
            total = tl.zeros((BLOCK_N,), dtype)
            for sample in range(S):
                s = tl.full((), 1, tl.int64) * sample
                row = (s * B + b) * channels + c
                grad = _grad_x(
                    grad_y_item,
                    y_item,
                    _scale(grad_q_ptr, s * B + b, dtype),
                    log_t_item,
                    s_item,
                    m_item,
                    s,
                    c,
                    (n, mask_n, place),
                    channels,
                    image,
                    dtype,
                    WINDOW,
                )
                if grad_x_ptr is not None:
                    tl.store(grad_x_ptr + row * pixels + n, narrow(grad, grad_x_ptr), mask=mask_n)
                if grad_loc_ptr is not None:
                    total -= grad
                    if not ONE_LOC:
                        tl.store(grad_loc_ptr + row * pixels + n, narrow(-grad, grad_loc_ptr), mask=mask_n)
            if grad_loc_ptr is not None and ONE_LOC:
                row = b * channels + c
                tl.store(grad_loc_ptr + row * pixels + n, narrow(total, grad_loc_ptr), mask=mask_n)
    own = b * tl.num_programs(1) + stencil
    if grad_log_t_ptr is not None:
        total = tl.zeros((BLOCK_N,), dtype)
        for c in range(first, last):
            for sample in range(S):
                s = tl.full((), 1, tl.int64) * sample
                g = load_g(grad_y_item, y_item, _scale(grad_q_ptr, s * B + b, dtype), s, c, n, mask_n, dtype)
                total += g * load_row(of_item(of_item(y_item, s, 1), c, 1), n, mask_n).to(dtype)
        if grad_logdet_ptr is not None:
            total -= (2.0 * (last - first) * tl.load(grad_logdet_ptr + b)).to(dtype)
        tl.store(grad_log_t_ptr + own * pixels + n, narrow(total, grad_log_t_ptr), mask=mask_n)
    if grad_s_ptr is not None:
        t = tl.exp(load_row(of_item(log_t_item, stencil, 1), n, mask_n).to(dtype))
        for k in tl.static_range(NEIGHBOURS):
            there, inside = neighbour(place, image, k, 1, WINDOW)
            inside &= mask_n
            total = tl.zeros((BLOCK_N,), dtype)
            for c in range(first, last):
                total += _g_delta(
                    grad_y_item, y_item, grad_q_ptr, x_item, loc_item, b, c, c, n, there, inside, S, B, dtype
                )
            row_ptr = grad_s_ptr + (own * NEIGHBOURS + k) * pixels
            tl.store(row_ptr + n, narrow(t * total, grad_s_ptr), mask=mask_n)
    if grad_m_ptr is not None:
        for c in range(first, last):
            t = tl.exp(load_row(of_item(log_t_item, c, 1), n, mask_n).to(dtype))
            for later in range(c + 1, channels):
                total = t * _g_delta(
                    grad_y_item, y_item, grad_q_ptr, x_item, loc_item, b, c, later, n, n, mask_n, S, B, dtype
                )
                row = b * (channels * (channels - 1) // 2) + pair(c, later, channels)
                tl.store(grad_m_ptr + row * pixels + n, narrow(total, grad_m_ptr), mask=mask_n)


def _launch(
    shape: torch.Size,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    KIND: str,
    made: dict[str, Tensor | None],
    **read: Tensor | None,
) -> None:
    """The kernel on vectors of `shape`; of what it may read and make, what is named."""
    (S, B, channels, pixels), stencils = shape, log_diagonal.shape[1]
    given = {name: read.get(name) for name in ("x", "loc", "y", "grad_y")}
    at: dict[str, Any] = {f"{n}_at": None if t is None else launch.samples_at(t) for n, t in given.items()}
    out: dict[str, Any] = {f"{n}_ptr": made.get(n) for n in ("grad_x", "grad_loc", "grad_log_t", "grad_s", "grad_m")}
    loc = made.get("grad_loc")
    launch.launch(
        stencil_backward_kernel,
        (B * launch.ceil_div(pixels, BLOCK_N), stencils),
        WARPS,
        log_t_at=launch.at(log_diagonal.expand(-1, channels, -1)),
        s_at=launch.at(neighbours.expand(-1, channels, -1, -1)),
        m_at=ties_at(ties),
        grad_q_ptr=read.get("grad_q"),
        grad_logdet_ptr=read.get("grad_logdet"),
        sizes=(S, B, channels),
        image=three(spatial),
        ONE_LOC=loc is not None and loc.shape[0] == 1,
        KIND=KIND,
        WINDOW=Window(*three(neighbourhood)),
        BLOCK_N=BLOCK_N,
        **at,
        **out,
    )


def product_backward(
    x: Tensor,
    loc: Tensor | None,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    y: Tensor,
    grad_y: Tensor | None,
    grad_mahalanobis: Tensor | None,
    grad_logdet: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_loc, grad_log_diagonal, grad_neighbours and grad_ties, in their inputs' shapes and dtypes; empty
    where `needs` says no."""
    KIND = kind(x, loc, log_diagonal, neighbours)
    names = "grad_x", "grad_loc", "grad_log_t", "grad_s", "grad_m"
    inputs = x, loc, log_diagonal, neighbours, ties
    made: dict[str, Tensor | None] = {
        name: t.new_empty(t.shape) if need and t is not None else None
        for name, t, need in zip(names, inputs, needs, strict=True)
    }
    whole = made["grad_m"]
    if whole is not None and ties is not None and ties.shape[2] == 1:
        made["grad_m"] = x.new_empty(*ties.shape[:2], x.shape[3], dtype=work_dtype(KIND))
    _launch(
        x.shape,
        log_diagonal,
        neighbours,
        ties,
        spatial,
        neighbourhood,
        KIND,
        made,
        x=x,
        loc=loc,
        y=y,
        grad_y=grad_y,
        grad_q=None if grad_mahalanobis is None else grad_mahalanobis.contiguous(),
        grad_logdet=None if grad_logdet is None else grad_logdet.contiguous(),
    )
    if whole is not None and made["grad_m"] is not None and whole.shape != made["grad_m"].shape:
        made["grad_m"] = whole.copy_(made["grad_m"].sum(2, keepdim=True))
    found = [x.new_empty(0) if t is None else t for t in made.values()]
    return found[0], found[1], found[2], found[3], found[4]


def transpose(
    x: Tensor,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
) -> Tensor:
    """y = Tx [S, B, channels, pixels]."""
    KIND = kind(x, log_diagonal, neighbours)
    y = x.new_empty(x.shape, dtype=work_dtype(KIND))
    _launch(x.shape, log_diagonal, neighbours, ties, spatial, neighbourhood, KIND, {"grad_x": y}, grad_y=x)
    return y
