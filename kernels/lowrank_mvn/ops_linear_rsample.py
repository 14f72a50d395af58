"""The operator of a sample from a linear factor whose noise is drawn in a kernel: y = loc + F̃ᵀu + √d ω_d.

loc  [S or 1, B, C, M] or none    F  [B, K, M]    u  [B, S, C, K+1]    d  [B, C, M] or [B, 1, 1]
ω_d  [S, B, C, M], or a seed per item [B]

The gradients are products of grad_y, u and F, in torch's operators, so that further derivatives follow by themselves;
that of d draws the noise again, by the operator for a full factor.
"""

import torch
from torch import Tensor

from . import linear_forms, ops, ops_rsample
from .linear import IMPLEMENTATIONS, LinearFactor, LinearMean


def rsample(
    loc: Tensor | None,
    factor: LinearFactor,
    mean: LinearMean | None,
    d: Tensor,
    omega_p: Tensor,
    omega_d: Tensor | None,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    """y [S, B, N] of loc [S or 1, B, N] or none, d [B, N] or [B, 1], ω_p [S, B, R], and ω_d [S, B, N] or a seed [B]."""
    F, C = factor.features.flatten(2), factor.weight.shape[-2]
    high = torch.promote_types(torch.promote_types(F.dtype, d.dtype), torch.float32)
    with ops.without_autocast(F.device):
        W = factor._weights(F.shape[:1]).to(high)
        u = linear_forms.coefficients(omega_p.transpose(0, 1).to(high), W)
        u = u if mean is None else u + mean.homogeneous().to(high)
    loc, omega_d = (None if t is None else t.unflatten(2, (C, -1)) for t in (loc, omega_d))
    d = d.unsqueeze(-1) if d.shape[1] == 1 else d.unflatten(1, (C, -1))
    return torch.ops.lowrank_mvn.linear_rsample(loc, F, u, d, omega_d, seed, impl).flatten(2)


def _forward(loc, F, u, d, omega_d, seed, impl):
    with ops.without_autocast(F.device):
        return IMPLEMENTATIONS[impl].linear_rsample(loc, F, u, d, omega_d, seed)


def _fake(loc, F, u, d, omega_d, seed, impl):
    dtype = F.dtype if loc is None else torch.promote_types(F.dtype, loc.dtype)
    return F.new_empty(u.shape[1], u.shape[0], u.shape[2], F.shape[2], dtype=dtype)


ops.define(
    "linear_rsample(Tensor? loc, Tensor F, Tensor u, Tensor d, Tensor? omega_d, Tensor? seed, str impl) -> Tensor",
    _forward,
    _fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_y):
    loc, F, u, d, omega_d, seed = ctx.saved_tensors
    need_loc, need_F, need_u, need_d, need_omega_d = ctx.needs_input_grad[:5]
    S, B, C, M = grad_y.shape
    K = F.shape[1]
    grad_loc = grad_F = grad_u = grad_d = grad_omega_d = None
    if need_loc:
        grad_loc = (grad_y if loc.shape[0] == S else grad_y.sum(0, keepdim=True)).to(loc.dtype)
    with ops.without_autocast(F.device):
        columns = grad_y.transpose(0, 1).flatten(1, 2)
        if need_F:
            coefficients = u[..., :K].flatten(1, 2).to(grad_y.dtype)
            last = F.stride(1) == 1  # the gradient in the layout of F
            grad_F = torch.bmm(columns.mT, coefficients).mT if last else torch.bmm(coefficients.mT, columns)
            grad_F = grad_F.to(F.dtype)
        if need_u:
            work = torch.promote_types(grad_y.dtype, F.dtype)
            product = torch.bmm(columns.to(work), F.mT.to(work)).to(u.dtype)
            total = columns.sum(2, keepdim=True, dtype=u.dtype)
            grad_u = torch.cat([product, total], 2).reshape(u.shape)
        if need_d or need_omega_d:
            # P and ω_p do not enter here.
            nothing = grad_y.new_zeros(1)
            grads = ops_rsample.rsample_backward(
                grad_y.flatten(2),
                nothing.expand(B, C * M, 1),
                d.flatten(1),
                nothing.expand(S, B, 1),
                None if omega_d is None else omega_d.flatten(2),
                seed,
                [False, need_d, need_omega_d],
                ctx.impl,
            )
            grad_d = grads[1].reshape(d.shape) if need_d else None
            grad_omega_d = grads[2].reshape(omega_d.shape) if need_omega_d else None
    return grad_loc, grad_F, grad_u, grad_d, grad_omega_d, None, None


torch.library.register_autograd(
    "lowrank_mvn::linear_rsample", _differentiate, setup_context=_setup_context, lib=ops.library
)
