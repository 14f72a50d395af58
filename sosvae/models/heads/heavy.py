"""Heavy tails over the paper's covariance: an image that the model explains badly costs less than under a normal."""

import math

import torch
from torch import Tensor, nn

from lowrank_mvn import LinearMean, LowRankMultivariateStudentT

from ...config import ModelConfig
from .structured import StructuredHead

__all__ = ["HEAD", "HeavyHead"]

DEGREES = 10.0  # of freedom at the start


class HeavyHead(StructuredHead):
    """F → t_ν(μ, PPᵀ + D), Student's t with learned degrees of freedom, the same for all images.

    ν = 2 + exp(·), so that there is a covariance, ν/(ν − 2) · (PPᵀ + D).
    """

    formulations = ("kernels", "linear")

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__(features, channels, config)
        self.degrees = nn.Parameter(torch.tensor(math.log(DEGREES - 2)))

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> LowRankMultivariateStudentT:
        df = 2 + self.degrees.exp()
        return LowRankMultivariateStudentT(
            df, loc, self.low_rank(features), self.diagonal_of(features), validate_args=False
        )


HEAD = HeavyHead
