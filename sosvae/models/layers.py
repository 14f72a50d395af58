"""The layers of encoder and decoder, and which of them the backward pass computes again.

A `Chain` is a sequence of layers grouped twice: into units (a residual block, or a convolution with its batch norm and
ReLU) and into stages (everything at one resolution). Activation checkpointing keeps the inputs of units, or only those
of stages, and computes the rest again during the backward pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig

__all__ = ["Chain", "decoder", "encoder"]

STAGES = (64, 128, 256, 512)  # features at the four resolutions (the paper's), before the width multiplier
STAGE_FACTOR = 2  # every stage after the first halves height and width

Unit = tuple[nn.Module, ...]


class Chain(nn.Sequential):
    """Layers one after the other.

    Args:
        stages: of units, of layers.
        checkpointing: `none`; `blocks`: the backward pass computes the inside of each unit again; `stages`: that of
            each stage, and of its units once more.
    """

    def __init__(self, stages: Sequence[Sequence[Unit]], checkpointing: str = "none") -> None:
        super().__init__(*(layer for stage in stages for unit in stage for layer in unit))
        self.checkpointing = checkpointing
        self.stages: list[list[list[int]]] = []  # positions, so that a copy of this module has its own layers
        position = 0
        for stage in stages:
            self.stages.append([])
            for unit in stage:
                self.stages[-1].append(list(range(position, position + len(unit))))
                position += len(unit)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            run = partial(self._stage, stage)
            x = self._again(run, [i for unit in stage for i in unit], x) if self.checkpointing == "stages" else run(x)
        return x

    def _stage(self, stage: list[list[int]], x: Tensor) -> Tensor:
        for unit in stage:
            run = partial(self._unit, unit)
            x = run(x) if self.checkpointing == "none" else self._again(run, unit, x)
        return x

    def _unit(self, unit: list[int], x: Tensor) -> Tensor:
        for position in unit:
            x = self[position](x)
        return x

    def _again(self, run: Callable[[Tensor], Tensor], positions: list[int], x: Tensor) -> Tensor:
        """`run(x)`, of which nothing but `x` is kept for the backward pass."""
        if not torch.is_grad_enabled():
            return run(x)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Contexts of the first pass of a batch, and of the second."""
            return nullcontext(), _statistics_left_alone([self[i] for i in positions])

        # No noise is drawn on the way, so that there is no generator to turn back.
        return cast(Tensor, checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts))


@contextmanager
def _statistics_left_alone(layers: list[nn.Module]) -> Iterator[None]:
    """The second time that a batch goes through, running statistics are those of copies: it has been counted."""
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    originals = [dict(norm.named_buffers()) for norm in norms]
    try:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update({name: t.clone() for name, t in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)


class ResidualBlock(nn.Module):
    """ReLU(BN(conv(ReLU(BN(first x)))) + past x); where the size changes, `first` and `past` change it."""

    def __init__(self, inputs: int, outputs: int, first: nn.Module | None = None, past: nn.Module | None = None):
        super().__init__()
        self.conv1 = first if first is not None else _conv3(inputs, outputs)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.past = past if past is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # In place, which batch norm's backward allows: on a CPU bandwidth bounds these layers.
        y: Tensor = self.norm1(self.conv1(x)).relu_()
        y = self.norm2(self.conv2(y))
        return y.add_(self.past(x)).relu_()


class Bilinear(nn.Module):
    """Resizes [B, K, h, w] to [B, K, H, W]."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, size=self.size, mode="bilinear", align_corners=False)


class Spread(nn.ConvTranspose2d):
    """[B, latents] → [B, latents, h, w]: a transposed convolution over one pixel, a linear map for each position.

    As one product it needs no copy of its weight, which grows with the image: latents² · h · w values. For the same
    reason it stays in the precision of the weight under autocast.
    """

    def __init__(self, latents: int, size: tuple[int, int]) -> None:
        super().__init__(latents, latents, size)

    def forward(self, z: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = self.weight, cast(Tensor, self.bias)
        h, w = weight.shape[2:]
        with torch.autocast(z.device.type, enabled=False):
            if weight.is_contiguous():
                y = (z @ weight.flatten(1)).view(-1, weight.shape[1], h, w)
            else:  # channels last: the same the other way round
                y = (z @ weight.permute(0, 2, 3, 1).flatten(1)).view(-1, h, w, weight.shape[1]).permute(0, 3, 1, 2)
            return y + bias[:, None, None]


class Pick(nn.Conv2d):
    """[B, K, H, W] → [B, K', h, w]: a convolution of one pixel and stride 2, as one without stride of fewer pixels.

    What is kept for its backward pass is a quarter of `x`. (oneDNN's own, as of torch 2.13, writes past its buffer in
    the backward pass for some small numbers of channels; so does the transposed one.)
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1, STAGE_FACTOR)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(_applied(_Picked, x), self.weight, self.bias)


class Insert(nn.ConvTranspose2d):
    """[B, K, h, w] → [B, K', H, W]: a transposed convolution of one pixel and stride 2, as a product on the small grid.

    Three of four pixels of the result are the bias alone, so that nothing is computed or kept for them.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, 1, STAGE_FACTOR)
        self.size = size

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _applied(_Inserted, nn.functional.conv2d(x, self.weight.transpose(0, 1)), self.bias, self.size)


class _Picked(torch.autograd.Function):
    """Every other pixel of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape[2:]
        return _every_other(x).contiguous(memory_format=_format(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _applied(_Inserted, grad, grad.new_zeros(grad.shape[1]), ctx.size)


class _Inserted(torch.autograd.Function):
    """`y` at every other pixel of a grid of `size`, plus a bias for each channel everywhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.dtype = bias.dtype
        full = torch.empty(*y.shape[:2], *size, dtype=y.dtype, device=y.device, memory_format=_format(y))
        full.copy_(bias[:, None, None])
        _every_other(full).add_(y)
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _applied(_Picked, grad), grad.sum((0, 2, 3), dtype=ctx.dtype), None


def _applied(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    return cast(Tensor, function.apply(*args))


def _every_other(x: Tensor) -> Tensor:
    return x[:, :, ::STAGE_FACTOR, ::STAGE_FACTOR]


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def stage_widths(model: ModelConfig) -> list[int]:
    """Features at each resolution, the finest first."""
    return [max(1, round(model.width * stage)) for stage in STAGES]


def encoder(channels: int, model: ModelConfig) -> list[list[Unit]]:
    """Stages from an image [B, channels, H, W] to [B, features]."""
    widths = stage_widths(model)
    stages: list[list[Unit]] = [[(_conv3(channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))]]
    previous = widths[0]
    for i, width in enumerate(widths):
        if i:
            past = Pick(previous, width)
            stages.append([(ResidualBlock(previous, width, _conv3(previous, width, STAGE_FACTOR), past),)])
        stages[-1] += [(ResidualBlock(width, width),) for _ in range(model.depth - (i > 0))]
        previous = width
    stages[-1].append((*_pointwise(previous, previous), nn.AdaptiveMaxPool2d(1), nn.Flatten()))
    return stages


def decoder(size: tuple[int, int], model: ModelConfig) -> list[list[Unit]]:
    """Stages from codes [B, latents] to features [B, K, *size]."""
    widths = stage_widths(model)
    sizes = [(math.ceil(size[0] / STAGE_FACTOR**i), math.ceil(size[1] / STAGE_FACTOR**i)) for i in range(len(widths))]
    stages: list[list[Unit]] = [[(Spread(model.latents, sizes[-1]), *_pointwise(model.latents, widths[-1]))]]
    stages[-1] += [(ResidualBlock(widths[-1], widths[-1]),) for _ in range(model.depth)]
    for i in reversed(range(len(widths) - 1)):
        stages.append([(_upsampling_block(widths[i + 1], widths[i], sizes[i + 1], sizes[i], model.upsampling),)])
        stages[-1] += [(ResidualBlock(widths[i], widths[i]),) for _ in range(model.depth - 1)]
    stages[-1].append(_pointwise(widths[0], widths[0]))
    return stages


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
    return ResidualBlock(inputs, outputs, first, Insert(inputs, outputs, large))


def _conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


def _pointwise(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
