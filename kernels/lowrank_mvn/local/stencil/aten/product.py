"""y = Tᵀ(x − μ) with ‖y‖² and log|Σ|, and Tx."""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ..grid import Sizes, channel_pairs, pairs


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
    delta = deviation(x, loc, log_diagonal, neighbours)
    y = delta.clone(memory_format=torch.contiguous_format)
    image, out = delta.unflatten(-1, spatial), y.unflatten(-1, spatial)
    for k, (here, there) in enumerate(pairs(tuple(spatial), tuple(neighbourhood))):
        out[here].addcmul_(weight(neighbours, k, spatial, delta.dtype)[here], image[there])
    for k, (c, later) in enumerate(channel_pairs(x.shape[2]) if ties is not None else ()):
        assert ties is not None
        y[:, :, c].addcmul_(ties[:, k].to(delta.dtype), delta[:, :, later])
    y.mul_(log_diagonal.to(delta.dtype).exp())
    repeated = x.shape[2] // log_diagonal.shape[1]
    logdet = log_diagonal.sum((1, 2), dtype=torch.float64) * (-2 * repeated)
    return y, y.square().sum((2, 3), dtype=torch.float64), logdet


def transpose(
    x: Tensor,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sizes,
    neighbourhood: Sizes,
) -> Tensor:
    """y = Tx [S, B, channels, pixels]."""
    dtype = product_dtype(x, log_diagonal, neighbours)
    return scattered(x.to(dtype) * log_diagonal.to(dtype).exp(), neighbours, ties, spatial, neighbourhood)


def scattered(u: Tensor, neighbours: Tensor, ties: Tensor | None, spatial: Sizes, neighbourhood: Sizes) -> Tensor:
    """Each pixel's value to itself and, times their weights, to its later neighbours and channels."""
    y = u.clone(memory_format=torch.contiguous_format)
    image, out = u.unflatten(-1, spatial), y.unflatten(-1, spatial)
    for k, (here, there) in enumerate(pairs(tuple(spatial), tuple(neighbourhood))):
        out[there].addcmul_(weight(neighbours, k, spatial, u.dtype)[here], image[here])
    for k, (c, later) in enumerate(channel_pairs(u.shape[2]) if ties is not None else ()):
        assert ties is not None
        y[:, :, later].addcmul_(ties[:, k].to(u.dtype), u[:, :, c])
    return y


def deviation(x: Tensor, loc: Tensor | None, *weights: Tensor) -> Tensor:
    """x − μ in the dtype of products."""
    dtype = product_dtype(x, *weights) if loc is None else product_dtype(x, loc, *weights)
    return x.to(dtype) if loc is None else x.to(dtype) - loc.to(dtype)


def weight(neighbours: Tensor, k: int, spatial: Sizes, dtype: torch.dtype) -> Tensor:
    """Weights of one neighbour, [B, channels, *spatial]."""
    found: Tensor = neighbours[:, :, k].to(dtype).unflatten(-1, spatial)
    return found
