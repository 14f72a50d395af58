"""What is common to the whole image in a low-rank factor, what is common to neighbours in a sparse precision."""

import torch
from torch import Tensor, nn

from lowrank_mvn import GlobalLocalNormal, LinearMean

from ...config import ModelConfig
from .base import FactorHead, StencilWeights

__all__ = ["HEAD", "GlobalLocalHead"]

FACTOR_STD = 1e-2  # of the factor's weights at the start: from 1e-5 the low-rank part takes long to be noticed


class GlobalLocalHead(FactorHead):
    """F → N(μ, PPᵀ + (TTᵀ)⁻¹), with one stencil for all channels, and ties of channels that are the same everywhere."""

    formulations = ("kernels", "linear")

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config, FACTOR_STD)
        self.stencil = StencilWeights(features, channels, config.neighbourhood, 1, tied=False)
        pairs = channels * (channels - 1) // 2
        self.ties = nn.Parameter(torch.zeros(pairs, 1, 1)) if pairs else None

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> GlobalLocalNormal:
        return GlobalLocalNormal(loc, self.low_rank(features), self.stencil(features, self.ties), validate_args=False)


HEAD = GlobalLocalHead
