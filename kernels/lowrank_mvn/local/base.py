"""The part of Σ that is not low-rank, seen from the factor beside it. A new kind is one file or folder beside it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..factors.base import Capacitance, Factor, Mean, Noise


class Local(ABC):
    """The covariance D in Σ = PPᵀ + D, and what the public functions compute with it.

    Arguments and results are those of the methods of `Factor` of the same name.
    """

    batch_shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the name that an error should give."""

    @abstractmethod
    def density(
        self, value: Tensor, mean: Mean, factor: Factor, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]: ...

    @abstractmethod
    def logdet(self, factor: Factor, impl: str) -> tuple[Tensor, Capacitance | None]: ...

    @abstractmethod
    def sample(self, mean: Mean, factor: Factor, shape: torch.Size, noise: Noise, impl: str) -> Tensor: ...

    @abstractmethod
    def condition(
        self, value: Tensor, observed: Tensor, mean: Mean, factor: Factor, shape: torch.Size, impl: str
    ) -> tuple[Tensor, Factor, "Local"]: ...

    @abstractmethod
    def variance(self) -> Tensor:
        """diag D, [..., N] or [..., 1]."""

    @abstractmethod
    def row(self, n: int, N: int) -> Tensor:
        """Row n of D, [..., N]."""
