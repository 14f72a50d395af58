"""Full covariance in low-rank-plus-diagonal form: the paper's observation model."""

from torch import Tensor

from lowrank_mvn import LinearMean, LowRankMultivariateNormal

from ...config import Config, ModelConfig
from .base import FactorHead, Variance

__all__ = ["HEAD", "StructuredHead"]


class StructuredHead(FactorHead):
    """F → N(μ, PPᵀ + D): 1×1 convolutions for the mean, the factor and, if it is learned, the diagonal."""

    formulations = ("reference", "kernels", "linear")

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.variance = None if config.fixed_diagonal else Variance(features, channels, config.diagonal)

    @classmethod
    def limits(cls, config: Config) -> dict[str, float]:
        o, m = config.objective, config.model
        return {"entropy": o.entropy_limit(config.pixels, m.rank, m.diagonal)} if o.entropy_constraint else {}

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> LowRankMultivariateNormal:
        d = self.factor.weight.new_tensor(self.diagonal) if self.variance is None else self.variance(features)
        return LowRankMultivariateNormal(loc, self.low_rank(features), d, validate_args=False)


HEAD = StructuredHead
