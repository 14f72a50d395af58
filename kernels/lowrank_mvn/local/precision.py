"""A local part that is given by a root of its precision: D⁻¹ = TTᵀ. Whatever T is, Tᵀ makes it a unit diagonal."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ..factors.base import Capacitance, Factor, Mean, Noise, result_dtype
from ..factors.dense.factor import DenseMean
from ..layout import broadcast
from ..registry import without_autocast
from .base import Local

if TYPE_CHECKING:
    from .stencil.conditioned import Conditioned


class Precision(Local):
    """D = (TTᵀ)⁻¹. With Q = TᵀP and δ' = Tᵀδ it is q = δ'ᵀ(QQᵀ + I)⁻¹δ' and log|Σ| = log|QQᵀ + I| − 2 Σ log t."""

    channels: int
    spatial: torch.Size
    shared = False
    device: torch.device

    @property
    def N(self) -> int:
        """Size of the event: channels · pixels."""
        return self.channels * self.spatial.numel()

    def free(self) -> Tensor | int:
        """How many pixels have a density, of the batch shape or for all: N, less those that are known exactly."""
        return self.N

    def implementation(self, impl: str | None) -> str:
        """`impl`, or the default."""
        return "aten" if impl is None else impl

    @abstractmethod
    def own(self, value: Tensor, loc: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tᵀ(value − μ) [..., N] and its square, in the broadcast shape, and log|D| in that of the batch."""

    @abstractmethod
    def own_logdet(self) -> Tensor:
        """log|D| of the batch shape, float64."""

    @abstractmethod
    def colour(self, omega: Tensor, impl: str) -> Tensor:
        """T⁻ᵀω [..., N]: with standard normal ω a sample of N(0, D)."""

    def whiten(self, value: Tensor, impl: str) -> Tensor:
        return self.own(value, None, impl)[0]

    def rows(self, features: Tensor, impl: str) -> Tensor:
        """See `Root`; only of a T that is `shared`."""
        raise NotImplementedError

    def gathered(self, weight: Tensor) -> Tensor:
        """See `Root`; only of a T that is `shared`."""
        raise NotImplementedError

    def result_dtype(self, *others: Mean | Factor) -> torch.dtype:
        """The dtype of densities, which samples are computed in too."""
        return result_dtype(*self.tensors().values(), *others)

    # --- Beside a factor ------------------------------------------------------------------------------------------

    def density(
        self, value: Tensor, mean: Mean, factor: Factor, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]:
        y, _, own = self.own(value, mean.materialise(self.result_dtype(mean, factor)), impl)
        zero, one = y.new_zeros(1), y.new_ones(1)
        whitened = factor.whitened(self, impl)
        q, logdet, capacitance = whitened.density(y, DenseMean(zero.expand(self.N)), one, impl, given)
        items = broadcast(logdet.shape, own.shape)
        return q.expand(broadcast(q.shape, items)), logdet.expand(items) + own, capacitance

    def logdet(self, factor: Factor, impl: str) -> tuple[Tensor, Capacitance | None]:
        one = torch.ones((1,), dtype=self.result_dtype(factor), device=self.device)
        logdet, capacitance = factor.whitened(self, impl).logdet(one, impl)
        return logdet + self.own_logdet(), capacitance

    def sample(self, mean: Mean, factor: Factor, shape: torch.Size, noise: Noise, impl: str) -> Tensor:
        assert noise.omega_d is not None
        dtype, high = torch.promote_types(mean.dtype, factor.dtype), self.result_dtype(mean, factor)
        with without_autocast(self.device):
            y = mean.materialise(high).to(high) + factor.times(noise.omega_p).to(high)
            return (y + self.colour(noise.omega_d, impl).to(high)).to(dtype).expand(*shape, self.N)

    def row(self, n: int, N: int) -> Tensor:
        pixel = torch.zeros(N, dtype=self.result_dtype(), device=self.device)
        pixel[n] = 1
        return self.colour(self.uncolour(pixel), self.implementation(None)).to(self.dtype)

    @abstractmethod
    def double(self) -> Self:
        """The same in float64."""

    @abstractmethod
    def given(self, weight: Tensor, pinned: Tensor) -> "Conditioned":
        """The local part when pixels are known: `weight` 1/τ² [..., N] more precision, and those that are `pinned`."""

    @abstractmethod
    def condition(
        self,
        value: Tensor,
        observed: Tensor,
        mean: Mean,
        factor: Factor,
        shape: torch.Size,
        impl: str,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Factor, "Precision"]:
        """`Local.condition`, with noise: the variance τ² of what is observed, 0 or none if it is exact."""

    @abstractmethod
    def uncolour(self, value: Tensor) -> Tensor:
        """T⁻¹ · value [..., N]."""
