"""What a low-rank factor and a mean answer to, whatever they are made of. A new kind is one folder beside `dense`."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ..registry import chosen

Diagonal = Tensor  # d [..., N] or [..., 1]


class Capacitance(NamedTuple):
    """What a pass over a factor leaves for the next call with the same factor and diagonal, in canonical shapes."""

    L_inv: Tensor
    logdet: Tensor
    wide: Tensor


class Noise(NamedTuple):
    """Standard normal noise of samples; without ω_d the kernels draw it from a seed of torch's generator."""

    omega_p: Tensor  # [*shape, R]
    omega_d: Tensor | None  # [..., N], broadcasts to the shape of the samples


class Operand(ABC):
    """Something that stands for a tensor."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abstractmethod
    def given(self) -> Any:
        """What the user gave: a tensor, or a linear map of features."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name; that of a tensor itself is empty."""

    @abstractmethod
    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, in its own dtype; if it has to be made, in `dtype` where that is given, which rounds less."""

    @property
    def _first(self) -> Tensor:
        return next(iter(self.tensors().values()))

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def is_cuda(self) -> bool:
        return self._first.is_cuda

    def dim(self) -> int:
        return len(self.shape)

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self.tensors().values())


class Mean(Operand):
    """μ [..., N]."""

    def linear_in(self, features: Tensor) -> Any | None:
        """The mean itself, if it is a linear map of these features: it then joins a factor's passes over them."""
        return None

    @abstractmethod
    def expands_to(self, batch_shape: torch.Size) -> "Mean":
        """The mean in the whole batch shape, in the form that joins the passes of a factor as long as it can."""


class Root(Protocol):
    """T of a precision TTᵀ, as a factor applies it to itself."""

    channels: int
    shared: bool  # whether TᵀP of a linear factor is one: one map of pixels for all channels, and one of channels

    @property
    def batch_shape(self) -> torch.Size: ...

    def whiten(self, value: Tensor, impl: str) -> Tensor:
        """Tᵀ · value [..., N]."""

    def rows(self, features: Tensor, impl: str) -> Tensor:
        """Of features [B, K, pixels], those that TᵀP is linear in if P is linear in them, [B, K', pixels]."""

    def gathered(self, weight: Tensor) -> Tensor:
        """The weight of these [..., R, channels, K'], of that of the features, [..., R, channels, K]."""


class Factor(Operand):
    """P [..., N, R], and what the public functions compute with it.

    `value` is [..., N]; `shape` is that of the samples or of the broadcast arguments without N. An `impl` is one of
    `available()`.
    """

    kind: str  # what errors call it
    implementations: dict[str, Any]

    def implementation(self, impl: str | None) -> str:
        """`impl`, or the default; raises ValueError where it is not available, with those that are."""
        return chosen(impl, self.implementations, self.device, self.kind)

    @abstractmethod
    def density(
        self, value: Tensor, mean: Mean, d: Diagonal, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]:
        """q in the broadcast shape of everything, log|Σ| in that of P and d, and what a next call can be given."""

    @abstractmethod
    def logdet(self, d: Diagonal, impl: str) -> tuple[Tensor, Capacitance | None]:
        """log|Σ| alone, and what a next call can be given."""

    @abstractmethod
    def sample(self, mean: Mean, d: Diagonal, shape: torch.Size, noise: Noise, impl: str) -> Tensor:
        """y = μ + Pω_p + √d ω_d, [*shape, N]."""

    @abstractmethod
    def condition(
        self, value: Tensor, observed: Tensor, mean: Mean, d: Diagonal, shape: torch.Size, impl: str
    ) -> tuple[Tensor, "Factor", Tensor]:
        """Mean, factor and diagonal given the values at the pixels of the mask `observed` [..., N]."""

    @abstractmethod
    def whitened(self, root: "Root", impl: str) -> "Factor":
        """The factor TᵀP of a root T of a precision, which beside a unit diagonal is P beside (TTᵀ)⁻¹."""

    @abstractmethod
    def times(self, omega: Tensor) -> Tensor:
        """Pω [..., N] of `omega` [..., R]."""

    @abstractmethod
    def row(self, n: int) -> Tensor:
        """Row n of P, [..., R]."""

    @abstractmethod
    def row_norms(self) -> Tensor:
        """diag PPᵀ [..., N]."""

    @abstractmethod
    def gram(self) -> Tensor:
        """PᵀP [..., R, R], from products in float64."""

    @abstractmethod
    def mix(self, A: Tensor) -> Self:
        """The factor PA, with `A` [..., R, Q]."""


def result_dtype(*operands: Tensor | Operand) -> torch.dtype:
    """The dtype of a log-density: float64 where any operand is, else float32; never half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
