"""Independent pixels with a learned variance each: the β-VAE's observation model."""

from torch import Tensor

from ...config import ModelConfig
from ..observation import PixelwiseNormal
from .base import Head, Variance

__all__ = ["HEAD", "PixelwiseHead"]


class PixelwiseHead(Head):
    """F → N(μ, diag d)."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.variance = Variance(features, channels, config.diagonal)

    def observation(self, features: Tensor) -> PixelwiseNormal:
        features = features.to(self.mean.weight.dtype)
        return PixelwiseNormal(self.mean(features).flatten(1), self.variance(features))


HEAD = PixelwiseHead
