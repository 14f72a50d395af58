"""Inputs and oracles for the tests of `lowrank_mvn`; a module of data and functions, without tests."""

import torch
import torch.distributions as td
from torch import Tensor

from lowrank_mvn import LowRankMultivariateStudentT

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# (id, batch, N, R, layout of P, diagonal): ragged first.
SHAPES = [
    ("one", (1,), 1, 1, "BNR", "pixel"),
    ("no-batch", (), 5, 2, "BNR", "pixel"),
    ("rank-above-N", (2,), 3, 7, "BNR", "pixel"),
    ("rank-1", (3,), 17, 1, "BRN", "pixel"),
    ("rank-25", (3,), 130, 25, "BNR", "pixel"),
    ("transposed", (3,), 130, 25, "BRN", "pixel"),
    ("scalar-d", (3,), 130, 25, "BRN", "scalar"),
    ("item-d", (3,), 67, 4, "BNR", "item"),
    ("two-batch-dims", (2, 3), 33, 3, "BRN", "pixel"),
    ("strided", (2,), 40, 3, "strided", "pixel"),
    ("empty-batch", (0,), 9, 2, "BNR", "pixel"),
]
SHAPE_IDS = [shape[0] for shape in SHAPES]


def parameters(batch, N, R, layout="BNR", diagonal="pixel", dtype=torch.float64, scale=1.0, d=1.0):
    """loc, P, d (d ± 50 %) in the layout asked for."""
    loc = torch.randn(*batch, N, dtype=torch.float64)
    P = factor(dtype, batch, N, R, layout, scale=scale)
    shape = {"pixel": (*batch, N), "item": (*batch, 1), "scalar": ()}[diagonal]
    return loc.to(dtype), P, (d * (0.5 + torch.rand(shape, dtype=torch.float64))).to(dtype)


def student_t(df=4.0, batch=(3,), N=7, R=2, dtype=torch.float64, **options) -> LowRankMultivariateStudentT:
    return LowRankMultivariateStudentT(df, *parameters(batch, N, R, dtype=dtype), **options)


def factor(dtype, batch, N, R, layout, scale=1.0, **options) -> Tensor:
    """P [*batch, N, R], random, made in float64."""
    shape = (R, N) if layout == "BRN" else (N, R)
    P = (torch.randn(*batch, *shape, dtype=torch.float64, **options) * scale).to(dtype)
    return P.mT if layout == "BRN" else strided(P) if layout == "strided" else P


def strided(P: Tensor) -> Tensor:
    """Every second row and column of something larger, in which all else is NaN."""
    holder = P.new_full((*P.shape[:-2], 2 * P.shape[-2], 2 * P.shape[-1]), float("nan"))
    holder[..., ::2, ::2] = P
    return holder[..., ::2, ::2]


def oracle(loc: Tensor, P: Tensor, d: Tensor) -> td.Distribution:
    """torch's class in float64, where the textbook is exact enough."""
    loc, P, d = (t.double() for t in (loc, P, d))
    d = d.unsqueeze(-1) if d.dim() == 0 else d
    return td.LowRankMultivariateNormal(loc, P, d.expand(*d.shape[:-1], P.shape[-2]), validate_args=False)


def draw(loc: Tensor, P: Tensor, d: Tensor, samples=()) -> Tensor:
    """A value from the model, made in float64 and rounded to the dtype of `loc`."""
    loc64, P64, d64 = (t.double() for t in (loc, P, d))
    shape = (*samples, *loc.shape)
    omega_p = torch.randn(*shape[:-1], P.shape[-1], 1, dtype=torch.float64)
    y = loc64 + (P64 @ omega_p)[..., 0] + d64.sqrt() * torch.randn(shape, dtype=torch.float64)
    return y.to(loc.dtype)


def gradients(function, *tensors: Tensor) -> list[Tensor]:
    """Gradients of `function` of leaf copies, strides kept."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(*leaves), leaves, allow_unused=False))


def loss(distribution, value: Tensor) -> Tensor:
    """One that tells log-density and entropy apart, and items too."""
    log_prob, entropy = distribution.log_prob(value), distribution.entropy()
    weights = torch.arange(1, log_prob.numel() + 1, dtype=torch.float64).view(log_prob.shape)
    return (log_prob.double() * weights).sum() - 0.7 * entropy.double().sum()


def rounded(t: Tensor) -> Tensor:
    """Every value moved by up to one unit in the last place of float32."""
    return t * (1 + 2.0**-23 * (2 * torch.rand_like(t) - 1))


def through(t: Tensor, move) -> Tensor:
    """`t` after `move`, as is its gradient on the way back."""
    t = t + (move(t) - t).detach()
    if t.requires_grad:
        t.register_hook(move)
    return t


def unmoved(t: Tensor) -> Tensor:
    return t


def tolerances(values, terms: int, most: float, draws: int = 4) -> list[float]:
    """How far two computations in float32 may be apart, from the problem itself: of each value, relative to its norm.

    The largest change when inputs, intermediate results and their gradients are moved by a unit in the last place,
    twice (for two computations), and √`terms` times, because sums of so many terms round at each of them (Higham and
    Mary, 2019: √n u Σ|x| in all but few cases); and never more than `most`. `values(move)` gives the values in
    float64, of numbers that `move` went over.
    """
    factor = 2 * terms**0.5
    exact = values(unmoved)
    moved = [values(rounded) for _ in range(draws)]
    return [min(most, factor * max(relative(m[i], t) for m in moved)) for i, t in enumerate(exact)]


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    b = b.double()
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()
