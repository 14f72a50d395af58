"""What `leverage` asks of a few items, pixels of all channels in a row."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import forms
from . import moments
from .norms import row_norms


class Samples(NamedTuple):
    """x [S, b, channels, pixels], loc [S or 1, b, channels, pixels] or none, and m [channels, K+1] or none."""

    x: Tensor
    loc: Tensor | None
    m: Tensor | None


class Pixels:
    """Features [b, K, pixels] with the weight W [1 or b, channels, R, K+1] in float64, and their samples or none."""

    def __init__(self, samples: Samples | None, F: Tensor, W: Tensor) -> None:
        self.samples, self.F, self.W = samples, F, W
        self.items = torch.arange(F.shape[0], device=F.device).unsqueeze(1)

    def norms(self, A: Tensor) -> Tensor:
        return row_norms(self.F, forms.weighted(A, self.W)).flatten(1)

    def rows(self, H: Tensor) -> Tensor:
        channel, features = self._at(H)
        W = self.W[self.items if len(self.W) > 1 else 0, channel]  # [b, k, R, K+1]
        return torch.matmul(W, features.unsqueeze(-1)).squeeze(-1)

    def deltas(self, H: Tensor, s: slice) -> Tensor:
        assert self.samples is not None
        (x, loc, m), pixels = self.samples, self.F.shape[2]
        channel, features = self._at(H)
        index = self.items, channel, H % pixels
        delta = x[s][:, *index].double()
        if loc is not None:
            delta -= (loc[s] if len(loc) == len(x) else loc)[:, *index].double()
        if m is not None:
            delta -= (m.double()[channel] * features).sum(-1)
        return delta.transpose(0, 1)

    def sums(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        given, m = (self.samples[:2], self.samples.m) if self.samples else (None, None)
        precision = precision.unflatten(1, (self.W.shape[1], -1))
        items = slice(0, len(precision))
        WG, wF, _ = moments.sums(given, self.F, self.W, precision, items, torch.float64, inverted=True)
        return forms.gram(WG, self.W), forms.projection(wF, WG, self.W, None if m is None else m.double())

    def mixed_gram(self, precision: Tensor, A: Tensor) -> Tensor:
        items, precision = slice(0, len(precision)), precision.unflatten(1, (self.W.shape[1], -1))
        return moments.mixed_gram(self.F, self.W, precision, items, True, A)

    def _at(self, H: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of pixels H [b, k], and the features there with their one [b, k, K+1] in float64."""
        features = self.F[self.items, :, H % self.F.shape[2]].double()
        return H // self.F.shape[2], torch.cat([features, torch.ones_like(features[..., :1])], 2)
