"""Sheets of what can be done with one prediction: a grid between four samples, its components, an edit (paper, 5)."""

from typing import cast

import torch
from torch import Tensor

from ..models.observation import Observation, Temperature
from .observation import LowRank, condition, draw_noise, scale_components, slerp

__all__ = ["components", "drawn", "edit", "grid"]


def drawn(p: Observation, count: int, whose: str) -> tuple[LowRank, Tensor, Tensor]:
    """`p`, of one item, as a distribution with a low-rank part; ω_p of so many samples [count, R], and one ω_d [N].

    Raises:
        ValueError: it has no low-rank part; `whose` it is stands in the message.
    """
    try:
        low_rank = cast(LowRank, p)
        omega_p, omega_d = draw_noise(low_rank, count)
    except TypeError as error:
        raise ValueError(f"{whose}: {error}; expected the head structured or global-local") from None
    return low_rank, omega_p[:, 0], omega_d[0, 0]


def grid(p: LowRank, corners: Tensor, omega_d: Tensor, side: int, temperature: Temperature = (1.0, 1.0)) -> Tensor:
    """Samples between four (equation 4, in two directions): ω_p turns along the edges, then across; ω_d is held.

    Args:
        p: of one item, batch shape [1].
        corners: ω_p at the upper left, upper right, lower left and lower right, [4, R].
        omega_d: ω_d of all, [N].
        side: images along an edge, at least 2.

    Returns: [side · side, N], row by row.

    Raises:
        ValueError: `side` is below 2, or corners of another shape.
    """
    if side < 2:
        raise ValueError(f"side is {side}, expected at least 2: a grid has corners")
    if corners.shape != (4, p.rank()):
        raise ValueError(f"corners has shape {list(corners.shape)}, expected [4, {p.rank()}]")
    t = torch.linspace(0, 1, side, dtype=corners.dtype, device=corners.device)[:, None]
    left, right = slerp(corners[0], corners[2], t), slerp(corners[1], corners[3], t)  # [side, R]
    omega_p = slerp(left[:, None], right[:, None], t[None]).flatten(0, 1)  # [side · side, R]
    noise = omega_p[:, None], omega_d.expand(len(omega_p), 1, -1)
    return p.rsample((len(omega_p),), noise=noise, temperature=temperature)[:, 0]


def components(
    p: LowRank, omega_p: Tensor, omega_d: Tensor, factors: Tensor, count: int, temperature: Temperature = (1.0, 1.0)
) -> Tensor:
    """One sample with one principal component at a time scaled (equation 5), the largest first.

    Args:
        p: of one item, batch shape [1].
        omega_p, omega_d: of the sample, [R] and [N].
        factors: what the component is scaled by, [F]; 1 leaves the sample as it is.
        count: components, at most R.

    Returns: [count, F, N].

    Raises:
        ValueError: `count` is not 1 to R.
    """
    R = p.rank()
    if not 1 <= count <= R:
        raise ValueError(f"components is {count}, expected 1 to {R}, the rank")
    noise = omega_p[None, None], omega_d[None, None]
    rows = []
    for k in range(count):
        scales = torch.ones(len(factors), R, dtype=factors.dtype, device=factors.device)
        scales[:, k] = factors
        images = [scale_components(p, scale).rsample((1,), noise=noise, temperature=temperature) for scale in scales]
        rows.append(torch.cat(images)[:, 0])
    return torch.stack(rows)


def edit(
    p: Observation, image: Tensor, mask: Tensor, samples: int, temperature: Temperature = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """`p` given the pixels of `image` under `mask` (equations 6 and 7): its mean [N], and samples [samples, N].

    Args:
        p: of one item, batch shape [1].
        image: intensities, [channels, H, W]; mask: bool, of the same shape.

    Raises:
        ValueError: nothing is masked, or an image or a mask of another size.
    """
    if not mask.any():
        raise ValueError("the mask is empty, expected pixels that are edited")
    given = condition(p, image, mask)
    drawn = given.rsample((samples,), temperature=temperature)
    return given.loc.reshape(-1), drawn.reshape(samples, -1)
