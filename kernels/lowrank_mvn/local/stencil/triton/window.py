"""Pixels of an image of up to three dimensions and their neighbours, as kernels count them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.tiles import load_row, of_item

# Pixels of one program, one for a thread: with two, masks of neighbours take more predicate registers than there are.
BLOCK_N, WARPS = 128, 4


class Window(NamedTuple):
    """A neighbourhood."""

    D: int
    H: int
    W: int


def three(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Sizes of an image or a neighbourhood, with dimensions of one pixel in front.

    Raises:
        ValueError: there are more than three, or more pixels than a kernel counts.
    """
    if len(sizes) > 3 or math.prod(sizes) > launch.MAX_PIXELS:
        raise ValueError(
            f"the kernels take up to three spatial dimensions and {launch.MAX_PIXELS} pixels, got {list(sizes)}"
        )
    D, H, W = [*[1] * (3 - len(sizes)), *sizes]
    return D, H, W


def ties_at(ties: Tensor | None) -> tuple[Any, ...] | None:
    """Pointer and strides of weights [B, pairs, pixels]; those that all pixels share have the stride 0."""
    if ties is None:
        return None
    return ties, ties.stride(0), ties.stride(1), 0 if ties.shape[2] == 1 else ties.stride(2)


def kind(*tensors: Tensor | None) -> str:
    """What is computed in."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return "float64" if wide else "float32"


def work_dtype(KIND: str) -> torch.dtype:
    return torch.float64 if KIND == "float64" else torch.float32


@triton.jit
def coordinates(n, image):
    """Plane, row and column of pixels."""
    _, H, W = image
    return n // (H * W), n // W % H, n % W


@triton.jit
def neighbour(place, image, k: tl.constexpr, SIGN: tl.constexpr, WINDOW: tl.constexpr):
    """The pixels at SIGN times the k-th offset from those at `place`, and whether the image has them."""
    D, H, W = image
    d, h, w = place
    at: tl.constexpr = (WINDOW.D * WINDOW.H * WINDOW.W) // 2 + 1 + k
    d += SIGN * (at // (WINDOW.H * WINDOW.W) - WINDOW.D // 2)
    h += SIGN * (at // WINDOW.W % WINDOW.H - WINDOW.H // 2)
    w += SIGN * (at % WINDOW.W - WINDOW.W // 2)
    inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return ((d * H + h) * W + w).to(tl.int64), inside


@triton.jit
def pair(c, later, channels):
    """The place of channels c < later among the pairs (0, 1), (0, 2), …, (1, 2), …"""
    return c * channels - c * (c + 1) // 2 + later - c - 1


@triton.jit
def load_delta(x_at, loc_at, s, c, n, mask, dtype: tl.constexpr):
    """xₙ − μₙ of one sample and channel; pointers and strides of samples, channels, pixels."""
    delta = load_row(of_item(of_item(x_at, s, 1), c, 1), n, mask).to(dtype)
    if loc_at is not None:
        delta -= load_row(of_item(of_item(loc_at, s, 1), c, 1), n, mask).to(dtype)
    return delta


@triton.jit
def load_g(grad_y_at, y_at, scale, s, c, n, mask, dtype: tl.constexpr):
    """gₙ = grad_yₙ + scale · yₙ of one sample and channel; either may be none."""
    g = tl.zeros(n.shape, dtype)
    if grad_y_at is not None:
        g += load_row(of_item(of_item(grad_y_at, s, 1), c, 1), n, mask).to(dtype)
    if scale is not None:
        g += scale * load_row(of_item(of_item(y_at, s, 1), c, 1), n, mask).to(dtype)
    return g
