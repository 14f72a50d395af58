"""Edits as lists of strokes, in a small JSON file, painted onto an image.

    [{"points": [[12, 20], [14, 30]], "radius": 2.5, "value": 0.9}, …]

Points are (row, column) in pixels of the run's images, 0 the first; a stroke runs straight from one to the next and
covers what is within its radius. With {"height": 64, "width": 64, "strokes": […]} they are for images of that size, and
are scaled to others. A value is an intensity from 0 to 1, or one for each channel. Later strokes cover
earlier ones.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.decode import shown

__all__ = ["Stroke", "paint", "read"]


class Stroke(NamedTuple):
    """One stroke."""

    points: list[tuple[float, float]]  # row, column
    radius: float  # pixels
    value: tuple[float, ...]  # intensity of each channel, or one for all


def read(path: Path, size: Sequence[int] | None = None) -> list[Stroke]:
    """The strokes of a file.

    Args:
        size: height and width of the images that they are for; strokes for another size are scaled to it.

    Raises:
        FileNotFoundError: there is none. ValueError: it holds something else; the stroke is named.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(str(path))} is no JSON ({error})") from None
    scale = (1.0, 1.0)
    if isinstance(values, dict):
        try:
            drawn = float(values["height"]), float(values["width"])
            values, unknown = values["strokes"], sorted(values.keys() - {"height", "width", "strokes"})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{shown(str(path))} has no height, width and strokes ({error})") from None
        if unknown or min(drawn) < 1:
            raise ValueError(
                f"{shown(str(path))} is of {drawn} pixels and has {unknown}, expected no more than strokes"
            )
        if size is not None:
            scale = size[0] / drawn[0], size[1] / drawn[1]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{shown(str(path))} holds no strokes, expected a list of them")
    return [_scaled(_stroke(path, i, value), scale) for i, value in enumerate(values)]


def _scaled(stroke: Stroke, scale: tuple[float, float]) -> Stroke:
    """Pixel centres go to where they lie in the other image."""
    points = [((row + 0.5) * scale[0] - 0.5, (column + 0.5) * scale[1] - 0.5) for row, column in stroke.points]
    return stroke._replace(points=points, radius=stroke.radius * min(scale))


def _stroke(path: Path, i: int, value: Any) -> Stroke:
    try:
        points = [(float(row), float(column)) for row, column in value["points"]]
        colour = value["value"] if isinstance(value["value"], list) else [value["value"]]
        stroke = Stroke(points, float(value["radius"]), tuple(map(float, colour)))
        unknown = sorted(value.keys() - {"points", "radius", "value"})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{shown(str(path))}: stroke {i} is none ({type(error).__name__}: {error}), expected points, radius, value"
        ) from None
    if unknown:
        raise ValueError(f"{shown(str(path))}: stroke {i} has {', '.join(unknown)}, expected points, radius, value")
    if not points or not np.isfinite([*np.ravel(points), stroke.radius]).all() or stroke.radius <= 0:
        raise ValueError(f"{shown(str(path))}: stroke {i} has no points, or a radius of {stroke.radius}")
    if not all(0 <= v <= 1 for v in stroke.value):
        raise ValueError(f"{shown(str(path))}: stroke {i} has the value {stroke.value}, expected 0 to 1")
    return stroke


def paint(image: Tensor, strokes: list[Stroke]) -> tuple[Tensor, Tensor]:
    """The image with the strokes on it, and where they are, bool, both [channels, H, W].

    Raises:
        ValueError: a point outside of the image, or a value for another number of channels.
    """
    channels, height, width = image.shape
    rows, columns = np.mgrid[:height, :width]
    painted, mask = image.clone(), torch.zeros(height, width, dtype=torch.bool)
    for i, stroke in enumerate(strokes):
        for row, column in stroke.points:
            if not (0 <= row <= height - 1 and 0 <= column <= width - 1):
                raise ValueError(f"stroke {i} goes through ({row:g}, {column:g}), outside of {height}×{width} pixels")
        if len(stroke.value) not in (1, channels):
            raise ValueError(f"stroke {i} has {len(stroke.value)} values, expected 1 or {channels}")
        near = np.full((height, width), np.inf)
        ends = stroke.points if len(stroke.points) > 1 else stroke.points * 2
        for (r0, c0), (r1, c1) in pairwise(ends):
            length = (r1 - r0) ** 2 + (c1 - c0) ** 2
            t = ((rows - r0) * (r1 - r0) + (columns - c0) * (c1 - c0)) / length if length else np.zeros_like(near)
            t = np.clip(t, 0, 1)
            near = np.minimum(near, np.hypot(rows - r0 - t * (r1 - r0), columns - c0 - t * (c1 - c0)))
        covered = torch.from_numpy(near <= stroke.radius)
        painted[:, covered] = torch.tensor(stroke.value, dtype=image.dtype).expand(channels)[:, None]
        mask |= covered
    return painted, mask.expand(channels, -1, -1).clone()
