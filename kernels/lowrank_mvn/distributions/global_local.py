"""`GlobalLocalNormal`: what is common to a whole image is in a low-rank factor, the rest in a stencil."""

import torch
from torch import Tensor

from .. import arguments, checks
from ..factors.base import Factor, Mean
from ..local.precision import Precision
from .local import LocalDistribution, Temperature

__all__ = ["GlobalLocalNormal"]


class GlobalLocalNormal(LocalDistribution):
    r"""
    Multivariate normal whose covariance is low-rank plus the inverse of a sparse precision, N(μ, PPᵀ + (TTᵀ)⁻¹)::

        covariance_matrix = cov_factor @ cov_factor.T + inverse(T @ T.T)

    Args:
        loc (Tensor or LinearMean): mean μ, with shape `batch_shape + (N,)`, N = channels · pixels, channel by channel.
        cov_factor (Tensor or LinearFactor): P, `batch_shape + (N, R)`. A `LinearFactor` stays linear in its features
            where the stencil is one for all channels of an item, and its ties are the same at every pixel; else P is
            made.
        stencil (Stencil): T, or what a conditional has in its place.
        validate_args (bool, optional): whether to check that values are finite.

    Raises:
        ValueError: a shape that does not fit, R = 0, different devices, or (under `validate_args`) values that are not
            finite.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.

    Half precision is read as such and computed in float32; log-density and entropy come out in float32.
    """

    _parameters: arguments.Normal

    def __init__(
        self,
        loc: Tensor | Mean,
        cov_factor: Tensor | Factor,
        stencil: Precision,
        validate_args: bool | None = None,
    ) -> None:
        self._begin(arguments.global_local(loc, cov_factor, stencil), validate_args)

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **arguments.named(cov_factor=self._parameters.factor)}

    @property
    def cov_factor(self) -> Tensor:
        """P, made where it is linear in features."""
        P = self._parameters.factor.materialise()
        return P.expand(self._batch_shape + P.shape[-2:])

    def _density(self, value: Tensor) -> tuple[Tensor, Tensor]:
        p = self._parameters
        q, logdet, _ = self.stencil.density(value, p.mean, p.factor, p.factor.implementation(None))
        return q, logdet

    def _logdet(self) -> Tensor:
        p = self._parameters
        return self.stencil.logdet(p.factor, p.factor.implementation(None))[0]

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        noise: tuple[Tensor, Tensor] | None = None,
        temperature: Temperature = (1.0, 1.0),
    ) -> Tensor:
        """y = μ + t_P·Pω_p + t_L·T⁻ᵀω_d, of shape `sample_shape + batch_shape + event_shape`, differentiable.

        Args:
            noise: ω_p [..., R] and ω_d [..., N] to use in place of fresh noise, for interpolation and editing.
            temperature: t_P of what is global, and t_L of what is local; the distribution itself has (1, 1).
        """
        p, shape = self._parameters, checks.sizes("sample_shape", sample_shape) + self._batch_shape
        given = arguments.as_noise(noise, p, shape, "aten", temperature)  # ω_d is drawn here
        assert given.omega_d is not None
        given = given._replace(omega_d=given.omega_d.expand(*shape, p.N))
        return self.stencil.sample(p.mean, p.factor, shape, given, self.stencil.implementation(None))

    def condition(self, value: Tensor, observed: Tensor, variance: Tensor | float | None = None) -> "GlobalLocalNormal":
        """The distribution given the values at the pixels of a mask, over all N pixels: R + 1 solves.

        Args and what is pinned: as of `StencilMultivariateNormal.condition`. P is made.
        """
        p = self._parameters
        value, observed, noise, shape = self._observed(value, observed, variance)
        loc, factor, local = self.stencil.condition(value, observed, p.mean, p.factor, shape, "aten", noise)
        return GlobalLocalNormal(loc, factor, local, validate_args=False)

    def mix(self, A: Tensor) -> "GlobalLocalNormal":
        """The distribution with the factor PA in place of P, `A` [..., R, Q]; a `LinearFactor` stays one."""
        p = self._parameters
        return GlobalLocalNormal(p.mean, p.factor.mix(A), self.stencil, validate_args=False)

    def rank(self) -> int:
        """R, the number of columns of the factor."""
        return self._parameters.factor.shape[-1]

    def factor_gram(self) -> Tensor:
        """PᵀP as float64, [..., R, R]; of a `LinearFactor` from its features."""
        return self._parameters.factor.gram()

    def covariance_row(self, index: int | Tensor) -> Tensor:
        """Row `index` of Σ, `batch_shape + event_shape`."""
        p, n = self._parameters, self._index(index)
        row = p.factor.times(p.factor.row(n)).to(p.factor.dtype)
        return (row + self.stencil.row(n, p.N)).expand(self._batch_shape + self._event_shape)

    @property
    def variance(self) -> Tensor:
        """diag Σ, exactly; see `Stencil.variance` for what it costs, and `estimated_variance`."""
        variance = self._parameters.factor.row_norms() + self.stencil.variance()
        return variance.expand(self._batch_shape + self._event_shape)

    def estimated_variance(self, samples: int = 64) -> Tensor:
        """`variance` with a Monte Carlo estimate of diag (TTᵀ)⁻¹ from so many samples."""
        p, shape = self._parameters, torch.Size((samples,)) + self.stencil.batch_shape
        omega = torch.randn(*shape, p.N, dtype=p.mean.dtype, device=p.mean.device)
        with torch.no_grad():
            local = self.stencil.colour(omega, self.stencil.implementation(None)).square().mean(0)
            return (p.factor.row_norms() + local).to(p.mean.dtype).expand(self._batch_shape + self._event_shape)
