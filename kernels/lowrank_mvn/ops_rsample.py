"""The operator of a sample whose noise is drawn in a kernel, registered as those in `ops`.

loc  [S or 1, B, N]    P  [B, N, R]    d  [B, N] or [B, 1]    ω_p  [S, B, R]    ω_d  [S, B, N], or a seed per item [B]
"""

import torch
from torch import Tensor

from . import ops


def _rsample(loc, P, d, omega_p, omega_d, seed, impl):
    seed = None if seed is None else seed.contiguous()  # one for all items where a batching rule has expanded it
    with ops.without_autocast(P.device):
        return ops.IMPLEMENTATIONS[impl].rsample(loc, P, d, omega_p, omega_d, seed)


def _rsample_fake(loc, P, d, omega_p, omega_d, seed, impl):
    return loc.new_empty(omega_p.shape[0], *P.shape[:2])


ops.define(
    "rsample(Tensor loc, Tensor P, Tensor d, Tensor omega_p, Tensor? omega_d, Tensor? seed, str impl) -> Tensor",
    _rsample,
    _rsample_fake,
)


def _backward(grad_y, P, d, omega_p, omega_d, seed, needs, impl):
    seed = None if seed is None else seed.contiguous()
    with ops.without_autocast(P.device):
        return ops.IMPLEMENTATIONS[impl].rsample_backward(grad_y, P, d, omega_p, omega_d, seed, needs)


def _backward_fake(grad_y, P, d, omega_p, omega_d, seed, needs, impl):
    contiguous = torch.contiguous_format
    noise = omega_d if omega_d is not None else grad_y
    grads = (torch.empty_like(P), *(torch.empty_like(t, memory_format=contiguous) for t in (d, noise)))
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))


ops.define(
    "rsample_backward(Tensor grad_y, Tensor P, Tensor d, Tensor omega_p, Tensor? omega_d, Tensor? seed,"
    " bool[3] needs, str impl) -> (Tensor grad_P, Tensor grad_d, Tensor grad_omega_d)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_y):
    loc, P, d, omega_p, omega_d, seed = ctx.saved_tensors
    need_loc, need_P, need_d, need_omega_p, need_omega_d = ctx.needs_input_grad[:5]
    grad_loc = grad_omega_p = None
    if need_loc:
        grad_loc = grad_y if loc.shape[0] == grad_y.shape[0] else grad_y.sum(0, keepdim=True)
    if need_omega_p:
        work = torch.promote_types(grad_y.dtype, P.dtype)
        with ops.without_autocast(P.device):
            grad_omega_p = torch.bmm(grad_y.transpose(0, 1).to(work), P.to(work)).transpose(0, 1).to(omega_p.dtype)
    needs = [need_P, need_d, need_omega_d]
    rest = rsample_backward(grad_y, P, d, omega_p, omega_d, seed, needs, ctx.impl) if any(needs) else (None,) * 3
    grad_P, grad_d, grad_omega_d = (g if need else None for g, need in zip(rest, needs, strict=True))
    return grad_loc, grad_P, grad_d, grad_omega_p, grad_omega_d, None, None


def _setup_context_twice(ctx, inputs, output):
    *tensors, ctx.needs, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(ctx, *cotangents):
    """Through the formula in float64, with the noise that the seed stands for."""
    grad_y, P, d, omega_p, omega_d, seed = ctx.saved_tensors
    if omega_d is None:
        nothing, one = torch.zeros_like(grad_y), torch.ones_like(d)
        omega_d = rsample(nothing, P.detach() * 0, one, torch.zeros_like(omega_p), None, seed, ctx.impl)

    def first(grad_y, d, omega_p, omega_d):
        root = d.sqrt()
        grad_d = (grad_y * omega_d).sum(0) / (2 * root)
        grad_P = torch.einsum("sbn,sbr->bnr", grad_y, omega_p)
        grad_d = grad_d.sum(1, keepdim=True) if d.shape[1] == 1 else grad_d
        return tuple(g for g, need in zip((grad_P, grad_d, grad_y * root), ctx.needs, strict=True) if need)

    inputs = (grad_y, d, omega_p, omega_d)
    wanted = tuple(g.double() for g, need in zip(cotangents, ctx.needs, strict=True) if need)
    with ops.without_autocast(P.device):
        pull = torch.func.vjp(first, *(t.double() for t in inputs))[1]
        grads = [g.to(t.dtype) for g, t in zip(pull(wanted), inputs, strict=True)]
    grad_grad_y, grad_d, grad_omega_p, grad_omega_d = grads
    return grad_grad_y, None, grad_d, grad_omega_p, grad_omega_d if seed is None else None, None, None, None


def _into_items(tensors, dims, V: int, at: tuple[int, ...]) -> list[Tensor | None]:
    return [ops._into_items(t, dim, V, at=where) for t, dim, where in zip(tensors, dims, at, strict=True)]


def _batched(info, in_dims, loc, P, d, omega_p, omega_d, seed, impl):
    V = info.batch_size
    items = _into_items((loc, P, d, omega_p, omega_d, seed), in_dims[:6], V, (1, 0, 0, 1, 1, 0))
    return ops._split(rsample(*items, impl), V, 1), 0


def _batched_backward(info, in_dims, grad_y, P, d, omega_p, omega_d, seed, needs, impl):
    V = info.batch_size
    items = _into_items((grad_y, P, d, omega_p, omega_d, seed), in_dims[:6], V, (1, 0, 0, 1, 1, 0))
    grads = rsample_backward(*items, needs, impl)
    split = tuple(ops._split(g, V, at) if need else g for g, at, need in zip(grads, (0, 0, 1), needs, strict=True))
    return split, tuple(0 if need else None for need in needs)


rsample = ops._register("rsample", _setup_context, _differentiate, _batched)
rsample_backward = ops._register("rsample_backward", _setup_context_twice, _differentiate_twice, _batched_backward)
