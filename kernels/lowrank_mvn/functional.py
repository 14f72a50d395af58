"""The public functions: log-density, entropy, samples and conditionals of N(μ, PPᵀ + D).

Shapes broadcast as in `torch.distributions`: with event size N and rank R,

    value, loc   [..., N]
    cov_factor   [..., N, R], any strides (the transposed view of [..., R, N] is read as it lies), or a
                 `LinearFactor` of features, which is never materialised; `loc` may then be a `LinearMean`
    cov_diag     [..., N] or [..., 1], a 0-d tensor or a number: one variance for every pixel, never expanded; where
                 there is a density, not below the smallest normal number (1.2e-38 in float32): 1/d has to exist

float32 and float64 are computed in as they are; float16 and bfloat16 are read as such, computed in float32, and
give a float32 log-density and entropy. `impl` is "aten" (closed forms, any device), "cpu" (the same as compiled C++;
the default for CPU tensors where it was built), "triton" (the same as GPU kernels; the default for CUDA and ROCm
tensors, and for CPU tensors only in Triton's interpreter) or "reference" (the textbook formulas, inexact in float32).
Forward-mode derivatives, and derivatives beyond the first, go through the formulas of the reference in float64
whatever the implementation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments, checks
from .factors.base import result_dtype
from .factors.linear.factor import LinearFactor
from .factors.linear.mean import LinearMean
from .layout import broadcast

__all__ = ["Conditional", "condition", "entropy", "log_prob", "log_prob_and_entropy", "rsample"]

Factor = Tensor | LinearFactor
Mean = Tensor | LinearMean


class Conditional(NamedTuple):
    """Parameters of a conditional normal over all N pixels; observed ones have their value, and variance 0.

    Of a `LinearFactor` the factor is one again, with a weight for each item and zero rows at observed pixels. Factor
    and diagonal depend on everything but the value: several values of one item share them. They are expanded to the
    whole batch shape; a `LinearFactor` and its diagonal have that of what they depend on.
    """

    loc: Tensor  # [..., N]
    cov_factor: Factor  # [..., N, R]
    cov_diag: Tensor  # [..., N]


def log_prob(
    value: Tensor, loc: Mean, cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None
) -> Tensor:
    """log p(value) = −½ (N log 2π + log|Σ| + δᵀΣ⁻¹δ) in nats, of the broadcast batch shape.

    The quadratic form is a sum of squares of the residual δ − Pv, never a difference of two large numbers.

    Raises:
        ValueError: a shape does not fit, R = 0, tensors on different devices, or an unknown `impl`.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ (outside autocast).
    """
    return log_prob_and_entropy(value, loc, cov_factor, cov_diag, impl=impl)[0]


def entropy(cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None) -> Tensor:
    """H = ½ (N (1 + log 2π) + log|Σ|) in nats, of the batch shape of `cov_factor` and `cov_diag`.

    Raises: as `log_prob`.
    """
    p = arguments.centred(cov_factor, cov_diag)
    logdet, _ = p.local.logdet(p.factor, p.factor.implementation(impl))
    return entropy_of(logdet.expand(p.batch_shape), p.N).to(p.result_dtype)


def log_prob_and_entropy(
    value: Tensor, loc: Mean, cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`log_prob` and `entropy` from one capacitance matrix, with one backward pass for both.

    Returns: the log-density, of the broadcast shape of all four arguments, and the entropy, of that of the last
    three; both in nats.

    Raises: as `log_prob`.
    """
    p = arguments.normal(loc, cov_factor, cov_diag)
    value = arguments.as_value(value, p)
    q, logdet, _ = p.local.density(value, p.mean, p.factor, p.factor.implementation(impl))
    dtype = torch.promote_types(p.result_dtype, result_dtype(value))
    return log_density(q, logdet, p.N).to(dtype), entropy_of(logdet.expand(p.batch_shape), p.N).to(dtype)


def rsample(
    loc: Mean,
    cov_factor: Factor,
    cov_diag: Tensor | float,
    sample_shape: torch.Size | tuple[int, ...] = (),
    *,
    noise: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = μ + P ω_p + √d ⊙ ω_d, of shape `sample_shape` + batch + [N], differentiable.

    Args:
        noise: ω_p [..., R] and ω_d [..., N], broadcast to `sample_shape` + batch; drawn from torch's generator, in
            this order, where it is not given. The kernels of "triton" draw ω_d themselves, from a seed that they take
            from torch's generator: the same seed gives the same sample, but not that of "aten" and "cpu".

    All samples share one pass over P. Nothing is factorised: a zero diagonal gives samples.

    Raises: as `log_prob`.
    """
    p = arguments.normal(loc, cov_factor, cov_diag)
    impl = p.factor.implementation(impl)
    shape = checks.sizes("sample_shape", sample_shape) + p.batch_shape
    return p.local.sample(p.mean, p.factor, shape, arguments.as_noise(noise, p, shape, impl), impl)


def condition(
    value: Tensor,
    observed: Tensor,
    loc: Mean,
    cov_factor: Factor,
    cov_diag: Tensor | float,
    *,
    impl: str | None = None,
) -> Conditional:
    """p(y | y[observed] = value[observed]), again low-rank plus diagonal, over all N pixels.

    With index 1 for the rest, 2 for what is observed and C₂ = I + P₂ᵀD₂⁻¹P₂ = L₂L₂ᵀ, the mean of the rest is
    μ₁ + P₁C₂⁻¹P₂ᵀD₂⁻¹(value₂ − μ₂), its factor P₁L₂⁻ᵀ, its diagonal d₁ (paper, equations 6 and 7, and Woodbury's
    identity). Observed pixels keep their value with a zero factor and a zero diagonal: the result can be sampled as
    it is, and has a density over the rest (index the rows with `~observed`). O(N R²).

    Of a `LinearFactor` the result is one again: the same features, weight WL₂⁻ᵀ for each item, zero rows at observed
    pixels. Several edits of one item share its features, which are neither copied nor is P made of them.

    Args:
        value: [..., N]; what stands at pixels that are not observed is ignored, NaN too.
        observed: bool, [..., N].

    Raises: as `log_prob`; TypeError where `observed` is not of dtype bool.
    """
    p = arguments.normal(loc, cov_factor, cov_diag)
    value, observed = arguments.as_value(value, p), arguments.as_observed(observed, p)
    names = "value, observed and the parameters"
    shape = broadcast(value.shape[:-1], observed.shape[:-1], p.batch_shape, names=names)
    mean, factor, local = p.local.condition(value, observed, p.mean, p.factor, shape, p.factor.implementation(impl))
    return Conditional(mean, factor.given, local.variance())


def log_density(mahalanobis: Tensor, logdet: Tensor, N: int) -> Tensor:
    """log p = −½ (N log 2π + log|Σ| + q)."""
    return -0.5 * (N * math.log(2 * math.pi) + logdet + mahalanobis)


def entropy_of(logdet: Tensor, N: int) -> Tensor:
    """H = ½ (N (1 + log 2π) + log|Σ|)."""
    return 0.5 * (N * (1 + math.log(2 * math.pi)) + logdet)
