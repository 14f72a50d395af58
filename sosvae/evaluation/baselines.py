"""Rows beside a model: what simpler models of the pixels make of the same means and features."""

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.distributions as td
from torch import Tensor

from .. import devices
from ..config import Config
from ..data.dataset import Dataset
from ..models import heads
from ..models.heads.base import MIN_VARIANCE
from ..models.observation import Observation, PixelwiseNormal
from ..models.vae import VAE
from .bits import LEVELS, Model

__all__ = ["OneSigma", "one_sigma", "refitted"]

AT_ONCE = 16  # images


class OneSigma:
    """A model's codes and means with one variance for all pixels.

    Args:
        model: that gives them.
        variance: σ² (squared intensity).
    """

    def __init__(self, model: Model, variance: float) -> None:
        self._model, self.variance = model, variance
        self.image_shape, self.latents = model.image_shape, model.latents

    def encode(self, x: Tensor) -> td.Normal:
        return self._model.encode(x)

    def decode(self, z: Tensor) -> Observation:
        loc = self._model.decode(z).loc
        return PixelwiseNormal(loc, loc.new_tensor(self.variance))


@torch.no_grad()
def one_sigma(
    model: Model,
    images: Tensor,
    counted: Tensor | None = None,
    advanced: Callable[[int], None] = lambda count: None,
) -> OneSigma:
    """`OneSigma` with the σ² that is most likely for `images`, which should be of the selection part.

    Args:
        images: [B, channels, H, W], as the model takes them.
        counted: pixels that count, bool [N].
        advanced: told how many images are done.
    """
    total, count = 0.0, 0
    for x in images.split(AT_ONCE):
        delta = x.flatten(1) - model.decode(model.encode(x).loc).loc
        kept = delta if counted is None else delta[:, counted.to(delta.device)]
        total, count = total + float(kept.double().square().sum()), count + kept.numel()
        advanced(len(x))
    return OneSigma(model, max(total / count, MIN_VARIANCE))


@torch.enable_grad()  # also where it is called in the middle of an evaluation
def refitted(
    vae: VAE,
    config: Config,
    images: Dataset,
    *,
    steps: int = 800,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    advanced: Callable[[int], None] = lambda step: None,
) -> VAE:
    """`vae` with the pixel-wise head in place of its own, fitted to training images on the frozen network's features.

    It has two 3×3 convolutions before its variances, as `sosvae train-head` gives every head, starts from the mean of
    `vae` and the mean squared residual of a few batches, and may move both. Images are dequantised, and codes drawn
    from q(z|x).

    Args:
        config: of `vae`.
        steps, batch, lr: of Adam; lr goes down along a cosine to nothing.
        advanced: told of each step.

    Returns: a network that shares encoder and decoder with `vae`, ready for inference.

    Raises:
        ValueError: fewer training images than a batch takes.
    """
    device = next(vae.parameters()).device

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        x = images.batch(step, batch, seed).to(device)
        x = x + (torch.rand_like(x) - 0.5) / LEVELS
        return _features(vae, x), x.flatten(1)

    with devices.seeded(device, seed):
        with torch.no_grad():
            found = [
                (F.shape[1], (x - vae.head.mean(F).flatten(1)).square().mean()) for F, x in map(batch_of, range(8))
            ]
        start = max(float(sum(square for _, square in found)) / len(found), MIN_VARIANCE)
        settings = config.replace(model={"diagonal": start, "fixed_diagonal": False, "head_layers": 2}).model
        head = heads.find("pixelwise")(found[0][0], vae.image_shape[0], settings).to(device)
        head.mean.load_state_dict(vae.head.mean.state_dict())
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        for step in range(steps):
            features, x = batch_of(step)
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = -head(features).log_prob_and_entropy(x)[0].mean() / config.pixels
            loss.backward()
            optimizer.step()
            advanced(step + 1)
    new = copy.copy(vae)
    new._modules = dict(vae._modules)  # the copy shares encoder and decoder, and has a head of its own
    new.head = head.eval()
    return new


@torch.no_grad()
def _features(vae: VAE, x: Tensor) -> Tensor:
    q = vae.eval().encode(x)
    return cast(Tensor, vae.decoder(q.sample()))
