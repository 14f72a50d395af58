"""`Stencil`: a local part whose precision has a sparse Cholesky factor, predicted for each pixel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import checks, reference
from ...factors.base import Factor, Mean
from ...layout import Layout, broadcast
from ...registry import chosen, forward_mode
from ..precision import Precision
from . import op
from .banded import Banded
from .conditioned import Conditioned, condition
from .grid import channel_pairs, offsets


@dataclass(frozen=True, eq=False)
class Stencil(Precision):
    """D = (TTᵀ)⁻¹ with T lower triangular in raster order: each pixel is tied to the later pixels of a neighbourhood.

    At pixel n of a channel, with t = exp(log_diagonal), weights s of the later neighbours and m of the later channels,

        (Tᵀδ)ₙ = tₙ (δₙ + Σₖ sₙₖ δₙ₊ₖ + Σ_c' mₙ_c' δₙ_c')

    so that off-diagonals are relative to the diagonal, and neighbours outside of the image count as 0, whatever their
    weights. The later neighbours of (3, 3) are, in this order, (0, 1), (1, −1), (1, 0) and (1, 1), as (row, column);
    in general all offsets of the neighbourhood that come after 0 in raster order, in raster order: 4 of (3, 3), 12 of
    (5, 5), 13 of (3, 3, 3).

    Args:
        log_diagonal: log t, [..., channels, *spatial]; [..., 1, *spatial] with `channels` for one stencil of all.
        neighbours: s, [..., channels (or 1), later neighbours, *spatial], zeros for independent pixels.
        ties: m, [..., pairs, *spatial] for the pairs (0, 1), (0, 2), …, (1, 2), … of a channel and a later one, or
            [..., pairs, 1, ..., 1] for the same ones at every pixel; none: independent channels.
        neighbourhood: odd sizes, one for each spatial dimension of an image, a volume or a row.
        channels: needed where all of them share one stencil.

    Events are flat, N = channels · pixels, channel by channel, as everywhere in this package. The leading dimensions
    broadcast. Half precision is read as such and computed in float32.

    Raises:
        ValueError: a shape that does not fit, or a neighbourhood larger than the image.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.
    """

    log_diagonal: Tensor
    neighbours: Tensor
    ties: Tensor | None = None
    neighbourhood: tuple[int, ...] = (3, 3)
    channels: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        checks.alike(**self.tensors())
        n = len(self.neighbourhood)
        if not n or any(size < 1 or size % 2 == 0 for size in self.neighbourhood) or not offsets(self.neighbourhood):
            raise ValueError(f"neighbourhood is {self.neighbourhood}, expected odd sizes, not all of them 1")
        object.__setattr__(self, "neighbourhood", tuple(self.neighbourhood))
        if self.log_diagonal.dim() < n + 1:
            raise ValueError(_wrong("log_diagonal", self.log_diagonal, f"[..., channels, {n} spatial dimensions]"))
        rows, spatial = self.log_diagonal.shape[-n - 1], self.log_diagonal.shape[-n:]
        if any(size // 2 >= side for size, side in zip(self.neighbourhood, spatial, strict=True)):
            raise ValueError(
                f"neighbourhood {self.neighbourhood} has neighbours that no pixel of an image of {list(spatial)} has"
            )
        channels = rows if self.channels is None else self.channels
        if channels < 1 or rows not in (1, channels):
            raise ValueError(_wrong("log_diagonal", self.log_diagonal, f"1 or channels = {channels} stencils"))
        expected = [rows, len(offsets(self.neighbourhood)), *spatial]
        if list(self.neighbours.shape[-n - 2 :]) != expected:
            raise ValueError(_wrong("neighbours", self.neighbours, f"[..., {str(expected)[1:]}"))
        batches = [self.log_diagonal.shape[: -n - 1], self.neighbours.shape[: -n - 2]]
        if self.ties is not None:
            count = len(channel_pairs(channels))
            allowed = [count, *spatial], [count] + [1] * n
            if not count or list(self.ties.shape[-n - 1 :]) not in allowed:
                raise ValueError(
                    _wrong("ties", self.ties, f"{count} pairs of {channels} channels, {' or '.join(map(str, allowed))}")
                )
            batches.append(self.ties.shape[: -n - 1])
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "spatial", spatial)
        object.__setattr__(self, "_batch", broadcast(*batches, names="log_diagonal, neighbours and ties"))

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        shape: torch.Size = self._batch  # type: ignore[attr-defined]
        return shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.log_diagonal.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.log_diagonal.device

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return any(t.requires_grad for t in self.tensors().values())

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return self._rows == 1 and (self.ties is None or self.ties.shape[-len(self.neighbourhood) :].numel() == 1)

    @property
    def _rows(self) -> int:
        """Stencils of an item: one, or one for each channel."""
        return self.log_diagonal.shape[-len(self.neighbourhood) - 1]

    def tensors(self) -> dict[str, Tensor]:
        parts = {"log_diagonal": self.log_diagonal, "neighbours": self.neighbours, "ties": self.ties}
        return {name: t for name, t in parts.items() if t is not None}

    def implementation(self, impl: str | None) -> str:
        return chosen(impl, op.IMPLEMENTATIONS, self.device, "a Stencil")

    # --- Products and solves --------------------------------------------------------------------------------------

    def own(self, value: Tensor, loc: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (value.shape[:-1], self.batch_shape)
            if loc is None
            else (value.shape[:-1], loc.shape[:-1], self.batch_shape)
        )
        layout = Layout(broadcast(*shapes), self.batch_shape)
        x, mean = self._samples(value, layout), None if loc is None else self._samples(loc, layout, layout.means)
        weights = self._weights(layout)
        if _textbook(impl):
            work: Any = [None if t is None else _work(t, impl) for t in (x, mean, *weights)]
            y, q, logdet = reference.stencil(*[*work, *self._where])
        else:
            y, q, logdet = op.product(x, mean, *weights, *self._where, impl)
        if layout.shape == layout.items_shape:
            return y.reshape(*layout.shape, value.shape[-1]), q.reshape(layout.shape), logdet.reshape(layout.shape)
        return layout.restore(y.flatten(2)), layout.restore(q), logdet.reshape(self.batch_shape)

    def rows(self, features: Tensor, impl: str) -> Tensor:
        untied = Stencil(self.log_diagonal, self.neighbours, None, self.neighbourhood, self.channels)
        stencilled: Tensor = untied.whiten(features.flatten(1), impl).unflatten(1, features.shape[1:])
        if self.ties is None:
            return stencilled
        t = self.log_diagonal.flatten(-len(self.neighbourhood)).exp().to(stencilled.dtype)
        return torch.cat([stencilled, t * features.to(stencilled.dtype)], 1)

    def gathered(self, weight: Tensor) -> Tensor:
        if self.ties is None:
            return weight
        pairs = channel_pairs(self.channels)
        place = weight.new_zeros(len(pairs), self.channels, self.channels)
        for k, (c, later) in enumerate(pairs):
            place[k, c, later] = 1
        m = torch.einsum("...p,pcd->...cd", self.ties.flatten(-len(self.neighbourhood) - 1).to(weight.dtype), place)
        return torch.cat(torch.broadcast_tensors(weight, torch.einsum("...cd,...rdk->...rck", m, weight)), -1)

    def own_logdet(self) -> Tensor:
        n = len(self.neighbourhood)
        total: Tensor = self.log_diagonal.flatten(-n - 1).sum(-1, dtype=torch.float64) * (
            -2 * (self.channels // self._rows)
        )
        return total.expand(self.batch_shape)

    def colour(self, omega: Tensor, impl: str) -> Tensor:
        return self._solve(omega, False, impl)

    def uncolour(self, value: Tensor) -> Tensor:
        return self._solve(value, True, self.implementation(None))

    def _solve(self, value: Tensor, transposed: bool, impl: str) -> Tensor:
        layout = Layout(broadcast(value.shape[:-1], self.batch_shape), self.batch_shape)
        x, weights = self._samples(value, layout), self._weights(layout)
        if _textbook(impl):
            work: Any = [None if t is None else _work(t, impl) for t in weights]
            matrix = reference.stencil_matrix(*[*work, self.channels, *self._where])
            right = _work(x, impl).flatten(2).unsqueeze(-1)
            return layout.restore(torch.linalg.solve(matrix.mT if transposed else matrix, right).squeeze(-1))
        return layout.restore(op.solve(x, *weights, *self._where, transposed, impl).flatten(2))

    def precision_times(self, value: Tensor) -> Tensor:
        """TTᵀ · value [..., N]."""
        layout = Layout(broadcast(value.shape[:-1], self.batch_shape), self.batch_shape)
        weights, impl = self._weights(layout), self.implementation(None)
        y = op.product(self._samples(value, layout), None, *weights, *self._where, impl)[0]
        return layout.restore(op.transpose(y, *weights, *self._where, impl).flatten(2))

    def banded(self, batch_shape: torch.Size | None = None) -> Banded:
        """T of each item [B] of a batch shape, its own by default, in dense blocks, float64."""
        items = self.batch_shape if batch_shape is None else batch_shape
        weights = self._weights(Layout(items, items))
        double: Any = [None if t is None else t.double() for t in weights]
        return Banded.of_stencil(*[*double, self.channels, *self._where])

    def given(self, weight: Tensor, pinned: Tensor) -> Conditioned:
        return Conditioned(self, weight, pinned)

    def condition(
        self,
        value: Tensor,
        observed: Tensor,
        mean: Mean,
        factor: Factor,
        shape: torch.Size,
        impl: str,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Factor, Precision]:
        return condition(self, self, value, observed, noise, mean, factor, shape)

    def variance(self) -> Tensor:
        """diag D [..., N], exactly, differentiable: Takahashi's recursion from the last rows of the image to the first.

        In float64, O(N b²) for b pixels in as many rows as a neighbourhood reaches down, of all channels where they are
        tied: seconds for a colour photograph, milliseconds at 64×64.
        """
        return self.banded().variance().reshape(*self.batch_shape, self.N).to(self.dtype)

    def double(self) -> "Stencil":
        """The same in float64."""
        ties = None if self.ties is None else self.ties.double()
        return Stencil(self.log_diagonal.double(), self.neighbours.double(), ties, self.neighbourhood, self.channels)

    # --- Canonical shapes -----------------------------------------------------------------------------------------

    @property
    def _where(self) -> tuple[list[int], list[int]]:
        return list(self.spatial), list(self.neighbourhood)

    def _samples(self, t: Tensor, layout: Layout, sort: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[..., N] -> [S, B, channels, pixels], at once where there are items alone."""
        pixels = self.spatial.numel()
        image = t.shape[-1] // pixels, pixels
        if layout.items_shape == layout.shape == t.shape[:-1]:
            return t.reshape(1, layout.B, *image)
        images: Tensor = (sort or layout.samples)(t).unflatten(-1, image)
        return images

    def _weights(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """log t, s and m of each item."""
        n, items = len(self.neighbourhood), layout.items_shape

        def canonical(t: Tensor, own: int) -> Tensor:
            """[..., *spatial] with `own` dimensions before these -> [B, ..., pixels], in few views: each is a node."""
            t = t.flatten(-n)
            trailing = t.shape[-own - 1 :]
            if t.shape[: -own - 1] != items:
                t = t.expand(*items, *trailing)
            return t if len(items) == 1 else t.reshape(layout.B, *trailing)

        ties = None if self.ties is None else canonical(self.ties, 1)
        return canonical(self.log_diagonal, 1), canonical(self.neighbours, 2), ties


def _wrong(name: str, t: Tensor, expected: str) -> str:
    return f"{name} has shape {list(t.shape)}, expected {expected}"


def _textbook(impl: str) -> bool:
    return impl == "reference" or forward_mode()


def _work(t: Tensor, impl: str) -> Tensor:
    """In the precision of the textbook: that of the tensors if it is asked for, else float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) if impl == "reference" else t.double()
