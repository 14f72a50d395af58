"""The backward pass: read P, write grad_P, and grad_x, grad_loc, grad_d on the way; only what is asked for.

    grad_x = 2 grad_q z = −grad_loc        grad_P = 2 grad_logdet D⁻¹PC⁻¹ − 2 grad_q z vᵀ
    grad_d = grad_logdet π − grad_q z²     π = diag Σ⁻¹ = 1/d − diag(PC⁻¹Pᵀ)/d²

with r ← r − PC⁻¹g and z = D⁻¹r. Where π cancels, `leverage` makes grad_d again.
"""

import torch
from torch import Tensor

from ....capacitance import product_dtype, runs, sum_of_pi
from ....device.pages import Scratch, empty_gradient
from ....leverage import Items, Remainders, doubtful_sums, mend
from ....registry import kept
from . import blocks
from .pixels import Pixels


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_loc, grad_P, grad_d, each in its input's shape and dtype; empty where `needs` says no."""
    S, N = x.shape[0], P.shape[1]
    need_x, need_loc, need_P, need_d = needs
    dtype, one_d = product_dtype(x, loc, P, d), d.shape[1] == 1
    grad_x, grad_loc = _empty(x, need_x), _empty(loc, need_loc)
    grad_P = empty_gradient(P) if need_P else x.new_empty(0)
    grad_q, grad_logdet = grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    grad_d = _of_logdet(grad_logdet, d, N, C_inv, need_d)
    rest = Remainders(N, C_inv, wide) if need_d and not one_d else None
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    minus_2av = -2 * grad_q.unsqueeze(-1) * v
    for items, products in runs(wide, dtype):
        PC_scratch, Q_scratch = Scratch(products, P.device), Scratch(products, P.device)
        weight, minus_step, coefficients = 2 * grad_logdet[:, None, None] * C_inv, -step, minus_2av.to(products)
        if one_d:  # D⁻¹ is in the R×R part, and Q is P
            weight, minus_step = (t / d.double().unsqueeze(-1) for t in (weight, minus_step))
        weight, minus_step = weight.to(products), minus_step.to(products)
        for b, n, part in blocks.vector_blocks(P, S, items, products):
            d_inv = blocks.diagonal(d, b, n, products).reciprocal()
            r = residual[:, b, n].to(products).transpose(0, 1)
            z = torch.empty_like(r)
            row_sums = d_inv.new_empty(part.shape[:2]) if need_d and not one_d else None
            for i, j, p in blocks.factor_blocks(part, S, products):
                # With Q = D⁻¹P: z = D⁻¹r − QC⁻¹g.
                Q = blocks.scaled(p, None if one_d else d_inv[i, j], Q_scratch)
                shift = blocks.rows(minus_step[b][i], Q)
                zj = torch.addcmul(shift, r[i, :, j], blocks.columns(d_inv, i, j).unsqueeze(1), out=z[i, :, j])
                if not need_P and row_sums is None:
                    continue
                PC = blocks.times(Q, weight[b][i], PC_scratch.like(p))  # 2 grad_logdet QC⁻¹
                if row_sums is not None:
                    torch.sum(Q.mul_(PC), -1, out=row_sums[i, j])
                if need_P and S == 1 and products == P.dtype:  # straight into the gradient: a step less
                    torch.addcmul(PC, zj.mT, coefficients[b][i], out=grad_P[b, n][i, j])
                elif need_P:
                    grad_P[b, n][i, j] = PC.baddbmm_(zj.mT, coefficients[b][i]) if S else PC
            az = z * grad_q[b].to(products).unsqueeze(-1)
            if need_d:
                az2 = z.mul_(az).sum(1)
                if row_sums is None or rest is None:
                    grad_d[b] -= az2.sum(-1, keepdim=True, dtype=torch.float64)
                else:
                    grad_d[b, n] = _of_pi(grad_logdet[b], d_inv, row_sums, b, rest) - az2
            if need_x:
                grad_x[:, b, n] = 2 * az.transpose(0, 1)
            if need_loc:
                az = az if loc.shape[0] == S else az.sum(1, keepdim=True)
                grad_loc[:, b, n] = az.mul_(-2).transpose(0, 1)

    def pixels(t: Items) -> Pixels:
        return Pixels((x[:, t], loc[:, t]), P[t])

    def with_d_per_pixel(t: Items) -> Tensor:
        of_q = grad_mahalanobis[:, t], grad_logdet[t], x[:, t], loc[:, t]
        kept = C_inv[t], v[t].transpose(0, 1), step[t].transpose(0, 1), residual[:, t], wide[t]
        each, wanted = d[t].double().expand(-1, N), [False, False, False, True]
        return mahalanobis_and_logdet_backward(*of_q, P[t], each, *kept, wanted)[3]

    if need_d:
        doubtful, size = doubtful_sums(N, C_inv) if rest is None else rest.doubtful(), N * (P.shape[2] + 2 * S)
        mend(grad_d, doubtful, pixels, with_d_per_pixel, d, C_inv, grad_q, grad_logdet, (N, size))
    return grad_x, grad_loc, grad_P, grad_d.to(d.dtype)


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, C_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2 grad_logdet D⁻¹PC⁻¹ and grad_d = grad_logdet π; empty where `needs` says no."""
    need_P, need_d = needs
    (B, N, R), one_d, dtype = P.shape, d.shape[1] == 1, product_dtype(P, d)
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    grad_logdet = grad_logdet.double()
    grad_d = _of_logdet(grad_logdet, d, N, C_inv, need_d)
    rest = Remainders(N, C_inv, wide) if need_d and not one_d else None
    for items, products in runs(wide, dtype) if need_P or rest else ():
        PC_scratch, Q_scratch = Scratch(products, P.device), Scratch(products, P.device)
        weight = 2 * grad_logdet[:, None, None] * C_inv
        weight = (weight / d.double().unsqueeze(-1) if one_d else weight).to(products)
        for b, n, p in blocks.factor_blocks_of(P, items, products):
            d_inv = blocks.diagonal(d, b, n, products).reciprocal()
            Q = blocks.scaled(p, None if one_d else d_inv, Q_scratch)
            PC = blocks.times(Q, weight[b], PC_scratch.like(p))
            if need_P:
                grad_P[b, n] = PC
            if rest is not None:
                grad_d[b, n] = _of_pi(grad_logdet[b], d_inv, Q.mul_(PC).sum(-1), b, rest)

    def pixels(t: Items) -> Pixels:
        return Pixels(None, P[t])

    def with_d_per_pixel(t: Items) -> Tensor:
        each = d[t].double().expand(-1, N)
        return logdet_backward(grad_logdet[t], P[t], each, C_inv[t], wide[t], [False, True])[1]

    if need_d:
        doubtful, no_q = doubtful_sums(N, C_inv) if rest is None else rest.doubtful(), grad_logdet.new_empty(B, 0)
        mend(grad_d, doubtful, pixels, with_d_per_pixel, d, C_inv, no_q, grad_logdet, (N, N * R))
    return grad_P, grad_d.to(d.dtype)


def _empty(t: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)


def _of_logdet(grad_logdet: Tensor, d: Tensor, N: int, C_inv: Tensor, need: bool) -> Tensor:
    """grad_d, holding grad_logdet Σπ already where d is one value, and then in float64."""
    if not need or d.shape[1] > 1:
        return kept(torch.zeros_like(d, memory_format=torch.contiguous_format), need)
    return (grad_logdet * sum_of_pi(d[:, 0], N, C_inv)).unsqueeze(1)


def _of_pi(grad_logdet: Tensor, d_inv: Tensor, row_sums: Tensor, b: slice, rest: Remainders) -> Tensor:
    """grad_logdet π of a block [b, n], with 2 grad_logdet diag(PC⁻¹Pᵀ)/d² in `row_sums`."""
    of_d = grad_logdet.to(d_inv.dtype).unsqueeze(-1) * d_inv
    pi = torch.add(of_d, row_sums, alpha=-0.5)
    rest.add(b, torch.div(pi, of_d, out=of_d))
    return pi
