"""A sparse Cholesky factor of the precision: structured uncertainty prediction networks (Dorta et al. 2018)."""

from torch import Tensor

from lowrank_mvn import LinearMean, StencilMultivariateNormal

from ...config import ModelConfig
from .base import Head, StencilWeights

__all__ = ["HEAD", "PrecisionHead"]


class PrecisionHead(Head):
    """F → N(μ, (TTᵀ)⁻¹): each channel has a stencil of its own, and at each pixel channels are tied."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.stencil = StencilWeights(features, channels, config.neighbourhood, channels, tied=True)

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> StencilMultivariateNormal:
        return StencilMultivariateNormal(loc, self.stencil(features), validate_args=False)


HEAD = PrecisionHead
