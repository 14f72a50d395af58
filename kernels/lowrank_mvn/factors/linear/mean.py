"""A mean that is a linear map of features."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import without_autocast
from ..base import Mean
from ..dense.factor import DenseMean
from .features import Linear


@dataclass(frozen=True, eq=False)
class LinearMean(Linear, Mean):
    """A mean that is a 1×1 convolution of features, μ_c = Σ_k weight_ck F_k + bias_c.

    Given as `loc` beside a `LinearFactor` of the same features it joins the passes over them, and the gradient of the
    features is written once for both.

    Args:
        features: F, [B, K, *spatial].
        weight: [channels, K], or the convolution's own, [channels, K, 1, 1].
        bias: [channels], or none.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument that is not a tensor.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        K = self._checked()
        if self.weight.dim() == 4 and self.weight.shape[2:] == (1, 1):
            object.__setattr__(self, "weight", self.weight.flatten(1))
        if self.weight.dim() != 2 or self.weight.shape[1] != K:
            raise ValueError(f"weight has shape {list(self.weight.shape)}, expected [channels, {K}]")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias has shape {list(self.bias.shape)}, expected [{self.weight.shape[0]}]")

    @property
    def shape(self) -> torch.Size:
        """Of μ: [B, N]."""
        return torch.Size((self.features.shape[0], self.weight.shape[0] * math.prod(self.features.shape[2:])))

    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        """μ [B, N], differentiable; N = channels · pixels, channel by channel. In `dtype`, or that of the features."""
        F = self.features.flatten(2).to(dtype or self.dtype)
        with without_autocast(F.device):
            mu = self.weight.to(F.dtype) @ F
        return (mu if self.bias is None else mu + self.bias.to(mu.dtype).unsqueeze(-1)).flatten(1)

    def expands_to(self, batch_shape: torch.Size) -> Mean:
        if self.shape[:-1] == batch_shape:
            return self
        return DenseMean(self.materialise().expand(batch_shape + self.shape[-1:]))

    def linear_in(self, features: Tensor) -> "LinearMean | None":
        return self if self.source is features else None

    def homogeneous(self) -> Tensor:
        """m [channels, K+1]: weight and bias."""
        return self._homogeneous()
