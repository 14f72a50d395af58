"""Full covariance in low-rank-plus-diagonal form: the paper's observation model."""

import torch
from torch import Tensor

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal

from ...config import Config, ModelConfig
from .base import Head, Pointwise, Variance

__all__ = ["HEAD", "StructuredHead"]


class StructuredHead(Head):
    """F → N(μ, PPᵀ + D): 1×1 convolutions for the mean, the factor and, if it is learned, the diagonal.

    `factor.weight` is [R·channels, K, 1, 1]; row r·channels + c makes channel c of column r of P. P and the mean are
    not built by default: the likelihood goes from the features straight to the weights. Where the configuration asks
    for P, it is the transposed view of the convolution's output, [B, R, N], without a copy.
    """

    formulations = ("reference", "kernels", "linear")

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.rank, self.linear = config.rank, config.factor == "linear"
        self.factor = Pointwise(features, config.rank * channels)
        self.variance = None if config.fixed_diagonal else Variance(features, channels, config.diagonal)

    @classmethod
    def limits(cls, config: Config) -> dict[str, float]:
        o, m = config.objective, config.model
        return {"entropy": o.entropy_limit(config.pixels, m.rank, m.diagonal)} if o.entropy_constraint else {}

    def observation(self, features: Tensor) -> LowRankMultivariateNormal:
        d = self.mean.weight.new_tensor(self.diagonal) if self.variance is None else self.variance(features)
        loc: Tensor | LinearMean
        P: Tensor | LinearFactor
        if self.linear:
            loc = LinearMean(features, self.mean.weight, self.mean.bias)
            P = LinearFactor(features, self.factor.weight, self.factor.bias, self.channels)
        else:
            # An event counts channel by channel, so planes are written: K are copied here, not R·channels later.
            features = features.to(self.mean.weight.dtype, memory_format=torch.contiguous_format)
            loc = self.mean(features).flatten(1)  # [B, N]
            P = self.factor(features).flatten(2).unflatten(1, (self.rank, -1)).flatten(2).mT  # [B, N, R]
        return LowRankMultivariateNormal(loc, P, d, validate_args=False)


HEAD = StructuredHead
