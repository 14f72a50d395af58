"""p(x|z), which a head returns: what all of them answer to, and the one with independent pixels."""

from typing import Any, Protocol

import torch
import torch.distributions as td
from torch import Tensor

from lowrank_mvn import checks

__all__ = ["Observation", "PixelwiseNormal", "Temperature", "own_variance", "variance"]

Temperature = tuple[float, float]
"""(t_P, t_L) of a sample y = μ + t_P · (what is global) + t_L · (what is local); a diagonal is local."""

EXACT_VALUES = 1 << 16  # of an image, up to which the variance under a sparse precision is worked out exactly
DRAWN = 64  # samples that it is estimated from beyond: a standard error of 18 %


class Observation(Protocol):
    """A distribution over flattened images, batch shape [B], event shape [N], in the order channel, row, column.

    `loc`, `variance` and a row of Σ are [B, N]; log p and H are [B], in nats.
    """

    @property
    def batch_shape(self) -> torch.Size: ...
    @property
    def event_shape(self) -> torch.Size: ...
    @property
    def loc(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    def log_prob(self, value: Tensor) -> Tensor: ...
    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]: ...
    def rsample(
        self,
        sample_shape: torch.Size | tuple[int, ...] = ...,
        *,
        noise: Any = ...,
        temperature: Temperature = ...,
    ) -> Tensor: ...
    def condition(self, value: Tensor, observed: Tensor) -> "Observation": ...
    def covariance_row(self, index: int) -> Tensor: ...


def variance(p: Observation) -> tuple[Tensor, str]:
    """The variance of each pixel [B, N], and how it was come by: "exact", or where that takes seconds an estimate."""
    estimate = getattr(p, "estimated_variance", None)
    if estimate is None or p.event_shape.numel() <= EXACT_VALUES:
        return p.variance, "exact"
    return estimate(DRAWN), f"estimated from {DRAWN} samples"


def own_variance(p: Observation) -> Tensor:
    """What a pixel varies by alone [B, N]: the diagonal D. Under a sparse precision there is nothing of the kind."""
    diagonal: Tensor | None = getattr(p, "cov_diag", None)
    return torch.zeros_like(p.loc) if diagonal is None else diagonal


class PixelwiseNormal(td.Independent[td.Normal]):
    """N(μ, diag d) over flattened images, with what `LowRankMultivariateNormal` answers to and has no P for.

    Args:
        loc: mean, [B, N].
        cov_diag: variance, [B, N] or anything that broadcasts to it (squared intensity).
    """

    def __init__(self, loc: Tensor, cov_diag: Tensor) -> None:
        super().__init__(td.Normal(loc, cov_diag.sqrt(), validate_args=False), 1, validate_args=False)
        self.loc = loc
        self.cov_diag = cov_diag.expand_as(loc)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PixelwiseNormal":
        shape = torch.Size(batch_shape) + self.event_shape
        return PixelwiseNormal(self.loc.expand(shape), self.cov_diag.expand(shape))

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """log p(value) and H, each [B], in nats."""
        return self.log_prob(value), self.entropy()  # type: ignore[no-untyped-call]

    def rsample(  # type: ignore[override]  # more arguments than torch's
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        noise: tuple[Tensor | None, Tensor] | None = None,
        temperature: Temperature = (1.0, 1.0),
    ) -> Tensor:
        """y = μ + t_L·√d ⊙ ω_d.

        Args:
            noise: (ω_p, ω_d); the first is for a low-rank part and has no use here.
            temperature: t_P, which changes nothing here, and t_L.
        """
        _, t_L = checks.temperatures(temperature)
        if noise is None and t_L == 1:
            return super().rsample(torch.Size(sample_shape))
        shape = torch.Size(sample_shape) + self.loc.shape
        omega_d = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device) if noise is None else noise[1]
        return self.loc + t_L * self.cov_diag.sqrt() * omega_d

    def condition(self, value: Tensor, observed: Tensor) -> "PixelwiseNormal":
        """Observed pixels (bool mask, [..., N]) get their value and no variance; the others know nothing of it."""
        return PixelwiseNormal(
            torch.where(observed, value, self.loc),
            torch.where(observed, self.cov_diag.new_zeros(()), self.cov_diag),
        )

    def covariance_row(self, index: int) -> Tensor:
        """Row `index` of Σ, [B, N]: zero but for the pixel itself."""
        row = torch.zeros_like(self.loc)
        row[..., index] = self.cov_diag[..., index]
        return row
