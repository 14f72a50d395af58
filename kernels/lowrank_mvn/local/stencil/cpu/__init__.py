"""The stencil as compiled C++ for the CPU: what `aten` computes, each pass a file of the name that it has there.

stencil.h  the calls, and the lines of an image
product    y = Tᵀ(x − μ), its square and log|Σ|
backward   every gradient; Tx
solve      Tᵀy = x and Ty = x, from pixel to pixel, for many samples at once
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.native import KINDS, function
from ..grid import Sizes, offsets

F64 = torch.float64

# What C++ sees of a tensor: address, kind and four strides.
View = tuple[int, int, int, int, int, int]
NOTHING: View = (0, 0, 0, 0, 0, 0)

_product = function("lowrank_stencil_product", 48)
_product_backward = function("lowrank_stencil_backward", 85)
_solve = function("lowrank_stencil_solve", 35)


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
    dtype = product_dtype(x, log_diagonal, neighbours, *(() if loc is None else (loc,)))
    (S, B, channels, _), new = x.shape, x.new_empty
    y, squares, logs = new(x.shape, dtype=dtype), new(S, B, dtype=F64), new(B, dtype=F64)
    t = _root(log_diagonal, dtype)
    _product(
        *(S, B, channels, torch.get_num_threads(), dtype == F64),
        *_near(tuple(spatial), tuple(neighbourhood))[1],
        *_image(x),
        *_image(loc),
        *_diagonal(log_diagonal, channels),
        *_diagonal(t, channels),
        *_neighbours(neighbours, channels),
        *_ties(ties),
        *(y.data_ptr(), squares.data_ptr(), logs.data_ptr()),
    )
    return y, squares, logs


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
    given = x, loc, log_diagonal, neighbours, ties
    grads = [
        x.new_empty(0) if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(given, needs, strict=True)
    ]
    shared_tie = ties is not None and needs[4] and ties.shape[2] == 1 < x.shape[3]
    if shared_tie and ties is not None:
        grads[4] = ties.new_empty(*ties.shape[:2], x.shape[3], dtype=y.dtype)
    _backward(
        x, loc, log_diagonal, neighbours, ties, y, grad_y, grad_mahalanobis, grad_logdet, spatial, neighbourhood, grads
    )
    if shared_tie and ties is not None:
        grads[4] = grads[4].sum(2, keepdim=True).to(ties.dtype)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def transpose(
    x: Tensor,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
) -> Tensor:
    """y = Tx [S, B, channels, pixels]: the gradient of x alone, where that of y is x."""
    y = x.new_empty(x.shape, dtype=product_dtype(x, log_diagonal, neighbours))
    grads = [y, *[y.new_empty(0)] * 4]
    _backward(y, None, log_diagonal, neighbours, ties, y, x, None, None, spatial, neighbourhood, grads)
    return y


def _backward(
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
    grads: list[Tensor],
) -> None:
    (S, B, channels, _), dtype = x.shape, y.dtype
    of_q = None if grad_mahalanobis is None else grad_mahalanobis.contiguous()
    of_logdet = None if grad_logdet is None else grad_logdet.contiguous()
    t = _root(log_diagonal, dtype)
    _product_backward(
        *(S, B, channels, log_diagonal.shape[1], torch.get_num_threads(), dtype == F64),
        *_near(tuple(spatial), tuple(neighbourhood))[1],
        *_image(x),
        *_image(loc),
        *_diagonal(t, channels),
        *_neighbours(neighbours, channels),
        *_ties(ties),
        *_image(y),
        *_image(grad_y),
        *(0 if g is None else g.data_ptr() for g in (of_q, of_logdet)),
        *(number for grad in grads for number in _written(grad)),
        loc is not None and loc.shape[0] == 1,
    )


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
    dtype = product_dtype(x, log_diagonal, neighbours)
    S, B, channels, _ = x.shape
    y, t = x.new_empty(x.shape, dtype=dtype), _root(log_diagonal, dtype)
    _solve(
        *(S, B, channels, torch.get_num_threads(), transposed, dtype == F64),
        *_near(tuple(spatial), tuple(neighbourhood))[1],
        *_image(x),
        *_diagonal(t, channels),
        *_neighbours(neighbours, channels),
        *_ties(ties),
        y.data_ptr(),
    )
    return y


def _root(log_diagonal: Tensor, dtype: torch.dtype) -> Tensor:
    """t [B, 1 or channels, pixels], contiguous."""
    return log_diagonal.to(dtype).exp().contiguous()


@functools.lru_cache(maxsize=64)
def _near(spatial: Sizes, neighbourhood: Sizes) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Sizes of the image and offsets of the neighbours, and how they are given to C++."""
    numbers = torch.tensor([spatial, *offsets(neighbourhood)])
    address = numbers.data_ptr()
    return numbers, (len(spatial), len(numbers) - 1, address, address + numbers[0].nbytes)


def _view(t: Tensor, strides: Sequence[int]) -> View:
    a, b, c, n = strides
    return t.data_ptr(), KINDS[t.dtype], a, b, c, n


def _image(t: Tensor | None) -> View:
    """Of [S or 1, B, channels, pixels]."""
    if t is None:
        return NOTHING
    s, b, c, n = t.stride()
    return _view(t, (s if t.shape[0] > 1 else 0, b, c, n))


def _diagonal(t: Tensor, channels: int) -> View:
    """Of [B, 1 or channels, pixels]."""
    b, c, n = t.stride()
    return _view(t, (0, b, c if t.shape[1] == channels else 0, n))


def _neighbours(t: Tensor, channels: int) -> View:
    """Of [B, 1 or channels, neighbours, pixels]."""
    b, c, k, n = t.stride()
    return _view(t, (k, b, c if t.shape[1] == channels else 0, n))


def _ties(t: Tensor | None) -> View:
    """Of [B, pairs, 1 or pixels]."""
    if t is None:
        return NOTHING
    b, pair, n = t.stride()
    return _view(t, (pair, b, 0, n if t.shape[2] > 1 else 0))


def _written(grad: Tensor) -> View:
    """Of a gradient, which is contiguous; nothing where it is empty."""
    return _view(grad, (0, 0, 0, 1)) if grad.numel() else NOTHING


__all__ = ["product", "product_backward", "solve", "transpose"]
