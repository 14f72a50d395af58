"""What can be done in the observation space of one predicted distribution p(x|z) (paper, section 5).

All of it is about one latent code: the decoder runs once, and these functions work on what it said. Those that turn or
stretch the low-rank part take any distribution that has one (N(μ, PPᵀ + D), whatever D is), the others all.
"""

from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..models.observation import Observation, Temperature

__all__ = ["LowRank", "condition", "draw_noise", "interpolate", "scale_components"]


class LowRank(Observation, Protocol):
    """A distribution with a low-rank part PPᵀ."""

    def rank(self) -> int: ...
    def factor_gram(self) -> Tensor: ...
    def mix(self, A: Tensor) -> Any: ...


AnyLowRank = TypeVar("AnyLowRank", bound=LowRank)
AnyObservation = TypeVar("AnyObservation", bound=Observation)


def draw_noise(p: LowRank, count: int) -> tuple[Tensor, Tensor]:
    """(ω_p [count, ..., R], ω_d [count, ..., N]) for `p.rsample(noise=...)`, from torch's generator.

    Raises:
        TypeError: `p` has no low-rank part.
    """
    _check_low_rank(p)
    omega_p = p.loc.new_empty(count, *p.batch_shape, p.rank()).normal_()
    return omega_p, p.loc.new_empty(count, *p.batch_shape, *p.event_shape).normal_()


def interpolate(
    p: LowRank,
    start: Tensor,
    end: Tensor,
    omega_d: Tensor,
    steps: int,
    temperature: Temperature = (1.0, 1.0),
) -> Tensor:
    """A smooth path between two samples (equation 4): ω_p turns from one to the other, ω_d is held.

    Args:
        start, end: ω_p of the two samples, [..., R].
        omega_d: ω_d of both, [..., N].
        steps: images on the path, both ends included, at least 2.
        temperature: t_P and t_L, which scale the two.

    Returns:
        [steps, ..., N].

    Raises:
        ValueError: `steps` is below 2. TypeError: `start`, `end` or `omega_d` is no tensor, or `p` has no low-rank
            part.
    """
    _check_low_rank(p)
    _check_tensors(start=start, end=end, omega_d=omega_d)
    if steps < 2:
        raise ValueError(f"steps is {steps}, expected at least 2: a path has two ends")
    t = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)
    t = t.reshape(-1, *[1] * max(start.dim(), end.dim()))
    return p.rsample((steps,), noise=(slerp(start, end, t), omega_d), temperature=temperature)


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Turns `start` into `end` at constant angular speed; a straight line where they (nearly) share a direction.

    A straight line between independent normal vectors would pass through the middle with half their variance,
    and the images there would be closer to the mean than any sample is.
    """
    cosine = torch.cosine_similarity(start, end, dim=-1).unsqueeze(-1).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-4  # below that the quotients lose their digits in float32
    safe = torch.where(straight, torch.ones_like(sine), sine)
    a = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / safe)
    b = torch.where(straight, t, torch.sin(t * angle) / safe)
    return a * start + b * end


def scale_components(p: AnyLowRank, factors: Tensor) -> AnyLowRank:
    """`p` with the principal components of PPᵀ stretched or silenced (equation 5): P = USVᵀ becomes USAVᵀ.

    With PᵀP = V diag(s²) Vᵀ that is P V A Vᵀ: an eigenproblem of size R, in float64, and no decomposition of
    P. The coefficients ω_p of a sample keep their meaning, so the same noise shows the same image with
    components rescaled. A `LinearFactor` gives one with another weight for each item, without P: PᵀP is
    Σ_c W_c (F̃F̃ᵀ) W_cᵀ.

    Args:
        factors: A, [..., R], for the components from the largest to the smallest; 1 leaves a component alone.

    Raises:
        ValueError: the last dimension of `factors` is not R.
        TypeError: `p` has no low-rank part, and so no components; or `factors` is no tensor.
    """
    _check_low_rank(p)
    _check_tensors(factors=factors)
    if factors.shape[-1:] != (p.rank(),):
        raise ValueError(f"factors has shape {list(factors.shape)}, expected [..., {p.rank()}]")
    V = torch.linalg.eigh(p.factor_gram()).eigenvectors.flip(-1)  # eigenvalues ascend
    scaled: AnyLowRank = p.mix((V * factors.to(V)[..., None, :]) @ V.mT)
    return scaled


def condition(p: AnyObservation, edited: Tensor, mask: Tensor) -> AnyObservation:
    """`p` given some pixels (equations 6 and 7): the rest of the image follows an edit, and can be sampled.

    Args:
        edited: the image that holds the wanted values, [..., channels, H, W] or [..., N].
        mask: true where they are wanted, bool, of the shape of one image, [channels, H, W] or [N], or of all of
            them.

    Returns:
        A distribution over all N pixels in which the masked ones have their value and no variance.

    Raises:
        ValueError: an image, or a mask, of another number of values. TypeError: one of them is no tensor.
    """
    _check_tensors(edited=edited, mask=mask)
    N = p.event_shape[0]
    return cast(AnyObservation, p.condition(_events("edited", edited, N), _events("mask", mask, N)))


def _check_low_rank(p: object) -> None:
    if not all(hasattr(p, name) for name in ("rank", "factor_gram", "mix")):
        found = type(p).__name__
        raise TypeError(f"expected a distribution with a low-rank part, got {found}, which has no components")


def _check_tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")


def _events(name: str, images: Tensor, N: int) -> Tensor:
    if images.shape[-1:] == (N,):
        return images
    if images.dim() < 3 or images.shape[-3:].numel() != N:
        raise ValueError(
            f"{name} has shape {list(images.shape)}, expected [..., channels, H, W] or [..., N] of N = {N} values"
        )
    return images.flatten(-3)
