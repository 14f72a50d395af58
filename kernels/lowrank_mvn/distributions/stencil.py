"""`StencilMultivariateNormal`: a normal over images whose precision has a sparse Cholesky factor."""

import torch
from torch import Tensor

from .. import arguments, checks
from ..factors.base import Mean
from ..local.precision import Precision
from ..local.stencil.conditioned import fill, known
from ..registry import without_autocast
from .local import LocalDistribution, Temperature

__all__ = ["StencilMultivariateNormal"]


class StencilMultivariateNormal(LocalDistribution):
    r"""
    Multivariate normal over images or volumes whose precision is sparse, N(μ, (TTᵀ)⁻¹)::

        precision_matrix = T @ T.T

    T is lower triangular and ties each pixel to the later pixels of a neighbourhood: a :class:`Stencil`, whose
    weights a network predicts for each pixel (structured uncertainty prediction networks, Dorta et al. 2018). A
    log-density and its gradients are one pass each over the weights; a sample is a back-substitution.

    Example:
        >>> images = torch.zeros(2, 3, 8, 8)
        >>> stencil = Stencil(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 8, 8))  # 4 later neighbours of 3×3
        >>> m = StencilMultivariateNormal(images.flatten(1), stencil)
        >>> m.log_prob(images.flatten(1)).shape, m.sample().unflatten(-1, (3, 8, 8)).shape
        (torch.Size([2]), torch.Size([2, 3, 8, 8]))

    Args:
        loc (Tensor or LinearMean): mean μ, with shape `batch_shape + (N,)`, N = channels · pixels, channel by channel.
        stencil (Stencil): T, or what a conditional has in its place; its leading dimensions broadcast with those
            of loc.
        validate_args (bool, optional): whether to check that values are finite.

    Raises:
        ValueError: a shape that does not fit, different devices, or (under `validate_args`) values that are not finite.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.

    Half precision is read as such and computed in float32; log-density and entropy come out in float32.
    """

    _parameters: arguments.LocalNormal

    def __init__(self, loc: Tensor | Mean, stencil: Precision, validate_args: bool | None = None) -> None:
        self._begin(arguments.precise(loc, stencil), validate_args)

    def _density(self, value: Tensor) -> tuple[Tensor, Tensor]:
        p = self._parameters
        loc = p.mean.materialise(p.result_dtype)
        _, q, logdet = self.stencil.own(value, loc, self.stencil.implementation(None))
        return q, logdet

    def _logdet(self) -> Tensor:
        return self.stencil.own_logdet()

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        noise: tuple[Tensor | None, Tensor] | None = None,
        temperature: Temperature = (1.0, 1.0),
    ) -> Tensor:
        """y = μ + t_L·T⁻ᵀω_d, of shape `sample_shape + batch_shape + event_shape`, differentiable.

        Args:
            noise: ω_p and ω_d [..., N] to use in place of fresh noise; the first is for a low-rank part, which this
                has not.
            temperature: t_P, which changes nothing here, and t_L.
        """
        p, shape = self._parameters, checks.sizes("sample_shape", sample_shape) + self._batch_shape
        _, t_L = checks.temperatures(temperature)
        omega = arguments.as_local_noise(noise, p, shape).expand(*shape, p.N)
        with without_autocast(p.mean.device):
            dtype = p.result_dtype
            deviation = self.stencil.colour(omega, self.stencil.implementation(None)).to(dtype)
            y = torch.add(p.mean.materialise(dtype).to(dtype), deviation, alpha=t_L)
            return y.to(p.mean.dtype).expand(*shape, p.N)

    def condition(
        self, value: Tensor, observed: Tensor, variance: Tensor | float | None = None
    ) -> "StencilMultivariateNormal":
        """The distribution given the values at the pixels of a mask, over all N pixels.

        Its mean is μ + (Λ + M)⁻¹M(value − μ) and its precision Λ + M, with M = 1/τ² at observed pixels, by a Cholesky
        factorisation in float64 of blocks of rows. Where τ = 0 a pixel is pinned: it keeps its value, with variance 0,
        and density and entropy are those of the other pixels.

        Args:
            value: [..., N]; what stands at pixels that are not observed is ignored, NaN too.
            observed: bool, [..., N].
            variance: τ² of what is observed, a number or [..., N] or [..., 1]; none: it is exact.
        """
        p = self._parameters
        value, observed, noise, shape = self._observed(value, observed, variance)
        weight, pinned = known(observed, noise)
        after = self.stencil.given(weight, pinned)
        loc = p.mean.materialise(torch.float64).double()
        delta = torch.where(observed, value.double() - loc, torch.zeros((), dtype=loc.dtype, device=loc.device))
        mean = torch.where(pinned, value.double(), loc + fill(after, weight, pinned, delta))
        return StencilMultivariateNormal(mean.to(p.mean.dtype).expand(*shape, p.N), after, validate_args=False)

    def covariance_row(self, index: int | Tensor) -> Tensor:
        """Row `index` of Σ, `batch_shape + event_shape`: two triangular solves."""
        row = self.stencil.row(self._index(index), self._parameters.N)
        return row.expand(self._batch_shape + self._event_shape)

    @property
    def variance(self) -> Tensor:
        """diag Σ, exactly, in float64 inside; see `Stencil.variance` for what it costs, and `estimated_variance`."""
        return self.stencil.variance().expand(self._batch_shape + self._event_shape)

    def estimated_variance(self, samples: int = 64) -> Tensor:
        """A Monte Carlo estimate of `variance` from so many samples: its relative standard error is √(2/samples)."""
        with torch.no_grad():
            return (self.sample((samples,)) - self.loc).square().mean(0)
