"""One pass over test images, of any model: numbers for each image, and what they come to.

Images go through in blocks of `BLOCK`. The noise of an image, or of a block, follows from the seed and its number, so
that a pass that was interrupted goes on where it stopped and ends at the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import devices
from . import bits, calibration, speckle
from .bits import Model

__all__ = ["BLOCK", "Settings", "blocks", "measure", "summary"]

BLOCK = 16  # images

Values = Mapping[str, Tensor]


class Settings(NamedTuple):
    """How much noise is drawn, and which."""

    codes: int = 64  # of the importance-weighted bound
    samples: int = 8  # of p(x|z), for the energy score and for speckle
    seed: int = 0


def blocks(count: int) -> Iterator[slice]:
    """The blocks of `count` images."""
    return (slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


@torch.no_grad()
def of_block(
    model: Model,
    images: NDArray[np.uint8],
    first: int,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
    counted: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """What a block of images comes to, float64 on the CPU, [B] or [B, 2, 2] each.

    All but the bound are of p(x|z) at the mean of q(z|x).

    Args:
        images: bytes, [B, channels, H, W].
        first: number of the first of them.
        counted: pixels that count, bool [N]; none: all.
    """
    device = torch.device(device)
    x = bits.dequantised(images, settings.seed, first).to(device)
    draws = [
        np.random.default_rng((settings.seed, first + i, 1)).standard_normal((settings.codes, model.latents))
        for i in range(len(x))
    ]
    flat, noise = x.flatten(1), torch.from_numpy(np.stack(draws, 1).astype(np.float32)).to(device)
    p = model.decode(model.encode(x).loc)
    with devices.seeded(device, int(np.random.default_rng((settings.seed, first, 2)).integers(2**63))):
        y = p.rsample((settings.samples,))
        covered = calibration.inside(p, flat, counted=counted)  # under the seed: variances may be estimates
    found = {
        "log_likelihood": bits.log_likelihood(p, flat, counted),
        "bound": bits.bound(model, x, noise, counted),
        "squares": calibration.squares(p, flat, counted),
        **{f"inside_{share:g}": row for share, row in zip(calibration.INTERVALS, covered, strict=True)},
        "energy": calibration.energy(y, flat, counted),
        "speckle_samples": speckle.sums((y - p.loc).unflatten(-1, model.image_shape), counted).sum(0),
        "speckle_residual": speckle.sums((flat - p.loc).unflatten(-1, model.image_shape), counted),
    }
    return {name: value.double().cpu() for name, value in found.items()}


def measure(
    model: Model,
    images: NDArray[np.uint8],
    settings: Settings = Settings(),  # noqa: B008  (immutable)
    *,
    counted: Tensor | None = None,
    device: torch.device | str = "cpu",
    advanced: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Bits per dimension, calibration and speckle of `model` on images [images, channels, H, W], bytes; see `summary`.

    Args:
        counted: pixels that count, bool [N] (`counted.changing`); none: all.
        advanced: told how many images each block had.

    Raises:
        ValueError: no images, or of another shape than the model's.
    """
    if images.shape[1:] != model.image_shape or not len(images):
        raise ValueError(f"images has shape {list(images.shape)}, expected [images, {str(list(model.image_shape))[1:]}")
    found = []
    for block in blocks(len(images)):
        found.append(of_block(model, images[block], block.start, settings, counted, device))
        advanced(block.stop - block.start)
    N = math.prod(model.image_shape) if counted is None else int(counted.sum())
    return summary({name: torch.cat([each[name] for each in found]) for name in found[0]}, N)


def summary(values: Values, N: int) -> dict[str, float]:
    """What the numbers of all images come to.

    Returns: by name
        images, values: how many images, and how many values N of each, that count.
        bits_likelihood: bits per dimension of the likelihood alone, at the mean code.
        bits: bits per dimension of the importance-weighted bound.
        bits_error: standard error of `bits` over images.
        log_likelihood, bound: nats for each image.
        squares: δᵀΣ⁻¹δ/N.
        inside_0.5, inside_0.9: coverage of the central intervals.
        energy: energy score.
        vertical_samples, horizontal_samples, vertical_residual, horizontal_residual: pooled correlation of neighbours.
    """
    count = len(values["bound"])
    of_bound = bits.per_dimension(values["bound"], N)
    found: dict[str, float] = {
        "images": count,
        "values": N,
        "bits_likelihood": float(bits.per_dimension(values["log_likelihood"], N).mean()),
        "bits": float(of_bound.mean()),
        "bits_error": float(of_bound.std() / math.sqrt(count)) if count > 1 else math.nan,
    }
    found |= {name: float(value.mean()) for name, value in values.items() if value.dim() == 1}
    for kind in ("samples", "residual"):
        pooled = speckle.pooled(values[f"speckle_{kind}"].sum(0))
        found |= {f"{axis}_{kind}": value for axis, value in pooled.items()}
    return found
