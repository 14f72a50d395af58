"""The textbook formulas in plain torch: the specification that every implementation is held against.

Any dtype, any device, differentiable any number of times and in forward mode, and as inexact in float32 as the
textbook: the quadratic form is the difference of two large numbers. Run it in float64 to have an oracle.

Shapes broadcast: x, loc [..., N]; P [..., N, R]; d [..., N] or [..., 1].
"""

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
