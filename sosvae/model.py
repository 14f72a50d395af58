"""The network: a residual encoder, its mirror image as the decoder, and the two heads (paper, section 4 and appendix).

    x [B, C, H, W] → encoder → q(z|x) → z [B, latents] → decoder → features F [B, K, H, W] → head → p(x|z)

p(x|z) is over flattened images, in the order channel, row, column: N = C · H · W.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
import torch.distributions as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal

from .config import Config, ModelConfig

__all__ = ["VAE", "PixelwiseHead", "PixelwiseNormal", "StructuredHead"]

STAGES = (64, 128, 256, 512)  # features at the four resolutions (the paper's), before the width multiplier
STAGE_FACTOR = 2  # every stage after the first halves height and width
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
    P, it is the transposed view of what the convolution writes, [B, R, N], without a copy.
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
        d = features.new_tensor(self.diagonal)
        if mean_only:
            return PixelwiseNormal(self.mean(features).flatten(1), d)
        if self.variance is not None:
            d = _variance(self.variance, features)
        loc: Tensor | LinearMean
        P: Tensor | LinearFactor
        if self.linear:
            loc = LinearMean(features, self.mean.weight, self.mean.bias)
            P = LinearFactor(features, self.factor.weight, self.factor.bias, self.channels)
        else:
            loc = self.mean(features).flatten(1)  # [B, N]
            P = self.factor(features).flatten(2).unflatten(1, (self.rank, -1)).flatten(2).mT  # [B, N, R]
        # The signature is torch's, which knows tensors only.
        return LowRankMultivariateNormal(cast(Tensor, loc), cast(Tensor, P), d, validate_args=False)


class PixelwiseHead(nn.Module):
    """F → N(μ, diag d) with a learned variance for each pixel: the β-VAE's observation model."""

    def __init__(self, features: int, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.diagonal = config.diagonal
        self.mean = _mean_convolution(features, channels)
        self.variance = _variance_convolution(features, channels, config.diagonal)

    def forward(self, features: Tensor, mean_only: bool = False) -> PixelwiseNormal:
        loc = self.mean(features).flatten(1)  # [B, N]
        return PixelwiseNormal(loc, loc.new_tensor(self.diagonal) if mean_only else _variance(self.variance, features))


class VAE(nn.Module):
    """Encoder, decoder and head of a configuration, for its image size.

    Example:
        >>> from sosvae import PRESETS, VAE
        >>> vae = VAE(PRESETS["faces"][1]).eval()
        >>> p = vae.decode(torch.randn(2, 32))  # N(μ, PPᵀ + D) over 48·40 pixels, a batch of 2
        >>> p.rsample((5,)).shape
        torch.Size([5, 2, 1920])
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.image_shape = config.image_shape
        self.latents = model.latents
        channels, *size = self.image_shape
        widths = [max(1, round(model.width * stage)) for stage in STAGES]
        sizes = [(math.ceil(size[0] / 2**i), math.ceil(size[1] / 2**i)) for i in range(len(widths))]
        # Channels last in memory, where convolutions are faster on CPUs and GPUs; the heads write planes.
        self.encoder = _channels_last(_encoder(channels, widths, model))
        self.posterior = nn.Linear(widths[-1], 2 * model.latents)
        self.decoder = _channels_last(_decoder(widths, sizes, model))
        head = StructuredHead if model.head == "structured" else PixelwiseHead
        self.head = head(widths[0], channels, model)

    def encode(self, x: Tensor) -> td.Normal:
        """q(z|x), independent normals with loc and scale [B, latents].

        Args:
            x: images [B, C, H, W], intensities from 0 to 1.

        Raises:
            ValueError: `x` is of another shape than the configuration's images.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, {', '.join(map(str, self.image_shape))}]")
        x = x.contiguous(memory_format=torch.channels_last)
        loc, scale = self.posterior(self.encoder(x)).chunk(2, dim=-1)
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
        # An event counts channel by channel, so the head writes planes: K of them are copied here, not R·C later.
        return self.head(self.decoder(z[:, :, None, None]).contiguous(), mean_only)

    def checkpointing(self, on: bool = True) -> "VAE":
        """Keep only the inputs of residual blocks for the backward pass and make the rest again there, or do not."""
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.checkpointing = on
        return self

    def unflatten(self, y: Tensor) -> Tensor:
        """Events [..., N] as images [..., C, H, W]; a view."""
        return y.unflatten(-1, self.image_shape)


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(first x)))) + past x); where the size changes, `first` and `past` change it."""

    def __init__(self, inputs: int, outputs: int, first: nn.Module | None = None, past: nn.Module | None = None):
        super().__init__()
        self.conv1 = first if first is not None else _conv3(inputs, outputs)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.past = past if past is not None else nn.Identity()
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._block, x, use_reentrant=False, context_fn=self._contexts))
        return self._block(x)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the first time that a batch goes through, and of the second."""
        return nullcontext(), _statistics_left_alone(self)

    def _block(self, x: Tensor) -> Tensor:
        # In place, which batch norm's backward allows: on a CPU these layers wait for memory, not arithmetic.
        y = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(y)).add_(self.past(x)).relu_()


@contextmanager
def _statistics_left_alone(module: nn.Module) -> Iterator[None]:
    """The second time that a batch goes through, running statistics are those of copies: it has been counted."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    originals = [dict(norm.named_buffers()) for norm in norms]
    try:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update({name: t.clone() for name, t in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)


class Bilinear(nn.Module):
    """Resizes [B, K, h, w] to [B, K, H, W]."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


def _encoder(channels: int, widths: list[int], model: ModelConfig) -> Iterator[nn.Module]:
    yield from (_conv3(channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
    previous = widths[0]
    for stage, width in enumerate(widths):
        for block in range(model.depth):
            if stage and not block:
                past = nn.Conv2d(previous, width, 1, stride=STAGE_FACTOR)
                yield ResidualBlock(previous, width, _conv3(previous, width, STAGE_FACTOR), past)
            else:
                yield ResidualBlock(width, width)
        previous = width
    yield from _pointwise(previous, previous)
    yield from (nn.AdaptiveMaxPool2d(1), nn.Flatten())


def _decoder(widths: list[int], sizes: list[tuple[int, int]], model: ModelConfig) -> Iterator[nn.Module]:
    # A transposed convolution over a single pixel: each position of the coarsest grid has its own linear map.
    yield nn.ConvTranspose2d(model.latents, model.latents, sizes[-1])
    yield from _pointwise(model.latents, widths[-1])
    for stage in reversed(range(len(widths))):
        width = widths[stage]
        last = stage == len(widths) - 1
        if not last:
            yield _upsampling_block(widths[stage + 1], width, sizes[stage + 1], sizes[stage], model.upsampling)
        for _ in range(model.depth - (not last)):
            yield ResidualBlock(width, width)
    yield from _pointwise(widths[0], widths[0])


def _upsampling_block(
    inputs: int, outputs: int, small: tuple[int, int], large: tuple[int, int], kind: str
) -> ResidualBlock:
    if kind == "bilinear":
        # 1×1 convolution and bilinear resizing commute: on the way past, the former is done on the small grid.
        first: nn.Module = nn.Sequential(Bilinear(large), _conv3(inputs, outputs))
        return ResidualBlock(inputs, outputs, first, nn.Sequential(nn.Conv2d(inputs, outputs, 1), Bilinear(large)))
    # 2h − 1 or 2h, whichever is the size that was halved (rounding up) to h.
    extra = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
    first = nn.ConvTranspose2d(inputs, outputs, 3, STAGE_FACTOR, 1, output_padding=extra)
    past = nn.ConvTranspose2d(inputs, outputs, 1, STAGE_FACTOR, output_padding=extra)
    return ResidualBlock(inputs, outputs, first, past)


def _channels_last(layers: Iterator[nn.Module]) -> nn.Sequential:
    # torch's stubs leave this overload of `to` out.
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def _pointwise(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


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
    return F.softplus(conv(features).flatten(1)) + 1e-5
