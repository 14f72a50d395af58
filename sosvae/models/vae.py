"""The network: a residual encoder, its mirror image as the decoder, and a head (paper, section 4 and appendix).

    x [B, channels, H, W] → encoder → q(z|x) → z [B, latents] → decoder → features F [B, K, H, W] → head → p(x|z)

p(x|z) is over flattened images, in the order channel, row, column: N = channels · H · W.
"""

from typing import cast

import torch
import torch.distributions as td
from torch import Tensor, nn

from ..config import Config
from . import heads
from .layers import Chain, decoder, encoder, stage_widths
from .observation import Observation

__all__ = ["VAE"]

MEMORY_FORMATS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
MIN_SCALE = 1e-5  # of q(z|x): at 0 its KL has no bound


class VAE(nn.Module):
    """Encoder, decoder and head of a configuration, for its image size.

    Memory format and checkpointing are the configuration's too. Under `torch.autocast` encoder and decoder are of half
    precision; q(z|x) and p(x|z) keep that of the weights.

    Example:
        >>> from sosvae import PRESETS, VAE
        >>> vae = VAE(PRESETS["faces"][1]).eval()
        >>> p = vae.decode(torch.randn(2, 32))  # N(μ, PPᵀ + D) over 48·40 pixels, a batch of 2
        >>> p.rsample((5,)).shape
        torch.Size([5, 2, 1920])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(f"config is {config!r}, expected a Config")
        model, training = config.model, config.training
        self.image_shape = config.image_shape
        self.latents = model.latents
        self.frozen = False
        self.memory_format = MEMORY_FORMATS[training.memory_format]
        channels, *size = self.image_shape
        widths = stage_widths(model)
        self.encoder = Chain(encoder(channels, model), training.checkpointing)
        self.posterior = nn.Linear(widths[-1], 2 * model.latents)
        self.decoder = Chain(decoder((size[0], size[1]), model), training.checkpointing)
        self.head = heads.find(model.head)(widths[0], channels, model)
        self.arrange()

    def arrange(self) -> None:
        """Lays the weights of the convolutions out in the configuration's memory format."""
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.memory_format)

    def freeze(self, frozen: bool = True) -> None:
        """Everything but the head's covariance stays as it is from now on, or learns (again).

        A forward pass then keeps nothing for a backward pass through encoder and decoder, whose batch norms use what
        they have counted.
        """
        if frozen == self.frozen:
            return
        self.frozen = frozen
        for module in (self.encoder, self.posterior, self.decoder, self.head.mean):
            module.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VAE":
        super().train(mode)
        for module in (self.encoder, self.decoder):
            module.train(mode and not self.frozen)
        return self

    def encode(self, x: Tensor) -> td.Normal:
        """q(z|x), independent normals with loc and scale [B, latents].

        Args:
            x: images [B, channels, H, W], intensities from 0 to 1.

        Raises:
            TypeError: `x` is no tensor of floating-point numbers. ValueError: it is of another shape than the
                configuration's images.
        """
        _check_floats("x", x, "intensities from 0 to 1")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, {', '.join(map(str, self.image_shape))}]")
        x = x.contiguous(memory_format=self.memory_format)
        features = self.encoder(x)
        with torch.autocast(x.device.type, enabled=False):
            loc, scale = self.posterior(features.to(self.posterior.weight.dtype)).chunk(2, dim=-1)
        return td.Normal(loc, nn.functional.softplus(scale) + MIN_SCALE, validate_args=False)

    def decode(self, z: Tensor, mean_only: bool = False) -> Observation:
        """p(x|z) over flattened images, batch shape [B], event shape [channels·H·W].

        Args:
            z: latent codes, [B, latents].
            mean_only: the head's `mean_alone`, N(μ, d·I) with the configured d, in which the covariance has no part.
                (The authors freeze the covariance head at its start, weights of 1e-5, instead of leaving it out.)

        Raises:
            TypeError: `z` is no tensor of floating-point numbers. ValueError: it is of another shape.
        """
        _check_floats("z", z, "latent codes")
        if z.dim() != 2 or z.shape[1] != self.latents:
            raise ValueError(f"z has shape {list(z.shape)}, expected [B, {self.latents}]")
        return cast(Observation, self.head(self.decoder(z), mean_only))

    def unflatten(self, y: Tensor) -> Tensor:
        """Events [..., N] as images [..., channels, H, W]; a view."""
        return cast(Tensor, y.unflatten(-1, self.image_shape))


def _check_floats(name: str, value: object, meaning: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {found}, expected a tensor of floating-point numbers, {meaning}")
