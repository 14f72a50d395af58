"""Every gradient of y = Tᵀ(x − μ), of ‖y‖² and of log|Σ|.

With g = grad_y + 2 grad_‖y‖² y and u = t₀g, where δ = x − μ:

    grad_x = Tg = −grad_loc        grad_log t₀ = gy − 2 grad_log|Σ|        grad_s_k = uₙ δₙ₊ₖ        grad_m = u_c δ_c'
"""

import torch
from torch import Tensor

from ..grid import Sizes, channel_pairs, pairs
from .product import deviation, scattered


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
    need_x, need_loc, need_diagonal, need_neighbours, need_ties = needs
    found = [x.new_empty(0) for _ in needs]
    g = total(y, grad_y, grad_mahalanobis)
    if need_diagonal:
        grad = _of_weight((g * y).sum(0), log_diagonal)
        if grad_logdet is not None:
            grad -= (2 * (x.shape[2] // log_diagonal.shape[1]) * grad_logdet).to(grad.dtype)[:, None, None]
        found[2] = grad.to(log_diagonal.dtype)
    u = g * log_diagonal.to(g.dtype).exp()
    if need_x or need_loc:
        grad = scattered(u, neighbours, ties, spatial, neighbourhood)
        found[0] = grad.to(x.dtype) if need_x else found[0]
        if need_loc and loc is not None:
            found[1] = -(grad if loc.shape[0] == x.shape[0] else grad.sum(0, keepdim=True)).to(loc.dtype)
    if need_neighbours or need_ties:
        delta = deviation(x, loc, log_diagonal, neighbours)
        if need_neighbours:
            found[3] = _grad_neighbours(u, delta, neighbours, spatial, neighbourhood)
        if need_ties and ties is not None:
            found[4] = torch.empty_like(ties)
            for k, (c, later) in enumerate(channel_pairs(x.shape[2])):
                grad = (u[:, :, c] * delta[:, :, later]).sum(0)
                found[4][:, k] = grad.sum(-1, keepdim=True) if ties.shape[-1] == 1 else grad
    return found[0], found[1], found[2], found[3], found[4]


def total(y: Tensor, grad_y: Tensor | None, grad_mahalanobis: Tensor | None) -> Tensor:
    """g = grad_y + 2 grad_‖y‖² y [S, B, channels, pixels]."""
    if grad_mahalanobis is None:
        return torch.zeros_like(y) if grad_y is None else grad_y
    scale = (2 * grad_mahalanobis).to(y.dtype)[:, :, None, None]
    return y * scale if grad_y is None else torch.addcmul(grad_y, y, scale)


def _grad_neighbours(u: Tensor, delta: Tensor, neighbours: Tensor, spatial: Sizes, neighbourhood: Sizes) -> Tensor:
    """Σₛ uₙ δₙ₊ₖ, zero where the image has no such neighbour; straight into the gradient where nothing is summed."""
    grad = torch.zeros_like(neighbours, memory_format=torch.contiguous_format)
    source, image, out = u.unflatten(-1, spatial), delta.unflatten(-1, spatial), grad.unflatten(-1, spatial)
    alone = u.shape[0] == 1 and u.shape[2] == neighbours.shape[1] and grad.dtype == u.dtype
    for k, (here, there) in enumerate(pairs(tuple(spatial), tuple(neighbourhood))):
        if alone:
            torch.mul(source[0][here], image[0][there], out=out[:, :, k][here])
        else:
            out[:, :, k][here] = _of_weight((source[here] * image[there]).sum(0), neighbours).to(grad.dtype)
    return grad


def _of_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """Summed over the channels [B, channels, ...] that share a weight."""
    return grad if weight.shape[1] == grad.shape[1] else grad.sum(1, keepdim=True)
