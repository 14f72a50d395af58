"""Full covariance in low-rank-plus-diagonal form: the paper's observation model."""

from typing import ClassVar

from torch import Tensor

from lowrank_mvn import LinearMean, LowRankMultivariateNormal

from ...config import Config, ModelConfig
from ..observation import Observation
from .base import FactorHead, Variance

__all__ = ["HEAD", "StructuredHead"]


class StructuredHead(FactorHead):
    """F → N(μ, PPᵀ + D): 1×1 convolutions for the mean, the factor and, if it is learned, the diagonal."""

    formulations: ClassVar[tuple[str, ...]] = ("reference", "kernels", "linear")

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.variance = None if config.fixed_diagonal else Variance(features, channels, config.diagonal)

    @classmethod
    def limits(cls, config: Config) -> dict[str, float]:
        o, m = config.objective, config.model
        return {"entropy": o.entropy_limit(config.pixels, m.rank, m.diagonal)} if o.entropy_constraint else {}

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> Observation:
        d = self.diagonal_of(features)
        return LowRankMultivariateNormal(loc, self.low_rank(features), d, validate_args=False)

    def diagonal_of(self, features: Tensor) -> Tensor:
        """d: 0-d where it is fixed, else [B, N]."""
        if self.variance is None:
            return self.factor.weight.new_tensor(self.diagonal)
        d: Tensor = self.variance(features)
        return d


HEAD = StructuredHead
