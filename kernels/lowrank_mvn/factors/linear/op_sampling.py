"""The operator of a sample from a linear factor whose noise is drawn in a kernel: y = loc + F̃ᵀu + √d ω_d.

loc  [S or 1, B, channels, pixels] or none    F  [B, K, pixels]    u  [B, S, channels, K+1]    d  as in `op`
ω_d  [S, B, channels, pixels], or a seed for each item [B]

The gradients are products of grad_y, u and F in torch's operators, so that further derivatives follow by themselves;
that of d draws the noise again.
"""

from typing import Any

import torch
from torch import Tensor

from ...registry import Operator
from ..dense.op_sampling import noise
from .op import DIMS, IMPLEMENTATIONS


def _fake(loc, F, u, d, omega_d, seed, impl):  # type: ignore[no-untyped-def]
    dtype = F.dtype if loc is None else torch.promote_types(F.dtype, loc.dtype)
    return F.new_empty(u.shape[1], u.shape[0], u.shape[2], F.shape[2], dtype=dtype)


rsample = Operator(
    "linear_rsample(Tensor? loc, Tensor F, Tensor u, Tensor d, Tensor? omega_d, Tensor? seed, str impl) -> Tensor y",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].rsample(*inputs[:-1]),
    _fake,
    {**DIMS, **dict.fromkeys(("omega_d", "y"), "SB.."), "u": "B...", "seed": "B"},
)


def _derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor]:
    grad_y, F, u, d, found = grads.y, saved.F, saved.u, saved.d, dict[str, Tensor]()
    S, K = grad_y.shape[0], F.shape[1]
    columns = grad_y.transpose(0, 1).flatten(1, 2)
    if needs.loc:
        grad_loc = grad_y if saved.loc.shape[0] == S else grad_y.sum(0, keepdim=True)
        found["loc"] = grad_loc.to(saved.loc.dtype)
    if needs.F:
        coefficients = u[..., :K].flatten(1, 2).to(grad_y.dtype)
        last = F.stride(1) == 1  # the gradient in the layout of F
        grad_F = torch.bmm(columns.mT, coefficients).mT if last else torch.bmm(coefficients.mT, columns)
        found["F"] = grad_F.to(F.dtype)
    if needs.u:
        work = torch.promote_types(grad_y.dtype, F.dtype)
        product = torch.bmm(columns.to(work), F.mT.to(work)).to(u.dtype)
        found["u"] = torch.cat([product, columns.sum(2, keepdim=True, dtype=u.dtype)], 2).reshape(u.shape)
    if needs.d:
        omega_d = saved.omega_d
        if omega_d is None:
            N = u.shape[2] * F.shape[2]
            drawn = noise(saved.seed, S, N, torch.promote_types(d.dtype, torch.float32), saved.impl)
            omega_d = drawn.view(grad_y.shape)
        products = (grad_y * omega_d).sum(0, dtype=omega_d.dtype)
        total = products.sum((1, 2), keepdim=True, dtype=torch.float64) if d.shape[1:] == (1, 1) else products
        found["d"] = (total / (2 * d.to(total.dtype).sqrt())).to(d.dtype)
    if needs.omega_d:
        found["omega_d"] = (grad_y * d.to(grad_y.dtype).sqrt()).to(saved.omega_d.dtype)
    return found


rsample.register(_derivative, ("loc", "F", "u", "d", "omega_d", "seed", "impl"))
