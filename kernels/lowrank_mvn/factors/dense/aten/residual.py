"""Pass 2: the residual r = δ − Pv, q as a sum of squares, and the correction of v."""

import torch
from torch import Tensor

from .... import capacitance as algebra
from ....capacitance import applied, last_step, product_dtype, runs, with_identity
from ....device.pages import Scratch
from . import blocks
from .capacitance import factorised, logdet_D

# A factor of up to so many values: the number of calls costs, and float64 nothing more.
AT_ONCE_VALUES = 1 << 14

Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> Kept:
    """q = δᵀΣ⁻¹δ [S, B], log|Σ| [B], L⁻¹ [B, R, R], v and its last step C⁻¹g [S, B, R] (float64), r and `wide` [B].

    r = δ − Pv [S, B, N] is the residual before the last step of v: the step is made of it, and takes its rounding back
    where it is subtracted from the same r (README.md). L⁻¹, log|Σ| and `wide` of an earlier call for the same P and d
    may be given: C is not made again.
    """
    S, N = x.shape[0], P.shape[1]
    if P.numel() <= AT_ONCE_VALUES and P.device.type == "cpu":
        return _at_once(x, loc, P, d, L_inv, logdet)
    dtype = product_dtype(x, loc, P, d)
    if L_inv is None or logdet is None or wide is None:
        _, L_inv, logdet, w, wide = factorised((x, loc), P, d, inverted=False)
        logdet = logdet + logdet_D(d, N)
    else:
        L_inv, logdet, wide = L_inv.clone(), logdet.clone(), wide.clone()
        w = _projection(x, loc, P, d, wide, dtype)
    v = applied(L_inv, w)
    q = v.square().sum(-1)
    g = -v
    residual = x.new_empty(x.shape, dtype=dtype)
    scratch = Scratch(torch.float64, P.device)
    for items, products in runs(wide, dtype) if S else ():
        for b, n, part in blocks.vector_blocks(P, S, items, products):
            delta = blocks.delta(x, loc, b, n, torch.float64)
            d_inv = blocks.diagonal(d, b, n, products).reciprocal()
            r, g_part = residual.transpose(0, 1)[b, :, n], g[b]
            for i, j, p in blocks.factor_blocks(part, S, products):
                # With a small d, r is the remainder of numbers hundreds of times its size: float64, rounded once.
                exact = torch.baddbmm(delta[i, :, j], v[b][i], scratch.like(p).copy_(p).mT, alpha=-1)
                rounded = r[i, :, j].copy_(exact)
                z = (rounded if products == dtype else exact) * blocks.columns(d_inv, i, j).unsqueeze(1)
                g_part[i].add_(blocks.projection(z, p.to(products)))
            q[b] += (r.square() * d_inv.unsqueeze(1)).sum(-1, dtype=torch.float64)
    return _outputs(last_step(q, g, v, L_inv), logdet, L_inv, residual, wide)


def _projection(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """w = PᵀD⁻¹δ [B, S, R] alone, where C is known."""
    S, (B, N, R) = x.shape[0], P.shape
    w = P.new_zeros(B, S, R, dtype=torch.float64)
    for items, products in runs(wide, dtype):
        for b, n in blocks.blocks(items, N, R + 3 * S, blocks.BLOCK_VALUES):
            z = blocks.delta(x, loc, b, n, products) / blocks.diagonal(d, b, n, products).unsqueeze(1)
            w[b] += blocks.projection(z, P[b, n].to(products))
    return w


def _outputs(
    corrected: tuple[Tensor, Tensor, Tensor], logdet: Tensor, L_inv: Tensor, residual: Tensor, wide: Tensor
) -> Kept:
    q, v, step = corrected
    v, step = (t.transpose(0, 1).contiguous() for t in (v, step))
    return q.T.contiguous(), logdet, L_inv, v, step, residual, wide


def _at_once(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, L_inv: Tensor | None, logdet: Tensor | None) -> Kept:
    """`mahalanobis_and_logdet` in float64, without blocks and with as few calls as can be."""
    dtype, (B, N, _) = product_dtype(x, loc, P, d), P.shape
    P, d = P.double(), d.double().unsqueeze(1)
    delta = (x.double() - loc).transpose(0, 1)
    Q, wide = P / d.mT, torch.ones(B, dtype=torch.bool)
    if L_inv is None or logdet is None:
        C = with_identity(Q.mT @ P)
        L_inv, logdet = made = algebra.factorise(C)
        algebra.improve(*made, C, wide, dtype, lambda items: _mixed_gram(P[items], d[items], made[0][items]))
        logdet = logdet + d.log().sum((1, 2)) * (N if d.shape[2] == 1 else 1)
    else:
        L_inv, logdet = L_inv.clone(), logdet.clone()
    v = applied(L_inv, delta @ Q)
    r = torch.baddbmm(delta, v, P.mT, alpha=-1)
    z = r / d
    q = (r * z).sum(-1) + v.square().sum(-1)
    residual = r.transpose(0, 1).to(dtype).contiguous()
    return _outputs(last_step(q, z @ P - v, v, L_inv), logdet, L_inv, residual, wide)


def _mixed_gram(P: Tensor, d: Tensor, L_inv: Tensor) -> Tensor:
    """L⁻¹PᵀD⁻¹PL⁻ᵀ of rows D^(−½)PL⁻ᵀ; d [b, 1, N or 1]."""
    rows = (P * d.mT.rsqrt()) @ L_inv.mT
    return rows.mT @ rows
