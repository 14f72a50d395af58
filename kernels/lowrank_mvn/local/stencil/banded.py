"""A sparse triangular factor in dense blocks of rows of the image: exact variances, and precisions that have more on
their diagonal.

A pixel reaches down at most r rows (planes, of a volume). With blocks of r rows, T is block bidiagonal and TTᵀ + M
block tridiagonal: its Cholesky factor is block bidiagonal again, and the diagonal of its inverse follows from the last
block to the first (Takahashi's recursion). O(N b²) operations for blocks of b pixels and channels; in float64 and in
torch's own operators, which differentiate it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from .grid import Sizes, channel_pairs, pairs


@dataclass(frozen=True)
class Cut:
    """How the pixels of all channels fall into blocks; the last one is filled up with rows that tie nothing."""

    channels: int  # of a block: all of them, or one, where channels are independent and an item is several
    spatial: Sizes
    rows: int  # of a block
    groups: int  # of channels

    @property
    def blocks(self) -> int:
        return -(-self.spatial[0] // self.rows)

    @property
    def filled(self) -> int:
        """Rows that the last block has too many."""
        return self.blocks * self.rows - self.spatial[0]

    @property
    def width(self) -> int:
        """Pixels of one row."""
        return torch.Size(self.spatial[1:]).numel()

    def split(self, x: Tensor, fill: float = 0.0) -> list[Tensor]:
        """[S, B, N] -> blocks [B · groups, b, S]."""
        image = x.unflatten(-1, (self.groups, self.channels, self.spatial[0], self.width)).flatten(1, 2)
        image = torch.nn.functional.pad(image, (0, 0, 0, self.filled), value=fill)
        parts = image.unflatten(3, (self.blocks, self.rows)).permute(1, 3, 2, 4, 5, 0).flatten(2, 4)
        return list(parts.unbind(1))

    def join(self, parts: list[Tensor]) -> Tensor:
        """Undoes `split`."""
        image = torch.stack(parts, 1).unflatten(2, (self.channels, self.rows, self.width))
        rows: Tensor = image.permute(5, 0, 2, 1, 3, 4).flatten(3, 4)
        return self.items(rows[:, :, :, : self.spatial[0]], 1).flatten(2)

    def items(self, t: Tensor, dim: int) -> Tensor:
        """[..., B · groups, ...] -> [..., B, groups, ...]."""
        apart: Tensor = t.unflatten(dim, (t.shape[dim] // self.groups, self.groups))
        return apart

    def places(self, c: int, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each pixel of a channel, and the place in it."""
        row, rest = pixel // self.width, pixel % self.width
        return row // self.rows, (c * self.rows + row % self.rows) * self.width + rest


class Banded:
    """A block bidiagonal L: `diagonal` [items, b, b], lower triangular, and `below` [items, b, b], for each block."""

    def __init__(self, cut: Cut, diagonal: list[Tensor], below: list[Tensor]) -> None:
        self.cut, self.diagonal, self.below = cut, diagonal, below

    @classmethod
    def of_stencil(
        cls,
        log_diagonal: Tensor,
        neighbours: Tensor,
        ties: Tensor | None,
        channels: int,
        spatial: list[int],
        neighbourhood: list[int],
    ) -> "Banded":
        """T, of weights in canonical shapes; independent channels are items by themselves, whose blocks are smaller."""
        groups = 1 if ties is not None else channels
        if groups > 1:
            log_diagonal = log_diagonal.expand(-1, channels, -1).flatten(0, 1).unsqueeze(1)
            neighbours = neighbours.expand(-1, channels, -1, -1).flatten(0, 1).unsqueeze(1)
            channels = 1
        cut = Cut(channels, tuple(spatial), max(1, neighbourhood[0] // 2), groups)
        B, b = len(log_diagonal), channels * cut.rows * cut.width
        t = log_diagonal.exp().expand(-1, channels, -1)
        s = neighbours.expand(-1, channels, -1, -1)
        index = torch.arange(cut.spatial[0] * cut.width, device=t.device)
        image = index.view(cut.spatial)
        positions, values = [], []

        def add(c: int, pixel: Tensor, later: int, neighbour: Tensor, value: Tensor) -> None:
            (block, column), (below, row) = cut.places(c, pixel), cut.places(later, neighbour)
            positions.append((block * 2 * b + (below - block) * b + row) * b + column)
            values.append(value)

        for c in range(channels):
            add(c, index, c, index, t[:, c])
            for k, (here, there) in enumerate(pairs(cut.spatial, tuple(neighbourhood))):
                pixel = image[here].flatten()
                add(c, pixel, c, image[there].flatten(), (t[:, c] * s[:, c, k])[:, pixel])
            filled = len(index) + torch.arange(cut.filled * cut.width, device=t.device)
            add(c, filled, c, filled, t.new_ones(B, len(filled)))
        for k, (c, later) in enumerate(channel_pairs(channels) if ties is not None else ()):
            assert ties is not None
            add(c, index, later, index, t[:, c] * ties[:, k])
        flat = t.new_zeros(B, cut.blocks * 2 * b * b).index_copy(1, torch.cat(positions), torch.cat(values, 1))
        parts = flat.view(B, cut.blocks, 2, b, b)
        return cls(cut, list(parts[:, :, 0].unbind(1)), list(parts[:, :-1, 1].unbind(1)))

    def plus(self, weight: Tensor, free: Tensor) -> "Banded":
        """The factor of LLᵀ + diag(weight) over the pixels `free`, of identity elsewhere; both [1, B, N]."""
        inside = self.cut.split(free.to(weight.dtype), 1.0)
        diagonal, below = list[Tensor](), list[Tensor]()
        for i, (D, m, f) in enumerate(zip(self.diagonal, self.cut.split(weight), inside, strict=True)):
            A = D @ D.mT + torch.diag_embed(m.squeeze(-1))
            if i:
                A = A + self.below[i - 1] @ self.below[i - 1].mT
            A = f * A * f.mT + torch.diag_embed(1 - f.squeeze(-1))
            if i:
                A = A - below[-1] @ below[-1].mT
            diagonal.append(torch.linalg.cholesky_ex(A)[0])
            if i < len(self.below):
                B = inside[i + 1] * (self.below[i] @ D.mT) * f.mT
                below.append(solve_triangular(diagonal[-1].mT, B, upper=True, left=False))
        return Banded(self.cut, diagonal, below)

    def times(self, x: Tensor) -> Tensor:
        """Lᵀx [S, B, N]."""
        parts = self.cut.split(x)
        found = [D.mT @ part for D, part in zip(self.diagonal, parts, strict=True)]
        return self.cut.join(
            [y + E.mT @ nxt for y, E, nxt in zip(found, self.below, parts[1:], strict=False)] + found[-1:]
        )

    def solve(self, x: Tensor, transposed: bool = False) -> Tensor:
        """y [S, B, N] with Lᵀy = x, or Ly = x if `transposed`."""
        found: list[Tensor] = []
        parts = self.cut.split(x)
        for i in range(len(parts)) if transposed else reversed(range(len(parts))):
            right = parts[i]
            if found:
                right = right - (self.below[i - 1] if transposed else self.below[i].mT) @ found[-1]
            D = self.diagonal[i]
            found.append(solve_triangular(D if transposed else D.mT, right, upper=not transposed))
        return self.cut.join(found if transposed else found[::-1])

    def logdet(self) -> Tensor:
        """log|(LLᵀ)⁻¹| [B]."""
        logs = [D.diagonal(dim1=-2, dim2=-1).log().sum(-1) for D in self.diagonal]
        return -2 * self.cut.items(torch.stack(logs).sum(0), 0).sum(-1)

    def variance(self) -> Tensor:
        """The diagonal of (LLᵀ)⁻¹ [B, N]: Σᵢ = Lᵢ⁻ᵀ(I + EᵢᵀΣᵢ₊₁Eᵢ)Lᵢ⁻¹."""
        found, Sigma = list[Tensor](), None
        for i in reversed(range(len(self.diagonal))):
            D = self.diagonal[i]
            inner = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device).expand_as(D)
            if Sigma is not None:
                inner = inner + self.below[i].mT @ Sigma @ self.below[i]
            half = solve_triangular(D.mT, inner, upper=True)
            Sigma = solve_triangular(D, half, upper=False, left=False)
            found.append(Sigma.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))
        return self.cut.join(found[::-1])[0]
