"""What all heads answer to, and the 1×1 convolutions that they are made of."""

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ...config import Config, ModelConfig
from ..observation import Observation, PixelwiseNormal

__all__ = ["Head", "Pointwise", "Variance"]

INITIAL_STD = 1e-5  # standard deviation of a head's weights at the start (the paper's N(0, 1e-5))
MIN_VARIANCE = 1e-5  # of a learned diagonal: a pixel that never changes has a density without bound otherwise


class Head(nn.Module):
    """Decoder features F [B, K, H, W] → p(x|z), batch shape [B], event shape [channels · H · W].

    A head is a subclass in a module of its own, which gives `observation`, and overrides the rest where it differs.
    Under autocast features may be of half precision; weights and distribution stay as they are.
    """

    formulations: ClassVar[tuple[str, ...]] = ()
    """Ways to take the likelihood that planning tells apart, of `planning.memory.FORMULATIONS`; none: there is one."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.channels, self.diagonal = channels, config.diagonal
        self.mean = Pointwise(features, channels, 0.5)

    @classmethod
    def limits(cls, config: Config) -> dict[str, float]:
        """ξ of each constraint that belongs to this observation model, by the name of its term, in nats."""
        return {}

    def forward(self, features: Tensor, mean_only: bool = False) -> Observation:
        return self.mean_alone(features) if mean_only else self.observation(features)

    def observation(self, features: Tensor) -> Observation:
        """p(x|z)."""
        raise NotImplementedError

    def mean_alone(self, features: Tensor) -> Observation:
        """N(μ, d·I) of the first phase of training; no part of the covariance is used, so none gets a gradient."""
        return PixelwiseNormal(self.mean(features).flatten(1), self.mean.weight.new_tensor(self.diagonal))


class Pointwise(nn.Conv2d):
    """A 1×1 convolution that starts as the paper's, and keeps the precision of its weights under autocast."""

    def __init__(self, features: int, outputs: int, bias: float = 0.0) -> None:
        super().__init__(features, outputs, 1)
        if not self.weight.is_meta:  # there torch imports its compiler to draw nothing: 1.4 s
            nn.init.normal_(self.weight, std=INITIAL_STD)
        nn.init.constant_(cast(Tensor, self.bias), bias)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


class Variance(Pointwise):
    """d = softplus(·) + 1e-5, [B, N], near `start` at first."""

    def __init__(self, features: int, channels: int, start: float) -> None:
        super().__init__(features, channels, start + math.log(-math.expm1(-start)))  # softplus⁻¹

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.softplus(super().forward(features).flatten(1)) + MIN_VARIANCE
