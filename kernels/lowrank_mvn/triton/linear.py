r"""The Triton implementation of a linear factor: the functions of `aten_linear`, from three reads of F and one write.

    linear_common     sums over columns in either layout, and how work is cut
    linear_gram       pass 1: G, F̃D⁻¹(x − loc), log|D|
    linear_residual   pass 2: the residual, the quadratic form as a sum of squares, and F̃D⁻¹r
    linear_backward   every gradient in one pass; `linear_tile` has its parts
    linear_sampling   samples
    linear_blocks     pass 1 and the gradients where K is much larger than C·R: blocks of P, through a full factor's
                      kernels; `product` makes them

What is of the size of G or smaller is made in float64 between the passes (`linear_forms`); C is factorised by `solve`.
As for a full factor nothing waits for the host: items that need float64 are found and made again on the device.
"""

import torch
from torch import Tensor

from .. import linear_forms
from ..aten import product_dtype
from . import common, linear_backward, linear_blocks, solve
from .linear_common import one_value
from .linear_gram import sums as gram_sums
from .linear_residual import sums as residual_sums
from .linear_sampling import linear_rsample


def keeps_products(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether W_cG_c and F̃z_c are outputs of the forward pass: where blocks of P are made, they are not."""
    return not linear_blocks.chosen(channels, R, K1, per_pixel)


def _keeps_products(W: Tensor, d: Tensor) -> bool:
    channels, R, K1 = W.shape[1:]
    return keeps_products(channels, R, K1, not one_value(d))


def _projected(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor, inverted: bool):
    """w = PᵀD⁻¹δ [B, S, R] from a pass of its own; W and m in float64."""
    u = None if m is None else m.expand(F.shape[0], x.shape[0], -1, -1)
    return linear_forms.projection(residual_sums(x, loc, F, d, u, None, inverted)[0], None, W, None)


def _factorised(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, d: Tensor, inverted: bool):
    """W_cG_c, F̃D⁻¹(x − loc) (S = 0 if it does not ride along), C − I and C⁻¹ [B, R, R], log|Σ| [B] and `wide` [B].

    W and W_cG_c are [1 or B, C, R, K+1] in float64.
    """
    (_, B, C, M), R = x.shape, W.shape[2]
    kind = common.products(F, x, d, *([] if loc is None else [loc]))
    first = kind != "float64"
    C_inv, v, logdet = (F.new_empty(shape, dtype=torch.float64) for shape in ((B, R, R), (1, B, R), (B,)))
    wide = torch.ones(B, dtype=torch.bool, device=F.device)
    flat = d.flatten(1)

    def solved(G: Tensor, log_D: Tensor | None, final: bool, flagged: bool) -> tuple[Tensor, Tensor]:
        WG = torch.matmul(W, G)
        gram = linear_forms.gram(WG, W)
        parts = gram.unsqueeze(1), v, logdet[:, None] if log_D is None else log_D[:, None]
        # C is as exact as G: of `solve` only failed pivots are asked, not the bound on rounding in products of P.
        solve.solve(parts, flat, C * M, (C_inv, v, logdet, wide), with_w=False, final=final, flagged=flagged)
        return WG, gram

    G, wF, log_D = gram_sums(x, loc, F, d, inverted, kind)
    WG, gram = solved(G, log_D, final=not first, flagged=False)
    if first:
        wide |= linear_forms.too_rough(G.diagonal(dim1=-2, dim2=-1), W, C_inv, common.ROUNDING[kind], tiles=False)
        G_wide, wF_wide, log_D_wide = gram_sums(x, loc, F, d, inverted, "float64", wide.view(torch.uint8))
        G = torch.where(wide[:, None, None, None], G_wide, G)
        wF = torch.where(wide[:, None, None, None], wF_wide, wF)
        if log_D is not None and log_D_wide is not None:
            log_D = torch.where(wide, log_D_wide, log_D)
        WG, gram = solved(G, log_D, final=True, flagged=True)
    return WG, wF, gram, C_inv, logdet, wide


def linear_gram(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """C = I + Σ_c W_cF̃D_c⁻¹F̃ᵀW_cᵀ [B, R, R] and w = Σ_c W_cF̃D_c⁻¹δ_c [S, B, R], float64; precision is diag D⁻¹."""
    W64 = W.double()
    if _keeps_products(W, precision):
        _, _, gram, *_ = _factorised(x[:0], loc, F, W64, precision, True)
        C = gram + torch.eye(W.shape[2], dtype=torch.float64, device=F.device)
    else:
        C, *_ = linear_blocks.factorised(F, W, precision, True, common.products(F, precision))
    w = _projected(x, loc, F, W64, None if m is None else m.double(), precision, inverted=True)
    return C, w.transpose(0, 1).contiguous()


def linear_mahalanobis_and_logdet(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor):
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, W_cG_c, F̃z_c, the residual and
    `wide`, as `aten_linear`'s; W_cG_c and F̃z_c are empty where `keeps_products` says no.
    """
    (S, B, channels, _), R, W64, m64 = x.shape, W.shape[2], W.double(), None if m is None else m.double()
    WG = None
    if _keeps_products(W, d):
        WG, wF, _, C_inv, logdet, wide = _factorised(x, loc, F, W64, d, False)
        if S and not wF.shape[1]:
            wF, _ = residual_sums(x, loc, F, d, None, None)
        w = linear_forms.projection(wF, WG, W64, m64)
    else:
        kind = common.products(F, x, d, *([] if loc is None else [loc]))
        _, C_inv, logdet, wide = linear_blocks.factorised(F, W, d, False, kind)
        w = _projected(x, loc, F, W64, m64, d, inverted=False)
    residual = x.new_empty(x.shape, dtype=product_dtype(x, F, W, d))
    v = w @ C_inv
    u = linear_forms.coefficients(v, W64)
    zF, q = residual_sums(x, loc, F, d, u if m64 is None else u + m64, residual)
    g = linear_forms.projection(zF, None, W64, None) - v
    step = g @ C_inv
    q = q + (v.square() - g * step).sum(-1)
    if WG is None:
        WG, zF = W64.new_empty(B, channels, R, 0), W64.new_empty(B, S, channels, 0)
    else:
        zF = linear_forms.of_scores(zF, WG, step)
    return q.mT, logdet, C_inv, (v + step).transpose(0, 1), step.transpose(0, 1), WG, zF, residual, wide


def linear_mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    WG: Tensor,
    zF: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M], grad_F, grad_W, grad_m (empty without m) and grad_d; `needs` is for x, F and d: what is not
    needed is empty. grad_loc is −grad_x."""
    (_, B, C, M), R, W64 = x.shape, W.shape[2], W.double()
    need_x, need_F, need_d = needs
    scalar_d, kind = one_value(d), common.products(F, residual, d)
    if not _keeps_products(W, d):
        a, b = grad_mahalanobis.double(), grad_logdet.double()
        kept = C_inv.contiguous(), v.contiguous(), step.contiguous(), residual, wide.contiguous()
        return linear_blocks.gradients(a, b, F, W, m, d, *kept, needs, kind)
    a, b = grad_mahalanobis.T.double().contiguous(), grad_logdet.double().contiguous()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = linear_forms.coefficients(v, W64)
    u_step = linear_forms.coefficients(step, W64)
    minus_2au = -2 * a[:, :, None, None] * (u if m is None else u + m.double())
    if scalar_d:
        A = 2 * b[:, None, None, None] / d.double().unsqueeze(-1) * linear_forms.quadratic_sum(C_inv, W64)
    else:
        A = linear_forms.quadratic(C_inv, W64)  # M_c
    splits, columns = linear_backward.splits(F, d)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=residual.dtype)
    grad_F = torch.empty_like(F) if need_F else None
    sums = F.new_empty(B, splits, dtype=torch.float64)
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if need_d else d.new_empty(0)
    small = (
        linear_backward.placed(A, F, matrix=True),
        linear_backward.placed(u_step, F),
        linear_backward.placed(minus_2au, F),
    )
    grads = grad_x if need_x else None, grad_F, sums if scalar_d else grad_d if need_d else None
    if kind != "float64":
        narrow = small[0].float(), small[1].float(), small[2].float()
        linear_backward.gradients(a, b, residual, F, d, narrow, wide, grads, splits, columns, kind, flagged=True)
    flagged = kind != "float64"
    linear_backward.gradients(a, b, residual, F, d, small, wide, grads, splits, columns, "float64", flagged)
    if scalar_d and need_d:
        # Σ π = (N − R + tr C⁻¹)/d.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d.copy_(((b * (C * M - R + trace)) / d[:, 0, 0].double() + sums.sum(1))[:, None, None])
    grad_W = linear_forms.grad_weight(a, b, C_inv, v, WG, zF, shared=W.shape[0] == 1)
    grad_m = F.new_empty(0) if m is None else linear_forms.grad_mean(a, zF).to(m.dtype)
    return grad_x, F.new_empty(0) if grad_F is None else grad_F, grad_W.to(W.dtype), grad_m, grad_d


__all__ = [
    "keeps_products",
    "linear_gram",
    "linear_mahalanobis_and_logdet",
    "linear_mahalanobis_and_logdet_backward",
    "linear_rsample",
]
