"""A diagonal D: the kernels of a factor take it as it is."""

import torch
from torch import Tensor

from ..factors.base import Capacitance, Factor, Mean, Noise
from .base import Local


class Diagonal(Local):
    """D = diag(d), with d [..., N], or [..., 1] or 0-d for one variance of all pixels, which is never expanded."""

    def __init__(self, d: Tensor) -> None:
        self._given = d  # as it is: a view would stay behind where a module moves its parameters

    @property
    def d(self) -> Tensor:
        return self._given.unsqueeze(0) if self._given.dim() == 0 else self._given

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        return self.d.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.d.dtype

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.d.requires_grad

    def tensors(self) -> dict[str, Tensor]:
        return {"cov_diag": self._given}

    def density(
        self, value: Tensor, mean: Mean, factor: Factor, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]:
        return factor.density(value, mean, self.d, impl, given)

    def logdet(self, factor: Factor, impl: str) -> tuple[Tensor, Capacitance | None]:
        return factor.logdet(self.d, impl)

    def sample(self, mean: Mean, factor: Factor, shape: torch.Size, noise: Noise, impl: str) -> Tensor:
        return factor.sample(mean, self.d, shape, noise, impl)

    def condition(
        self, value: Tensor, observed: Tensor, mean: Mean, factor: Factor, shape: torch.Size, impl: str
    ) -> tuple[Tensor, Factor, Local]:
        loc, conditional, d = factor.condition(value, observed, mean, self.d, shape, impl)
        return loc, conditional, Diagonal(d)

    def variance(self) -> Tensor:
        return self.d

    def row(self, n: int, N: int) -> Tensor:
        pixel = self.d.new_zeros(N)
        pixel[n] = 1
        return self.d.expand(*self.batch_shape, N)[..., n, None] * pixel
