"""The network: a residual encoder, its mirror image as the decoder, and the two heads (paper, section 4 and appendix).

    x [B, C, H, W] → encoder → q(z|x) → z [B, latents] → decoder → features F [B, K, H, W] → head → p(x|z)

p(x|z) is over flattened images, in the order channel, row, column: N = C · H · W.
"""

import math
from typing import cast

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal

from .config import Config, ModelConfig
from .layers import Chain, decoder, encoder, stage_widths

__all__ = ["VAE", "PixelwiseHead", "PixelwiseNormal", "StructuredHead"]

MEMORY_FORMATS = {"channels_last": torch.channels_last, "channels_first": torch.contiguous_format}
INITIAL_STD = 1e-5  # standard deviation of a head's weights at the start (the paper's N(0, 1e-5))
MIN_SCALE = 1e-5  # of q(z|x): at 0 its KL has no bound


class PixelwiseNormal(td.Independent):
    """N(μ, diag d) over flattened images, with what `LowRankMultivariateNormal` answers to and has no P for.

    Args:
        loc: mean, [B, N].
        cov_diag: variance, [B, N] or anything that broadcasts to it (squared intensity).
    """

    def __init__(self, loc: Tensor, cov_diag: Tensor) -> None:
        super().__init__(td.Normal(loc, cov_diag.sqrt(), validate_args=False), 1, validate_args=False)
        self.loc = loc
        self.cov_diag = cov_diag.expand_as(loc)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape) + self.event_shape
        return PixelwiseNormal(self.loc.expand(shape), self.cov_diag.expand(shape))

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """log p(value) and H, each [B], in nats."""
        return self.log_prob(value), self.entropy()

    def rsample(  # type: ignore[override]  # one argument more than torch's
        self,
        sample_shape: torch.Size | tuple[int, ...] = (),
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """y = μ + √d ⊙ ω_d; of `noise` = (ω_p, ω_d) the first is for the low-rank part and has no use here."""
        if noise is None:
            return super().rsample(torch.Size(sample_shape))
        return self.loc + self.cov_diag.sqrt() * noise[1]

    def condition(self, value: Tensor, observed: Tensor) -> "PixelwiseNormal":
        """Observed pixels (bool mask, [..., N]) get their value and no variance; the others know nothing of it."""
        return PixelwiseNormal(
            torch.where(observed, value, self.loc),
            torch.where(observed, self.cov_diag.new_zeros(()), self.cov_diag),
        )

    def covariance_row(self, index: int) -> Tensor:
        """Row `index` of Σ, [B, N]: zero but for the pixel itself."""
        row = torch.zeros_like(self.loc)
        row[..., index] = self.cov_diag[..., index]
        return row


class StructuredHead(nn.Module):
    """F → N(μ, PPᵀ + D): 1×1 convolutions for the mean, the factor and, if it is learned, the diagonal.

    `factor.weight` is [R·C, K, 1, 1], and row r·C + c makes channel c of column r of P. By default neither P nor
    the mean is made: the likelihood goes from the features straight to the weights. Where the configuration asks for
    P, it is the transposed view of what the convolution writes, [B, R, N], without a copy. Under autocast features may
    be of half precision; weights, P, mean and diagonal stay as they are.
    """

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.channels, self.rank, self.diagonal = channels, config.rank, config.diagonal
        self.linear = config.factor == "linear"
        self.mean = _mean_convolution(features, channels)
        self.factor = nn.Conv2d(features, config.rank * channels, 1)
        nn.init.normal_(self.factor.weight, std=INITIAL_STD)
        nn.init.zeros_(cast(Tensor, self.factor.bias))
        self.variance = None if config.fixed_diagonal else _variance_convolution(features, channels, config.diagonal)

    def forward(self, features: Tensor, mean_only: bool = False) -> LowRankMultivariateNormal | PixelwiseNormal:
        d = self.mean.weight.new_tensor(self.diagonal)
        if mean_only:
            return PixelwiseNormal(_full(self.mean, features).flatten(1), d)
        if self.variance is not None:
            d = _variance(self.variance, features)
        loc: Tensor | LinearMean
        P: Tensor | LinearFactor
        if self.linear:
            loc = LinearMean(features, self.mean.weight, self.mean.bias)
            P = LinearFactor(features, self.factor.weight, self.factor.bias, self.channels)
        else:
            # An event counts channel by channel, so planes are written: K of them are copied here, not R·C later.
            features = features.to(self.mean.weight.dtype, memory_format=torch.contiguous_format)
            loc = _full(self.mean, features).flatten(1)  # [B, N]
            P = _full(self.factor, features).flatten(2).unflatten(1, (self.rank, -1)).flatten(2).mT  # [B, N, R]
        return LowRankMultivariateNormal(loc, P, d, validate_args=False)


class PixelwiseHead(nn.Module):
    """F → N(μ, diag d) with a learned variance for each pixel: the β-VAE's observation model."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.diagonal = config.diagonal
        self.mean = _mean_convolution(features, channels)
        self.variance = _variance_convolution(features, channels, config.diagonal)

    def forward(self, features: Tensor, mean_only: bool = False) -> PixelwiseNormal:
        features = features.to(self.mean.weight.dtype)
        loc = _full(self.mean, features).flatten(1)  # [B, N]
        return PixelwiseNormal(loc, loc.new_tensor(self.diagonal) if mean_only else _variance(self.variance, features))


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
        model, training = config.model, config.training
        self.image_shape = config.image_shape
        self.latents = model.latents
        self.memory_format = MEMORY_FORMATS[training.memory_format]
        channels, *size = self.image_shape
        widths = stage_widths(model)
        self.encoder = Chain(encoder(channels, model), training.checkpointing)
        self.posterior = nn.Linear(widths[-1], 2 * model.latents)
        self.decoder = Chain(decoder((size[0], size[1]), model), training.checkpointing)
        head = StructuredHead if model.head == "structured" else PixelwiseHead
        self.head = head(widths[0], channels, model)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.memory_format)

    def encode(self, x: Tensor) -> td.Normal:
        """q(z|x), independent normals with loc and scale [B, latents].

        Args:
            x: images [B, C, H, W], intensities from 0 to 1.

        Raises:
            ValueError: `x` is of another shape than the configuration's images.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, {', '.join(map(str, self.image_shape))}]")
        x = x.contiguous(memory_format=self.memory_format)
        loc, scale = _full(self.posterior, self.encoder(x)).chunk(2, dim=-1)
        return td.Normal(loc, F.softplus(scale) + MIN_SCALE, validate_args=False)

    def decode(self, z: Tensor, mean_only: bool = False) -> LowRankMultivariateNormal | PixelwiseNormal:
        """p(x|z) over flattened images, batch shape [B], event shape [C·H·W].

        Args:
            z: latent codes, [B, latents].
            mean_only: N(μ, d·I) with the configured d. No part of the covariance head is used, so none gets a
                gradient. (The authors freeze that head at its start, weights of 1e-5, instead of leaving it out.)

        Raises:
            ValueError: `z` is of another shape.
        """
        if z.dim() != 2 or z.shape[1] != self.latents:
            raise ValueError(f"z has shape {list(z.shape)}, expected [B, {self.latents}]")
        return self.head(self.decoder(z), mean_only)

    def unflatten(self, y: Tensor) -> Tensor:
        """Events [..., N] as images [..., C, H, W]; a view."""
        return y.unflatten(-1, self.image_shape)


def _mean_convolution(features: int, channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(features, channels, 1)
    nn.init.normal_(conv.weight, std=INITIAL_STD)
    nn.init.constant_(cast(Tensor, conv.bias), 0.5)
    return conv


def _variance_convolution(features: int, channels: int, start: float) -> nn.Conv2d:
    conv = nn.Conv2d(features, channels, 1)
    nn.init.normal_(conv.weight, std=INITIAL_STD)
    nn.init.constant_(cast(Tensor, conv.bias), math.log(math.expm1(start)))  # softplus⁻¹
    return conv


def _variance(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """d = softplus(·) + 1e-5, [B, N]: the floor keeps a pixel that never changes from a density without bound."""
    return F.softplus(_full(conv, features).flatten(1)) + 1e-5


def _full(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the precision of the layer's weights, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, layer(x.to(layer.weight.dtype)))
