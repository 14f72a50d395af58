"""Pass 2: the residual r = δ − F̃ᵀ(u + m), q as a sum of squares, and the correction of v."""

import torch
from torch import Tensor

from ....capacitance import last_step, product_dtype, runs
from ....device.pages import Scratch, mapped
from .. import forms
from . import blocks
from .moments import factorised


def mahalanobis_and_logdet(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, W_cG_c [B, channels, R, K+1],
    F̃z_c [B, S, channels, K+1], the residual and `wide` [B].

    All float64 but the residual r = δ − F̃ᵀ(u + m) [S, B, channels, pixels], made in float64 and rounded once, at v
    before its last step.
    """
    (S, B, channels, pixels), K = x.shape, F.shape[1]
    rows = S * channels
    dtype, W64, m64 = product_dtype(x, F, W, d), W.double(), None if m is None else m.double()
    WG, wF, _, C_inv, logdet, wide = factorised((x, loc), F, W, d, inverted=False)
    logdet = logdet + forms.logdet_D(d, channels * pixels)
    v = forms.projection(wF, WG, W64, m64) @ C_inv
    q, g = v.square().sum(-1), -v
    u = forms.coefficients(v, W64)
    minus_u = -(u if m64 is None else u + m64).flatten(1, 2)
    residual = mapped(x.shape, dtype, x.device)
    zF, rz = F.new_zeros(B, rows, K + 1, dtype=torch.float64), F.new_zeros(B, rows, dtype=torch.float64)
    exact, scratch = Scratch(torch.float64, F.device), Scratch(torch.float64, F.device)
    for items, products in runs(wide, dtype) if S else ():
        copies, precision_of = Scratch(products, F.device), blocks.precision_of(d, products)
        for b, n in blocks.blocks(F, 2 * (K + rows), items):  # float64 takes twice the memory
            f64 = blocks.features(F, b, n, exact)
            f = f64 if products == torch.float64 else blocks.features(F, b, n, copies)
            # With a small d, r is the remainder of numbers hundreds of times its size: float64, rounded once.
            made = scratch.shaped(f.shape[0], rows, f.shape[2])
            torch.add(blocks.delta(x, loc, b, n, torch.float64), minus_u[b, :, K:], out=made)
            r = made.baddbmm_(minus_u[b, :, :K], f64).to(products)
            residual[:, b, :, n] = r.unflatten(1, (S, channels)).transpose(0, 1)
            z = blocks.scale(r.clone(), precision_of(b, n))
            blocks.add_products(zF[b], z, f)
            rz[b] += z.mul_(r).sum(2, dtype=torch.float64)
    q, zF = q + rz.unflatten(1, (S, channels)).sum(2), zF.unflatten(1, (S, channels))
    g = g + forms.projection(zF, WG, W64, None)
    q, v, step = last_step(q, g, v, C_inv)
    zF = forms.of_scores(zF, WG, step)
    return q.T.contiguous(), logdet, C_inv, v.transpose(0, 1), step.transpose(0, 1), WG, zF, residual, wide
