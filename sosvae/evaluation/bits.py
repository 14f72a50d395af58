"""Bits per dimension: what a value of an image costs under the model, 8 bits for a byte of which nothing is known."""

import math
from typing import Protocol

import numpy as np
import torch
import torch.distributions as td
from numpy.typing import NDArray
from torch import Tensor

from ..models.observation import Observation
from .counted import log_prob_and_entropy

__all__ = ["LEVELS", "UNIFORM", "Model", "bound", "dequantised", "log_likelihood", "per_dimension"]

LEVELS = 255  # steps between black and white
UNIFORM = 8.0  # bits per dimension of a byte if all of them are equally likely


class Model(Protocol):
    """What is measured: a VAE, or what answers as one."""

    image_shape: tuple[int, int, int]
    latents: int

    def encode(self, x: Tensor) -> td.Normal: ...
    def decode(self, z: Tensor) -> Observation: ...


def dequantised(images: NDArray[np.uint8], seed: int, first: int = 0) -> Tensor:
    """x = (b + u − ½)/255 of bytes b, with u uniform in [0, 1): float32, of the shape of `images` [B, ...].

    The noise of an image follows from `seed` and its number, `first` + its place: how many are taken at once changes
    nothing.
    """
    u = np.stack([np.random.default_rng((seed, first + i)).random(image.shape) for i, image in enumerate(images)])
    return torch.from_numpy(((images + u - 0.5) / LEVELS).astype(np.float32))


def per_dimension(log_prob: Tensor, N: int) -> Tensor:
    """−log₂ p(x)/N + log₂ 255: bits for each of N values from log-densities in nats of intensities from 0 to 1."""
    return -log_prob / (N * math.log(2)) + math.log2(LEVELS)


def log_likelihood(p: Observation, x: Tensor, counted: Tensor | None = None) -> Tensor:
    """log p(x|z) [B] in nats, float64: the likelihood alone, without what the code costs."""
    return log_prob_and_entropy(p, x, counted)[0].double()


@torch.no_grad()
def bound(model: Model, x: Tensor, noise: Tensor, counted: Tensor | None = None) -> Tensor:
    """The importance-weighted bound on log p(x), [B] in nats, float64 (Burda et al. 2016).

        log 1/K Σₖ p(x|zₖ) p(zₖ) / q(zₖ|x),  zₖ ~ q(z|x)

    Its expectation is below log p(x) and grows with K.

    Args:
        x: images, [B, channels, H, W].
        noise: standard normal, [K, B, latents], of which the K codes are made.
        counted: pixels that count, bool [N].

    Raises:
        ValueError: noise of another shape, or no codes.
    """
    expected = (len(x), model.latents)
    if noise.dim() != 3 or not len(noise) or tuple(noise.shape[1:]) != expected:
        raise ValueError(f"noise has shape {list(noise.shape)}, expected [codes, {expected[0]}, {expected[1]}]")
    q, flat = model.encode(x), x.flatten(1)
    scale = q.scale.double()
    weights = []
    for omega in noise:
        z = q.loc + q.scale * omega
        # log p(z) − log q(z|x): the constants of the two normals cancel.
        ratio = 0.5 * (omega.double().square() - z.double().square()) + scale.log()
        weights.append(log_likelihood(model.decode(z), flat, counted) + ratio.sum(-1))
    return torch.logsumexp(torch.stack(weights), 0) - math.log(len(noise))
