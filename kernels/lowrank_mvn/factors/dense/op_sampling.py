"""The operators of samples y = μ + Pω_p + √d ω_d, and of the noise that the kernels draw; shapes as in `op`."""

from typing import Any

import torch
from torch import Tensor

from ...registry import Operator, kept, like, pull_back
from .op import DIMS, IMPLEMENTATIONS

rsample = Operator(
    "rsample(Tensor loc, Tensor P, Tensor d, Tensor omega_p, Tensor? omega_d, Tensor? seed, str impl) -> Tensor y",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].rsample(*inputs[:-2], _seed(inputs[-2])),
    lambda loc, P, d, omega_p, omega_d, seed, impl: loc.new_empty(omega_p.shape[0], *P.shape[:2]),
    DIMS,
)


def _seed(seed: Tensor | None) -> Tensor | None:
    """One for all items where a batching rule has expanded it."""
    return None if seed is None else seed.contiguous()


def _backward(grad_y, P, d, omega_p, omega_d, seed, needs, impl):  # type: ignore[no-untyped-def]
    return IMPLEMENTATIONS[impl].rsample_backward(grad_y, P, d, omega_p, omega_d, _seed(seed), needs)


def _backward_fake(grad_y, P, d, omega_p, omega_d, seed, needs, impl):  # type: ignore[no-untyped-def]
    grads = torch.empty_like(P), like(d), like(grad_y if omega_d is None else omega_d)
    return tuple(kept(g, need) for g, need in zip(grads, needs, strict=True))


rsample_backward = Operator(
    "rsample_backward(Tensor grad_y, Tensor P, Tensor d, Tensor omega_p, Tensor? omega_d, Tensor? seed,"
    " bool[3] needs, str impl) -> (Tensor grad_P, Tensor grad_d, Tensor grad_omega_d)",
    _backward,
    _backward_fake,
    DIMS,
)

noise = Operator(
    "noise(Tensor seed, int S, int N, ScalarType dtype, str impl) -> Tensor omega_d",
    lambda seed, S, N, dtype, impl: IMPLEMENTATIONS[impl].noise(seed.contiguous(), S, N, dtype),
    lambda seed, S, N, dtype, impl: seed.new_empty(S, seed.shape[0], N, dtype=dtype),
    DIMS,
)


def _derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    grad_y, P, found = grads.y, saved.P, dict[str, Tensor | None]()
    if needs.loc:
        found["loc"] = grad_y if saved.loc.shape[0] == grad_y.shape[0] else grad_y.sum(0, keepdim=True)
    if needs.omega_p:
        work = torch.promote_types(grad_y.dtype, P.dtype)
        product = torch.bmm(grad_y.transpose(0, 1).to(work), P.to(work))
        found["omega_p"] = product.transpose(0, 1).to(saved.omega_p.dtype)
    wanted = [needs.P, needs.d, needs.omega_d]
    if any(wanted):
        given = saved.d, saved.omega_p, saved.omega_d, saved.seed
        rest = rsample_backward(grad_y, P, *given, wanted, saved.impl)
        found |= dict(zip(("P", "d", "omega_d"), rest, strict=True))
    return found


def _second_derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    """Through the formula in float64, with the noise that the seed stands for."""
    grad_y, P, d, seed = saved.grad_y, saved.P, saved.d, saved.seed
    omega_d = saved.omega_d
    if omega_d is None:
        S, _, N = grad_y.shape
        omega_d = noise(seed, S, N, torch.promote_types(grad_y.dtype, torch.float32), saved.impl)

    def first(grad_y: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor) -> tuple[Tensor, ...]:
        root = d.sqrt()
        grad_d = (grad_y * omega_d).sum(0) / (2 * root)
        grad_P = torch.einsum("sbn,sbr->bnr", grad_y, omega_p)
        grad_d = grad_d.sum(1, keepdim=True) if d.shape[1] == 1 else grad_d
        return tuple(g for g, need in zip((grad_P, grad_d, grad_y * root), saved.needs, strict=True) if need)

    made = (grads.grad_P, P), (grads.grad_d, d), (grads.grad_omega_d, omega_d)
    wanted = tuple(
        torch.zeros_like(t) if g is None else g for (g, t), need in zip(made, saved.needs, strict=True) if need
    )
    names = "grad_y", "d", "omega_p", "omega_d"
    return dict(zip(names, pull_back(first, (grad_y, d, saved.omega_p, omega_d), wanted), strict=True))


INPUTS = "P", "d", "omega_p", "omega_d", "seed"
rsample.register(_derivative, ("loc", *INPUTS, "impl"))
rsample_backward.register(_second_derivative, ("grad_y", *INPUTS, "needs", "impl"))
noise.register(lambda saved, needs, grads: {}, ())
