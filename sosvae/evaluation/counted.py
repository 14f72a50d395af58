"""Pixels that count: the density of an image without those that never change.

A pixel that is black in every image (the surround of a brain) has a density without bound, and would pay for all
others.
"""

from functools import singledispatch
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_mvn import LowRankMultivariateNormal, LowRankMultivariateStudentT

from ..models.observation import Observation, PixelwiseNormal

__all__ = ["changing", "log_prob_and_entropy"]

BLACK = 0  # grey level up to which a pixel counts as black
AT_ONCE = 256  # images that are looked at together


def changing(images: NDArray[np.uint8], indices: NDArray[np.int64] | None = None, black: int = BLACK) -> Tensor | None:
    """The pixels that are not black in every image, bool [N]; none where all of them change.

    Args:
        images: uint8, [images, channels, H, W], possibly memory-mapped.
        indices: of those that are looked at, the training part: what is left out is not chosen on other images. By
            default all.
        black: grey level up to which a pixel counts as black, 0 to 255.

    Raises:
        ValueError: every pixel is black in every image.
    """
    brightest = np.zeros(images.shape[1:], dtype=np.uint8)
    indices = np.arange(len(images)) if indices is None else indices
    for start in range(0, len(indices), AT_ONCE):
        np.maximum(brightest, images[indices[start : start + AT_ONCE]].max(0), out=brightest)
    counted = torch.from_numpy(brightest.reshape(-1) > black)
    if not counted.any():
        raise ValueError(f"all {len(indices)} images are black everywhere, expected pixels that change")
    return None if counted.all() else counted


def log_prob_and_entropy(p: Observation, x: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p(x) and H of the counted pixels alone, the others integrated out, each [B], in nats.

    Args:
        x: [B, N].
        counted: bool [N]; none: all of them.
    """
    if counted is None:
        return p.log_prob_and_entropy(x)
    counted = counted.to(x.device)
    log_prob, entropy = _marginal(p, x, counted)
    return log_prob, entropy


@singledispatch
def _marginal(p: Any, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """By the chain rule, log p(x) − log p(rest | counted): what `condition` returns has the density of the rest."""
    log_prob, entropy = p.log_prob_and_entropy(x)
    of_rest, entropy_of_rest = p.condition(x, counted).log_prob_and_entropy(x)
    return log_prob - of_rest, entropy - entropy_of_rest


@_marginal.register
def _(p: PixelwiseNormal, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    rows = PixelwiseNormal(p.loc[..., counted], p.cov_diag[..., counted])
    return rows.log_prob_and_entropy(x[..., counted])


@_marginal.register
def _(p: LowRankMultivariateNormal, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    parts = p.loc[..., counted], p.cov_factor[..., counted, :], p.cov_diag[..., counted]
    rows = LowRankMultivariateNormal(*parts, validate_args=False)
    return rows.log_prob_and_entropy(x[..., counted])


@_marginal.register
def _(p: LowRankMultivariateStudentT, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    parts = p.df, p.loc[..., counted], p.cov_factor[..., counted, :], p.cov_diag[..., counted]
    rows = LowRankMultivariateStudentT(*parts, validate_args=False)
    return rows.log_prob_and_entropy(x[..., counted])
