"""Independent pixels with a learned variance each: the β-VAE's observation model."""

from torch import Tensor

from lowrank_mvn import LinearMean

from ...config import ModelConfig
from ..observation import PixelwiseNormal
from .base import Head, Variance

__all__ = ["HEAD", "PixelwiseHead"]


class PixelwiseHead(Head):
    """F → N(μ, diag d)."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.variance = Variance(features, channels, config.diagonal)

    def prepared(self, features: Tensor) -> Tensor:
        return features.to(self.variance.weight.dtype)

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> PixelwiseNormal:
        assert isinstance(loc, Tensor)
        return PixelwiseNormal(loc, self.variance(features))


HEAD = PixelwiseHead
