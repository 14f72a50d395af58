"""What a mean and a factor that are linear maps of features have in common: the checks, and what counts as detached."""

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ..base import Operand


class Linear(Operand):
    """A linear map of features [B, K, *spatial]."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    source: Tensor  # the features as they were given

    @property
    def given(self) -> "Linear":
        return self

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("features", "weight", "bias")}
        return {name: t for name, t in parts.items() if t is not None}

    def _checked(self) -> int:
        """K; raises where something is no tensor of numbers, or the features have no pixels."""
        for name in ("features", "weight", "bias"):
            t = getattr(self, name)
            if t is not None or name != "bias":
                checks.floating(name, t)
        if self.features.dim() < 3:
            raise ValueError(
                f"features has shape {list(self.features.shape)}, expected [B, K, *spatial] with at least one spatial"
                " dimension"
            )
        self._keep_grad_mode()
        return self.features.shape[1]

    def _keep_grad_mode(self) -> None:
        """Created under `no_grad` it stays detached, as the output of a convolution would."""
        object.__setattr__(self, "source", self.features)
        if not torch.is_grad_enabled():
            for name, t in self.tensors().items():
                if t.requires_grad:
                    object.__setattr__(self, name, t.detach())

    def _homogeneous(self) -> Tensor:
        """[..., K+1]: weight and bias."""
        bias = self.weight.new_zeros(self.weight.shape[:-1]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], -1)


def of_factor(weight: Tensor, channels: int | None, K: int) -> Tensor:
    """The weight of a factor [..., R, channels, K], of one in any of its forms."""
    if channels is not None:
        checks.count("channels", channels)
    # With K = 1 it might be one for each item.
    convolution = weight.dim() == 4 and weight.shape[2:] == (1, 1)
    if convolution and (K > 1 or (channels is not None and weight.shape[1] == K)):
        if channels is None or weight.shape[0] % channels:
            raise ValueError(
                f"weight has shape {list(weight.shape)}, the convolution's own; expected `channels` to divide its "
                f"first dimension, got {channels}"
            )
        weight = weight.flatten(1).unflatten(0, (-1, channels))
    if weight.dim() < 3 or weight.shape[-1] != K or 0 in weight.shape[-3:]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [R, channels, {K}] or [..., R, channels, {K}] with R and"
            f" channels of at least 1"
        )
    if channels not in (None, weight.shape[-2]):
        raise ValueError(
            f"weight has shape {list(weight.shape)}, [..., R, channels, {K}], where `channels` says {channels}"
        )
    return weight


def offset_of_factor(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """The bias of a factor [..., R, channels]."""
    if bias is None:
        return None
    R, channels = weight.shape[-3:-1]
    if bias.shape != weight.shape[:-1] and (weight.dim() > 3 or bias.shape != (R * channels,)):
        either = "" if weight.dim() > 3 else f" or [{R * channels}]"
        raise ValueError(f"bias has shape {list(bias.shape)}, expected {list(weight.shape[:-1])}{either}")
    return bias if bias.shape == weight.shape[:-1] else bias.unflatten(0, (R, channels))
