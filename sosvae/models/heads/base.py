"""What all heads answer to, and the convolutions that they are made of."""

import math
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_mvn import LinearFactor, LinearMean, Stencil

from ...config import Config, ModelConfig
from ..observation import Observation, PixelwiseNormal

__all__ = ["FactorHead", "Head", "Pointwise", "StencilWeights", "Variance"]

INITIAL_STD = 1e-5  # standard deviation of a head's weights at the start (the paper's N(0, 1e-5))
MIN_VARIANCE = 1e-5  # of a learned diagonal: a pixel that never changes has a density without bound otherwise
LOCAL_VARIANCE = 6e-3  # at the start, of a pixel given the later ones: about what a small network's mean leaves


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
        self.layers = Layers(features, config.head_layers)

    @classmethod
    def limits(cls, config: Config) -> dict[str, float]:
        """ξ of each constraint that belongs to this observation model, by the name of its term, in nats."""
        return {}

    def forward(self, features: Tensor, mean_only: bool = False) -> Observation:
        if mean_only:
            return self.mean_alone(features)
        features = self.prepared(features)
        return self.observation(self.location(features), self.layers(features))

    def prepared(self, features: Tensor) -> Tensor:
        """The features in the precision and layout that all parts of the head read them in."""
        return features

    def location(self, features: Tensor) -> Tensor | LinearMean:
        """μ [B, N]."""
        return cast(Tensor, self.mean(features)).flatten(1)

    def observation(self, loc: Tensor | LinearMean, features: Tensor) -> Observation:
        """p(x|z) with the mean `loc` and a covariance from `features`, those that have gone through the layers."""
        raise NotImplementedError

    def mean_alone(self, features: Tensor) -> Observation:
        """N(μ, d·I) of the first phase of training; no part of the covariance is used, so none gets a gradient."""
        return PixelwiseNormal(self.mean(features).flatten(1), self.mean.weight.new_tensor(self.diagonal))


class FactorHead(Head):
    """A head with a low-rank factor P, the output of a 1×1 convolution.

    `factor.weight` is [R·channels, K, 1, 1]; row r·channels + c makes channel c of column r of P. P and the mean are
    not built by default: the likelihood is computed from features and weights. If the configuration asks for P, it is
    the transposed view of the convolution's output, [B, R, N], without a copy.
    """

    def __init__(self, features: int, channels: int, config: ModelConfig, std: float = INITIAL_STD) -> None:
        super().__init__(features, channels, config)
        self.rank, self.linear = config.rank, config.factor == "linear"
        self.factor = Pointwise(features, config.rank * channels, std=std)

    def prepared(self, features: Tensor) -> Tensor:
        if self.linear:
            return features
        # An event counts channel by channel, so planes are written: K are copied here, not R·channels later.
        return features.to(self.factor.weight.dtype, memory_format=torch.contiguous_format)

    def location(self, features: Tensor) -> Tensor | LinearMean:
        return LinearMean(features, self.mean.weight, self.mean.bias) if self.linear else super().location(features)

    def low_rank(self, features: Tensor) -> Tensor | LinearFactor:
        """P [B, N, R]."""
        if self.linear:
            return LinearFactor(features, self.factor.weight, self.factor.bias, self.channels)
        columns: Tensor = self.factor(features).flatten(2).unflatten(1, (self.rank, -1)).flatten(2)
        return columns.mT


class Layers(nn.Sequential):
    """`count` 3×3 convolutions with a ReLU each, [B, K, H, W] → [B, K, H, W], in the precision of their weights."""

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        for _ in range(count):
            self.extend([nn.Conv2d(features, features, 3, padding=1), nn.ReLU()])

    def forward(self, features: Tensor) -> Tensor:
        if not len(self):
            return features
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, nn.Sequential.forward(self, features.to(next(self.parameters()).dtype)))  # type: ignore[no-untyped-call]


class Pointwise(nn.Conv2d):
    """A 1×1 convolution that starts as the paper's, and keeps the precision of its weights under autocast."""

    def __init__(self, features: int, outputs: int, bias: float = 0.0, std: float = INITIAL_STD) -> None:
        super().__init__(features, outputs, 1)
        if not self.weight.is_meta:  # there torch imports its compiler to draw nothing: 1.4 s
            nn.init.normal_(self.weight, std=std)
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


class StencilWeights(nn.Module):
    """Features → the `Stencil` of each item: independent pixels of variance 6e-3 at first.

    t⁻², the variance of a pixel given the later ones, has the floor of a learned diagonal: t⁻² = exp(·) + 1e-5.

    Args:
        stencils: one for all channels, or one for each.
        tied: each channel of a pixel with the later ones, by weights of its own at each pixel.
    """

    def __init__(self, features: int, channels: int, side: int, stencils: int, tied: bool) -> None:
        super().__init__()
        self.channels, self.side, self.stencils = channels, side, stencils
        later = (side**2 - 1) // 2
        self.sizes = stencils, stencils * later, channels * (channels - 1) // 2 if tied else 0
        self.weights = Pointwise(features, sum(self.sizes), std=0.0)
        with torch.no_grad():
            cast(Tensor, self.weights.bias)[:stencils] = math.log(LOCAL_VARIANCE - MIN_VARIANCE)

    def forward(self, features: Tensor, ties: Tensor | None = None) -> Stencil:
        """`ties` [pairs, 1, 1]: those of all pixels, where there are none of each."""
        log_variance, neighbours, own_ties = self.weights(features).split(self.sizes, 1)
        log_t = -0.5 * torch.logaddexp(log_variance, log_variance.new_tensor(math.log(MIN_VARIANCE)))
        neighbours = neighbours.unflatten(1, (self.stencils, -1))
        return Stencil(log_t, neighbours, own_ties if self.sizes[2] else ties, (self.side, self.side), self.channels)
