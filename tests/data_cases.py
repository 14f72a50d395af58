"""What the tests of `sosvae.data` share: small images, and configurations with a cache of their own."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from sosvae import DataConfig, Dataset, load


def write(path: Path, value: int = 0, mode: str = "L", size: tuple[int, int] = (20, 18)) -> Path:
    """A small image with a gradient; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = (np.arange(size[0] * size[1]).reshape(size[1], size[0]) + value) % 256
    pixels = plane if mode == "L" else np.stack([plane, plane // 2, 255 - plane], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def settings(source: str, cache: Path, **values) -> DataConfig:
    return DataConfig(source=source, cache=str(cache), **({"height": 18, "width": 20, "validation": 0.25} | values))


def quiet(config: DataConfig, **options) -> tuple[Dataset, list[str]]:
    """The images, and the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        images = load(config, **options)
    return images, [str(warning.message) for warning in found]
