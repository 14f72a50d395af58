"""p(x|z), which a head returns: what all of them answer to, and the one with independent pixels."""

from typing import Any, Protocol

import torch
import torch.distributions as td
from torch import Tensor

__all__ = ["Observation", "PixelwiseNormal"]


class Observation(Protocol):
    """A distribution over flattened images, batch shape [B], event shape [N], in the order channel, row, column.

    `loc`, `variance`, its diagonal part `cov_diag` and a row of Σ are [B, N]; log p and H are [B], in nats.
    """

    @property
    def loc(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    @property
    def cov_diag(self) -> Tensor: ...
    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]: ...
    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ...) -> Tensor: ...
    def covariance_row(self, index: int) -> Tensor: ...


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

    def rsample(  # type: ignore[override]  # one argument more than torch's
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """y = μ + √d ⊙ ω_d; of `noise` = (ω_p, ω_d) the first is for the low-rank part and has no use here."""
        if noise is None:
            return super().rsample(torch.Size(sample_shape))
        return self.loc + self.cov_diag.sqrt() * noise[1]

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
