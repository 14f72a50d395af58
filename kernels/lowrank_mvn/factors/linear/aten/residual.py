"""Pass 2: the residual r = δ − F̃ᵀ(u + m), q as a sum of squares, and the correction of v."""

from collections.abc import Callable

import torch
from torch import Tensor

from ....capacitance import applied, last_step, product_dtype, runs
from ....device.pages import Scratch, mapped
from .. import forms
from . import blocks
from .moments import factorised

Residuals = tuple[Tensor, Tensor, Tensor]


def residuals(x: Tensor, loc: Tensor | None, F: Tensor, minus_u: Tensor, d: Tensor, wide: Tensor) -> Residuals:
    """r = x − loc − F̃ᵀu [S, B, channels, pixels], F̃D⁻¹r [B, S·channels, K+1] and rᵀD⁻¹r [B, S·channels].

    `minus_u` [B, S·channels, K+1] and the sums are float64; r is made in float64 and rounded once.
    """
    (S, B, channels, _), K = x.shape, F.shape[1]
    rows, dtype = S * channels, product_dtype(x, F, d)
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
    return residual, zF, rz


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    residuals: Callable[..., Residuals] = residuals,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [S, B], log|Σ| [B], and for the backward pass L⁻¹, v [S, B, R], its last step, W_cG_c [B, channels, R, K+1],
    F̃z_c [B, S, channels, K+1], the residual and `wide` [B].

    All float64 but the residual r = δ − F̃ᵀ(u + m) [S, B, channels, pixels], made in float64 and rounded once, at v
    before its last step.
    """
    S, channels, pixels = x.shape[0], *x.shape[2:]
    W64, m64 = W.double(), None if m is None else m.double()
    WG, wF, _, L_inv, logdet, wide = factorised((x, loc), F, W, d, inverted=False)
    logdet = logdet + forms.logdet_D(d, channels * pixels)
    v = applied(L_inv, forms.projection(wF, WG, W64, m64))
    q, g = v.square().sum(-1), -v
    u = forms.coefficients(v, W64)
    minus_u = -(u if m64 is None else u + m64).flatten(1, 2)
    residual, zF, rz = residuals(x, loc, F, minus_u, d, wide)
    q, zF = q + rz.unflatten(1, (S, channels)).sum(2), zF.unflatten(1, (S, channels))
    g = g + forms.projection(zF, WG, W64, None)
    q, v, step = last_step(q, g, v, L_inv)
    zF = forms.of_scores(zF, WG, step)
    return q.T.contiguous(), logdet, L_inv, v.transpose(0, 1), step.transpose(0, 1), WG, zF, residual, wide
