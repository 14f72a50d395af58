"""What `leverage` asks of a few items."""

import torch
from torch import Tensor

from . import blocks
from .capacitance import Samples, sums


class Pixels:
    """P [b, N, R], with x [S, b, N] and loc [S or 1, b, N] or without."""

    def __init__(self, samples: Samples | None, P: Tensor) -> None:
        self.samples, self.P = samples, P
        self.items = torch.arange(P.shape[0], device=P.device).unsqueeze(1)

    def norms(self, A: Tensor) -> Tensor:
        norms = A.new_empty(self.P.shape[:2])
        for b, n, p in blocks.factor_blocks_of(self.P, slice(0, len(norms)), A.dtype):
            norms[b, n] = blocks.rows(A[b], p.to(A.dtype)).square_().sum(1)
        return norms

    def rows(self, H: Tensor) -> Tensor:
        return self.P[self.items, H].double()

    def deltas(self, H: Tensor, s: slice) -> Tensor:
        assert self.samples is not None
        x, loc = self.samples
        loc = loc[s] if len(loc) == len(x) else loc
        return (x[s, self.items, H].double() - loc[:, self.items, H].double()).transpose(0, 1)

    def sums(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        return sums(self.samples, self.P, precision, slice(0, len(precision)), torch.float64, inverted=True)

    def mixed_gram(self, precision: Tensor, A: Tensor) -> Tensor:
        return sums(None, self.P, precision, slice(0, len(precision)), torch.float64, inverted=True, mix=A)[0]
