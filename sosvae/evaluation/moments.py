"""Mean and covariance of features that come in pieces: centred, in float64, and two of them merge into one."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments"]

AT_ONCE = 4096  # vectors


class Moments(NamedTuple):
    """Of so many vectors; sums of squares are about their mean, so that none is the difference of two large numbers."""

    images: int
    mean: Tensor  # [F], float64
    squares: Tensor  # Σ (f − mean)(f − mean)ᵀ, [F, F], float64

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of vectors [n, F], n of at least 1; some at a time, so that float64 copies stay small."""
        return reduce(cls.merged, map(cls._of_some, features.split(AT_ONCE)))

    @classmethod
    def _of_some(cls, features: Tensor) -> "Moments":
        f = features.double()
        mean = f.mean(0)
        return cls(len(f), mean, (f - mean).mT @ (f - mean))

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub & LeVeque 1979)."""
        images = self.images + other.images
        apart = other.mean - self.mean
        squares = self.squares + other.squares + torch.outer(apart, apart) * (self.images * other.images / images)
        return Moments(images, self.mean + apart * (other.images / images), squares)

    def covariance(self) -> Tensor:
        """[F, F], over n − 1.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.images < 2:
            raise ValueError(f"a covariance is asked of {self.images} images, expected at least 2")
        return self.squares / (self.images - 1)
