"""Speckle: whether what is random in an image is smooth or noise, by correlation between neighbours."""

import torch
from torch import Tensor

__all__ = ["AXES", "pooled", "sums"]

AXES = {"vertical": -2, "horizontal": -1}


def sums(images: Tensor, counted: Tensor | None = None) -> Tensor:
    """What `pooled` needs of deviations from the mean, samples y − μ or residuals x − μ.

    Args:
        images: [..., channels, H, W].
        counted: pixels that count, bool [channels · H · W]; a pair counts where both do.

    Returns: for each axis Σ rₙrₙ₊₁ and Σ ½(rₙ² + rₙ₊₁²) over the pairs of neighbours, [..., 2 axes, 2], float64.
        They add: of several images the sums are those of all.

    Raises:
        ValueError: another shape, or images without neighbours along an axis.
    """
    if images.dim() < 3 or min(images.shape[-2:]) < 2:
        raise ValueError(f"images has shape {list(images.shape)}, expected [..., channels, H, W] of at least 2×2")
    r = images.double()
    keep = None if counted is None else counted.to(r.device).reshape(r.shape[-3:])
    found = []
    for axis in AXES.values():
        size = r.shape[axis] - 1
        a, b = r.narrow(axis, 0, size), r.narrow(axis, 1, size)
        products, squares = a * b, 0.5 * (a.square() + b.square())
        if keep is not None:
            both = keep.narrow(axis, 0, size) & keep.narrow(axis, 1, size)
            products, squares = products * both, squares * both
        found.append(torch.stack([products.sum((-3, -2, -1)), squares.sum((-3, -2, -1))], -1))
    return torch.stack(found, -2)


def pooled(total: Tensor) -> dict[str, float]:
    """Correlation between neighbours along each axis, Σ rₙrₙ₊₁ / Σ rₙ², from −1 to 1.

    Args:
        total: `sums` of all images together, [2, 2].

    Returns: NaN where nothing deviates.
    """
    return {name: float(products / squares) for name, (products, squares) in zip(AXES, total, strict=True)}
