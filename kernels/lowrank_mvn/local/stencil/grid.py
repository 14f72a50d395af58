"""Which pixels a stencil ties: later neighbours in raster order, slices that pair them, and fronts of a solve."""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Sizes = tuple[int, ...]
Slices = tuple[Any, ...]


def offsets(neighbourhood: Sizes) -> tuple[Sizes, ...]:
    """The later pixels of a neighbourhood in raster order: of (3, 3) they are (0, 1), (1, −1), (1, 0), (1, 1)."""
    window = itertools.product(*(range(-(size // 2), size // 2 + 1) for size in neighbourhood))
    return tuple(offset for offset in window if offset > (0,) * len(neighbourhood))


@functools.cache
def pairs(spatial: Sizes, neighbourhood: Sizes) -> tuple[tuple[Slices, Slices], ...]:
    """For each offset, as slices of [..., *spatial], the pixels that have that neighbour, and their neighbours."""
    found = []
    for offset in offsets(neighbourhood):
        sides = [(max(0, -o), size - max(0, o), o) for o, size in zip(offset, spatial, strict=True)]
        here = (..., *(slice(start, stop) for start, stop, _ in sides))
        there = (..., *(slice(start + o, stop + o) for start, stop, o in sides))
        found.append((here, there))
    return tuple(found)


def steps(neighbourhood: Sizes) -> Sizes:
    """Coefficients a of fronts Σ aᵢ nᵢ such that every later neighbour is on a later front: (2, 1) of (3, 3)."""
    found, reach = [], 0
    for size in reversed(neighbourhood):
        found.append(1 + reach)
        reach += size // 2 * found[-1]
    return tuple(reversed(found))


class Fronts(NamedTuple):
    """Pixels sorted by front: those of one front do not depend on each other in a triangular solve."""

    order: Tensor  # [pixels] the pixel at each place
    bounds: list[tuple[int, int]]  # the places of each front
    later: Tensor  # [neighbours, pixels] the place of each later neighbour, or `pixels` where the image has none
    earlier: Tensor  # likewise of the pixels that have it as a later neighbour


def fronts(spatial: Sizes, neighbourhood: Sizes, device: torch.device) -> Fronts:
    """Tensors with values, kept from one call to the next; in a recorded program they are constants."""
    with _disable_current_modes(), torch.inference_mode(False):
        return _fronts(spatial, neighbourhood, device)


@functools.lru_cache(maxsize=16)
def _fronts(spatial: Sizes, neighbourhood: Sizes, device: torch.device) -> Fronts:
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in spatial), indexing="ij")
    front = torch.stack([a * axis for a, axis in zip(steps(neighbourhood), axes, strict=True)]).sum(0).flatten()
    order = front.argsort(stable=True)
    ends = torch.bincount(front).cumsum(0).tolist()
    bounds = [(start, stop) for start, stop in itertools.pairwise([0, *ends]) if start < stop]
    pixels = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(pixels, device=device)
    place = place.view(spatial)
    later = torch.full((len(offsets(neighbourhood)), *spatial), pixels, device=device)
    earlier = later.clone()
    for k, (here, there) in enumerate(pairs(spatial, neighbourhood)):
        later[k][here] = place[there]
        earlier[k][there] = place[here]
    return Fronts(order, bounds, later.flatten(1)[:, order], earlier.flatten(1)[:, order])


def channel_pairs(channels: int) -> tuple[tuple[int, int], ...]:
    """Each channel with the later ones: (0, 1), (0, 2), …, (1, 2), …"""
    return tuple(itertools.combinations(range(channels), 2))
