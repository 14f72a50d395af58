"""The rest of an image after an edit: its mean, and samples (paper, figures 6 and 11 to 14)."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from ..config import DataConfig, check_seed
from ..data.decode import decode, reason, shown
from .base import OfSamples, at_least, parse

USAGE = "RUN IMAGE MASK [options]"


@dataclass(frozen=True)
class Options(OfSamples):
    """Take some pixels of an image for given, and predict the others from them (equations 6 and 7).

    MASK is a picture, white where IMAGE holds the wanted values and black elsewhere, or a .json file with strokes to
    paint onto IMAGE first. Both pictures are brought to the size of the run's images. The code is that of the image
    before the edit, as far as it is known. Writes a row: image, edit, mean of the rest, samples.
    """

    image: tyro.conf.Positional[Path] = tyro.MISSING
    """Picture to edit (path)."""
    mask: tyro.conf.Positional[Path] = tyro.MISSING
    """Picture, or .json file of strokes (path)."""
    samples: int = 4
    """Samples given the edit (count)."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, samples=self.samples)
        check_seed(self.seed)


@torch.no_grad()
def main(args: list[str]) -> int:
    from ..tools import figures, sheets, strokes

    o = parse(Options, "edit-image", args)
    run, vae, device = o.open()
    image, size = _read(o.image, run.config.data)
    if o.mask.suffix.lower() == ".json":
        edited, mask = strokes.paint(image, strokes.read(o.mask, image.shape[1:]))
    else:
        edited, (painted, of_mask) = image, _read(o.mask, run.config.data)
        if of_mask != size:
            raise ValueError(f"{shown(str(o.mask))} has {_form(of_mask)} pixels, expected {_form(size)}, as the image")
        mask = painted > 0.5
    torch.manual_seed(o.seed)
    p = vae.decode(vae.encode(image[None].to(device)).loc)
    mean, samples = sheets.edit(p, edited.to(device), mask.to(device), o.samples, o.temperature)
    shown_edit = torch.where(mask, edited, 0.25 * edited)
    parts = [image, shown_edit, *vae.unflatten(torch.cat([mean[None], samples])).cpu()]
    print(figures.save_images([("image, edit, mean,\nsamples", torch.stack(parts))], o.out or run.figures / "edit.png"))
    return 0


def _read(path: Path, config: DataConfig) -> tuple[Tensor, tuple[int, int]]:
    """A picture as the run's images are, intensities [channels, H, W], and the size that it had."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{shown(str(path))} is no file, expected a picture")
    raw = path.read_bytes()
    try:
        pixels = decode(raw, config).pixels
        with Image.open(io.BytesIO(raw)) as picture:
            width, height = picture.size
    except Exception as error:  # a decoder raises anything
        raise ValueError(f"{shown(str(path))} cannot be read as a picture: {reason(error)}") from None
    return torch.from_numpy(np.array(pixels)).float() / 255, (height, width)


def _form(size: tuple[int, int]) -> str:
    return "×".join(map(str, size))
