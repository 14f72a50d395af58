"""Numbers that say what samples look like: smooth or speckled, and as spread out as the data or not."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .model import VAE

__all__ = ["Quality", "neighbour_correlation", "quality"]

SAMPLE_VALUES = 1 << 26  # that are made at once: 256 MiB in float32


class Quality(NamedTuple):
    """Of samples from the prior."""

    neighbour_correlation: float  # of (sample − mean) between horizontal neighbours: 1 smooth, 0 speckled
    deviation: float  # standard deviation of samples over that of the data: far above 1, the variance has exploded


def neighbour_correlation(images: Tensor) -> Tensor:
    """Mean correlation between horizontally neighbouring pixels.

    Args:
        images: deviations from the mean, [S, B, C, H, W]. Σ of each of the B items is estimated from its S
            samples, around zero, as the mean is known.

    Returns:
        cov(yₙ, yₙ₊₁) / (σₙ σₙ₊₁) averaged over items and all pairs of neighbours, a 0-d tensor from −1 to 1.
    """
    left, right = images[..., :-1], images[..., 1:]
    covariance = (left * right).mean(0)
    scale = left.square().mean(0).sqrt() * right.square().mean(0).sqrt()
    return (covariance / scale.clamp_min(torch.finfo(images.dtype).tiny)).mean()


@torch.no_grad()
def quality(vae: VAE, data_deviation: float, codes: int = 64, samples: int = 64, seed: int = 0) -> Quality:
    """Measures samples at codes from the prior, z ~ N(0, I), `samples` of p(x|z) at each.

    Args:
        data_deviation: standard deviation of a pixel over the data, root mean square over pixels
            (`Dataset.deviation`); that of samples is taken likewise, over codes and samples.

    The generator of the caller is left as it was.
    """
    device = next(vae.parameters()).device
    correlations, total, squares = [], torch.zeros((), device=device), torch.zeros((), device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        at_once = max(1, min(8, SAMPLE_VALUES // (samples * math.prod(vae.image_shape))))
        for z in torch.randn(codes, vae.latents, device=device).split(at_once):  # the samples of all may not fit
            p = vae.decode(z)
            y = p.rsample((samples,))
            correlations.append(neighbour_correlation(vae.unflatten(y - p.loc)) * len(z))
            total = total + y.sum((0, 1))
            squares = squares + y.square().sum((0, 1))
    count = codes * samples
    spread = (squares / count - (total / count).square()).mean().sqrt()
    return Quality(float(sum(correlations) / codes), float(spread) / data_deviation)
