"""Distances between two sets of images, by what a network sees in them.

Only with the features of Inception, and resized as it was published, is the Fréchet distance called FID.
"""

import torch
from torch import Tensor

from .moments import Moments

__all__ = ["Reference", "frechet", "kernel"]

AT_ONCE = 1024  # vectors, of each side, whose products are made together
MOST = 10_000  # vectors of each side that the kernel distance goes over: its cost grows with their product


class Reference:
    """One side of Fréchet distances, whose root is kept.

    Args:
        moments: of two images or more.

    Raises:
        ValueError: of fewer.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments, self._covariance = moments, moments.covariance()
        values, U = torch.linalg.eigh(self._covariance)
        self._root = (U * _roots(values)) @ U.mT

    def frechet(self, other: Moments) -> float:
        """`frechet` of this side and another."""
        B = other.covariance()
        inner = self._root @ B @ self._root
        crossed = _roots(torch.linalg.eigvalsh(0.5 * (inner + inner.mT))).sum()
        apart = (self._moments.mean - other.mean).square().sum()
        return float(apart + self._covariance.trace() + B.trace() - 2 * crossed)


def frechet(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(A + B − 2 (A^½ B A^½)^½), from covariances A and B over n − 1.

    Both roots are of symmetric matrices, by eigenvalues in float64: nothing is imaginary, and what is rounding is 0.
    The distance grows as counts fall, so that only distances at equal counts compare.

    Raises:
        ValueError: a side has fewer than two images.
    """
    return Reference(a).frechet(b)


def _roots(values: Tensor) -> Tensor:
    """Roots of ascending eigenvalues. Of one that is 0 rounding leaves ε, whose root is not small any more."""
    rounding = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return torch.where(values > rounding, values, 0).sqrt()


def kernel(x: Tensor, y: Tensor) -> float:
    """KID (Bińkowski et al. 2018): the squared maximum mean discrepancy with the kernel (xᵀy/F + 1)³, unbiased.

    Over all pairs of the first 10,000 vectors of each side, where subsets are usual: the same expectation with less
    noise. Being unbiased, it falls below 0 for sets that are alike.

    Args:
        x, y: features, [n, F] and [m, F].

    Raises:
        ValueError: a side has fewer than two vectors.
    """
    x, y = x[:MOST].double(), y[:MOST].double()
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the kernel distance is asked of {len(x)} and {len(y)} images, expected at least 2 of each")

    def total(a: Tensor, b: Tensor) -> Tensor:
        parts = [(rows @ b.mT / a.shape[1] + 1).pow(3).sum() for rows in a.split(AT_ONCE)]
        return torch.stack(parts).sum()

    def within(a: Tensor) -> Tensor:
        own = (a.square().sum(-1) / a.shape[1] + 1).pow(3).sum()
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))
