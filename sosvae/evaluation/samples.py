"""Numbers that say what samples look like: smooth or speckled, and as spread out as the data or not."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import devices
from ..models.vae import VAE

__all__ = ["Quality", "neighbour_correlation", "quality"]

SAMPLE_VALUES = 1 << 20  # that are made at once: 4 MiB in float32, of which a few copies are alive


class Quality(NamedTuple):
    """Measures of samples from the prior."""

    neighbour_correlation: float  # of (sample − mean) between horizontal neighbours: 1 smooth, 0 speckled
    deviation: float  # standard deviation of samples over that of the data: far above 1, the variance has exploded


def neighbour_correlation(images: Tensor) -> Tensor:
    """Mean correlation between horizontally neighbouring pixels.

    Args:
        images: deviations from the mean, [S, B, channels, H, W]. Σ of each of the B items is estimated from its S
            samples, around zero, as the mean is known.

    Raises:
        ValueError: another shape, or images without neighbours.

    Returns:
        cov(yₙ, yₙ₊₁) / (σₙ σₙ₊₁) averaged over items and all pairs of neighbours, a 0-d tensor from −1 to 1.
    """
    if images.dim() != 5 or 0 in images.shape or images.shape[-1] < 2:
        raise ValueError(f"images has shape {list(images.shape)}, expected [S, B, channels, H, W] with W of at least 2")
    return _correlation(*_moments(images))


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Σ yₙyₙ₊₁ and Σ yₙ² over the samples [S, B, channels, H, W]."""
    return (images[..., :-1] * images[..., 1:]).sum(0), images.square().sum(0)


def _correlation(products: Tensor, squares: Tensor) -> Tensor:
    scale = squares[..., :-1].sqrt() * squares[..., 1:].sqrt()
    return (products / scale.clamp_min(torch.finfo(squares.dtype).tiny)).mean()


@torch.no_grad()
def quality(vae: VAE, data_deviation: float, codes: int = 64, samples: int = 64, seed: int = 0) -> Quality:
    """Measures samples at codes from the prior, z ~ N(0, I), `samples` of p(x|z) at each.

    Args:
        data_deviation: standard deviation of a pixel over the data, root mean square over pixels
            (`Dataset.deviation`); that of samples is taken likewise, over codes and samples.

    Returns: numbers that are NaN where there is none, as the ratio of deviations is if all data are the same.

    Raises:
        ValueError: no codes or no samples.

    The generator of the caller is left as it was.
    """
    if min(codes, samples) < 1:
        raise ValueError(f"codes is {codes} and samples is {samples}, expected at least 1")
    device = next(vae.parameters()).device
    correlations, total, squares = [], torch.zeros((), device=device), torch.zeros((), device=device)
    with devices.seeded(device, seed):
        # The samples of all codes may not fit, nor those of one.
        pixels = math.prod(vae.image_shape)
        at_once = max(1, min(8, SAMPLE_VALUES // (samples * pixels)))
        drawn = max(1, min(samples, SAMPLE_VALUES // (at_once * pixels)))
        for z in torch.randn(codes, vae.latents, device=device).split(at_once):
            p = vae.decode(z)
            of_pairs = of_pixels = torch.zeros((), device=device)
            for start in range(0, samples, drawn):
                y = p.rsample((min(drawn, samples - start),))
                total = total + y.sum((0, 1))
                squares = squares + y.square().sum((0, 1))
                more = _moments(vae.unflatten(y.sub_(p.loc)))
                of_pairs, of_pixels = of_pairs + more[0], of_pixels + more[1]
            correlations.append(_correlation(of_pairs, of_pixels) * len(z))
    count = codes * samples
    # Rounding takes the variance of constant samples below 0.
    spread = float((squares / count - (total / count).square()).mean().clamp_min(0).sqrt())
    return Quality(float(sum(correlations) / codes), spread / data_deviation if data_deviation else math.nan)
