"""The textbook formulas in plain torch: the specification that every implementation is held against.

Any dtype, any device, differentiable any number of times and in forward mode, and as inexact in float32 as the
textbook: the quadratic form is the difference of two large numbers. Run it in float64 to have an oracle.

Shapes broadcast: x, loc [..., N]; P [..., N, R]; d [..., N] or [..., 1].
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def capacitance(P: Tensor, precision: Tensor) -> Tensor:
    """C = I + Pᵀ diag(precision) P, [..., R, R]."""
    C = (P * precision.unsqueeze(-1)).mT @ P
    return C + torch.diag_embed(torch.ones_like(C[..., 0]))


def mahalanobis_and_logdet(x: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """q = δᵀΣ⁻¹δ by Woodbury's identity, log|Σ| by the determinant lemma; each in its broadcast shape."""
    delta = x - loc
    L = torch.linalg.cholesky(capacitance(P, d.reciprocal()))
    w = (P.mT @ (delta / d).unsqueeze(-1)).squeeze(-1)
    factor = L.expand(*w.shape[:-1], *L.shape[-2:])
    half = torch.linalg.solve_triangular(factor, w.unsqueeze(-1), upper=False).squeeze(-1)
    return (delta.square() / d).sum(-1) - half.square().sum(-1), _logdet(L, d, P.shape[-2])


def by_residual(x: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The same with q as a sum of squares, of the residual δ − Pv and of v (README.md): not a difference of two large
    numbers, and the correction of v by a step."""
    delta = x - loc
    L = torch.linalg.cholesky(capacitance(P, d.reciprocal()))

    def projected(z: Tensor) -> tuple[Tensor, Tensor]:
        w = (P.mT @ z.unsqueeze(-1)).squeeze(-1)
        return w, L.expand(*w.shape[:-1], *L.shape[-2:])

    w, factor = projected(delta / d)
    v = torch.cholesky_solve(w.unsqueeze(-1), factor).squeeze(-1)
    r = delta - (P @ v.unsqueeze(-1)).squeeze(-1)
    g = projected(r / d)[0] - v
    half = torch.linalg.solve_triangular(factor, g.unsqueeze(-1), upper=False).squeeze(-1)
    q = (r.square() / d).sum(-1) + v.square().sum(-1) - half.square().sum(-1)
    return q, _logdet(L, d, P.shape[-2])


def logdet(P: Tensor, d: Tensor) -> Tensor:
    """log|Σ| by the determinant lemma."""
    return _logdet(torch.linalg.cholesky(capacitance(P, d.reciprocal())), d, P.shape[-2])


def _logdet(L: Tensor, d: Tensor, N: int) -> Tensor:
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1) + d.expand(*d.shape[:-1], N).log().sum(-1)


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor) -> Tensor:
    """y = μ + P ω_p + √d ⊙ ω_d, with ω_p [..., R] and ω_d [..., N]."""
    return loc + (P @ omega_p.unsqueeze(-1)).squeeze(-1) + d.sqrt() * omega_d


def condition(value: Tensor, observed: Tensor, loc: Tensor, P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loc, factor and diagonal of p(y | y[observed] = value[observed]) over all N pixels, observed ones pinned."""
    precision = observed / d
    delta = torch.where(observed, value - loc, torch.zeros_like(loc))
    L = torch.linalg.cholesky(capacitance(P, precision))
    w = (P.mT @ (precision * delta).unsqueeze(-1)).squeeze(-1)
    v = torch.cholesky_solve(w.unsqueeze(-1), L).squeeze(-1)
    # PL⁻ᵀ, as the solution A of LAᵀ = Pᵀ.
    factor = torch.linalg.solve_triangular(L, P.mT.expand(*L.shape[:-2], *P.mT.shape[-2:]), upper=False).mT
    return (
        torch.where(observed, value, loc + (P @ v.unsqueeze(-1)).squeeze(-1)),
        torch.where(observed.unsqueeze(-1), torch.zeros_like(factor), factor),
        torch.where(observed, torch.zeros_like(d), d),
    )


def stencil(
    x: Tensor,
    loc: Tensor | None,
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    spatial: Sequence[int],
    neighbourhood: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """y = Tᵀ(x − μ), ‖y‖² and log|Σ| = −2 Σ log t of a precision TTᵀ (README.md, "A sparse precision").

    x, loc, y [..., channels, pixels]; log t [..., 1 or channels, pixels]; weights of neighbours [..., 1 or channels,
    neighbours, pixels]; of later channels [..., pairs, 1 or pixels].
    """
    delta = x if loc is None else x - loc
    channels, radius = x.shape[-2], [size // 2 for size in neighbourhood]
    frame = [r for r in reversed(radius) for _ in (0, 1)]
    framed = torch.nn.functional.pad(delta.unflatten(-1, tuple(spatial)), frame)
    y, zero = delta, (0,) * len(radius)
    window = itertools.product(*(range(-r, r + 1) for r in radius))
    for k, offset in enumerate(o for o in window if o > zero):
        there: Any = (..., *(slice(r + o, r + o + size) for r, o, size in zip(radius, offset, spatial, strict=True)))
        y = y + neighbours[..., k, :] * framed[there].flatten(-len(radius))
    for k, (c, later) in enumerate(itertools.combinations(range(channels), 2) if ties is not None else ()):
        assert ties is not None
        tied = ties[..., k, :] * delta[..., later, :]
        one = (torch.arange(channels, device=x.device) == c).to(y.dtype).unsqueeze(-1)
        y = y + one * tied.unsqueeze(-2)
    y = log_diagonal.exp() * y
    logdet = -2 * log_diagonal.expand(*log_diagonal.shape[:-2], channels, -1).sum((-2, -1))
    return y, y.square().sum((-2, -1)), logdet


def stencil_matrix(
    log_diagonal: Tensor,
    neighbours: Tensor,
    ties: Tensor | None,
    channels: int,
    spatial: Sequence[int],
    neighbourhood: Sequence[int],
) -> Tensor:
    """Tᵀ [..., N, N], whose columns are its products with the columns of the identity."""
    N = channels * log_diagonal.shape[-1]
    identity = torch.eye(N, dtype=log_diagonal.dtype, device=log_diagonal.device).unflatten(1, (channels, -1))
    batch = (1,) * (log_diagonal.dim() - 2)
    tied = None if ties is None else ties.unsqueeze(0)
    columns, _, _ = stencil(
        identity.reshape(N, *batch, channels, -1),
        None,
        log_diagonal.unsqueeze(0),
        neighbours.unsqueeze(0),
        tied,
        spatial,
        neighbourhood,
    )
    return columns.flatten(-2).movedim(0, -1)
