"""Calibration: whether what the model expects to be off is what it is off by."""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from lowrank_mvn import LowRankMultivariateStudentT

from ..models.observation import Observation, variance
from .counted import log_prob_and_entropy

__all__ = ["INTERVALS", "energy", "inside", "squares"]

INTERVALS = (0.5, 0.9)  # probability of the central intervals whose coverage is looked at


def squares(p: Observation, x: Tensor, counted: Tensor | None = None) -> Tensor:
    """δᵀΣ⁻¹δ/N of images `x` [B, N], [B], with the covariance Σ: 1 on average where the model is right.

    One fitted constant can fake it. Coverage and the energy score cannot be faked so.
    """
    log_prob, entropy = log_prob_and_entropy(p, x, counted)
    return _squares(p, log_prob.double() + entropy.double(), x.shape[-1] if counted is None else int(counted.sum()))


@singledispatch
def _squares(p: Any, surplus: Tensor, N: int) -> Tensor:
    """From log p(x) + H, which of any normal is (N − δᵀΣ⁻¹δ)/2."""
    return 1 - 2 * surplus / N


@_squares.register
def _(p: LowRankMultivariateStudentT, surplus: Tensor, N: int) -> Tensor:
    """Of Student's t it is (a + n)(ψ(a + n) − ψ(a) − log(1 + q/2a)), a = ν/2, n = N/2; its covariance ν/(ν − 2)·Σ."""
    a, n = 0.5 * p.df.double(), N / 2
    q = 2 * a * torch.expm1(torch.digamma(a + n) - torch.digamma(a) - surplus / (a + n))
    return q * (a - 1) / a / N


def inside(
    p: Observation, x: Tensor, intervals: tuple[float, ...] = INTERVALS, counted: Tensor | None = None
) -> Tensor:
    """Share of the pixels of each image that lie in their central intervals, by marginal variance (`variance`).

    Returns: [intervals, B]; each row is its probability on average where the model is right.
    """
    scaled = (x - p.loc).abs() / variance(p)[0].sqrt()
    if counted is not None:
        scaled = scaled[..., counted.to(x.device)]
    ends = _ends(p, torch.tensor(intervals, dtype=torch.float64)).to(scaled)  # [intervals] or [intervals, B]
    return torch.stack([(scaled <= end[..., None]).double().mean(-1) for end in ends])


@singledispatch
def _ends(p: Any, probabilities: Tensor) -> Tensor:
    """Where central intervals of a pixel end, in standard deviations: P(|t| < h) = p at h = √2 erf⁻¹(p)."""
    ends: Tensor = 2**0.5 * torch.special.erfinv(probabilities)
    return ends


@_ends.register
def _(p: LowRankMultivariateStudentT, probabilities: Tensor) -> Tensor:
    """Of Student's t, whose variance is ν/(ν − 2) times the square of its scale."""
    from scipy.special import stdtrit  # quantiles, which torch has none of

    df = p.df.double().cpu()
    quantiles = torch.from_numpy(stdtrit(df.numpy(), (0.5 + probabilities / 2)[:, None].numpy()))
    return quantiles * ((df - 2) / df).sqrt()


def energy(samples: Tensor, x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Energy score E‖y − x‖ − ½ E‖y − y'‖ of each image, [B], in units of intensity; lower is better.

    Strictly proper: on average nothing is below the distribution that images come from.

    Args:
        samples: [S, B, N] with S of at least 2; the second term is over their pairs, which is unbiased.
        x: [B, N].

    Raises:
        ValueError: fewer than two samples.
    """
    if samples.dim() != 3 or len(samples) < 2:
        raise ValueError(f"samples has shape {list(samples.shape)}, expected [S, B, N] with S of at least 2")
    if counted is not None:
        samples, x = samples[..., counted.to(x.device)], x[..., counted.to(x.device)]
    S = len(samples)
    apart: Tensor = torch.linalg.vector_norm(samples - x, dim=-1).double().mean(0)
    between = torch.zeros_like(apart)
    for s in range(1, S):  # S·N values at a time, not S²·N
        between += torch.linalg.vector_norm(samples[s:] - samples[s - 1], dim=-1).double().sum(0)
    return apart - between / (S * (S - 1))  # ½ of the mean over S(S − 1)/2 pairs
