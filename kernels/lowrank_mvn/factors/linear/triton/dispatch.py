"""Which kernels make the density, its gradients and the normal equations of a linear factor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ....capacitance import applied, inverse, last_step, product_dtype, sum_of_pi
from ....device import heaviest, launch, solve
from .. import aten as closed_form
from .. import forms
from ..aten import densely
from ..forms import one_d
from . import backward, blocks, moments, residual
from .backward import Gradients, Samples
from .heaviest import add_pi


def keeps_products(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether W_cG_c and F̃z_c are outputs of the forward pass: where blocks of P are made, they are not."""
    return not blocks.chosen(channels, R, K1, per_pixel)


def _by_blocks(W: Tensor, d: Tensor) -> bool:
    channels, R, K1 = W.shape[1:]
    return blocks.chosen(channels, R, K1, not one_d(d))


def _products(*tensors: Tensor | None) -> str:
    return launch.products(*(t for t in tensors if t is not None))


class Factorised(NamedTuple):
    """C and what goes with it, in float64."""

    WG: Tensor  # W_cG_c [B, channels, R, K+1]
    wF: Tensor  # F̃D⁻¹(x − loc) [B, S, channels, K+1]; S = 0 if it does not ride along
    gram: Tensor  # PᵀD⁻¹P [B, R, R]
    L_inv: Tensor  # [B, R, R]
    logdet: Tensor  # log|Σ| [B]
    wide: Tensor  # [B]


def _factorised(
    F: Tensor, W: Tensor, d: Tensor, x: Tensor | None = None, loc: Tensor | None = None, inverted: bool = False
) -> Factorised:
    """From the moments of F; W [1 or B, channels, R, K+1] is in float64."""
    (B, _, pixels), (channels, R) = F.shape, W.shape[1:3]
    kind = _products(F, d, x, loc)
    L_inv, logdet = F.new_empty(B, R, R, dtype=torch.float64), F.new_empty(B, dtype=torch.float64)
    wide = torch.empty(B, dtype=torch.bool, device=F.device)
    flat, N = d.flatten(1), channels * pixels

    def parts(gram: Tensor, log_D: Tensor | None) -> tuple[Tensor, None, Tensor | None]:
        return gram.unsqueeze(1), None, None if log_D is None else log_D[:, None]

    G, wF, log_D = moments.sums(x, loc, F, d, channels, kind, inverted)
    WG = torch.matmul(W, G)
    gram = forms.gram(WG, W)
    # C is as exact as G: of `solve` only failed pivots are asked, not the bound on rounding in products of P.
    out, rounding = (L_inv, None, logdet, wide), launch.ROUNDING[kind]
    solve.solve(parts(gram, log_D), flat, N, out, rounding, math.inf)
    if kind != "float64":
        wide |= forms.rough(G.diagonal(dim1=-2, dim2=-1), W, L_inv, launch.ROUNDING[kind], tiles=False)
        made = moments.sums(x, loc, F, d, channels, "float64", inverted, wide.view(torch.uint8))
        G = torch.where(wide[:, None, None, None], made[0], G)
        wF = torch.where(wide[:, None, None, None], made[1], wF)
        if log_D is not None and made[2] is not None:
            log_D = torch.where(wide, made[2], log_D)
        WG = torch.matmul(W, G)
        gram = forms.gram(WG, W)
    # For what is not finite in float64 too.
    solve.solve(parts(gram, log_D), flat, N, out, launch.ROUNDING["float64"], math.inf, wide.view(torch.uint8))
    return Factorised(WG, wF, gram, L_inv, logdet, torch.ones_like(wide) if kind == "float64" else wide)


def _projected(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor, inverted: bool = False
) -> Tensor:
    """w = PᵀD⁻¹δ [B, S, R] from a pass of its own; W and m in float64."""
    u = None if m is None else m.expand(F.shape[0], x.shape[0], -1, -1)
    return forms.projection(residual.sums(x, loc, F, d, u, None, inverted)[0], None, W, None)


def gram(F: Tensor, W: Tensor, precision: Tensor) -> Tensor:
    """Σ_c W_cF̃D_c⁻¹F̃ᵀW_cᵀ [B, R, R], float64; precision is diag D⁻¹."""
    if not _by_blocks(W, precision):
        return _factorised(F, W.double(), precision, inverted=True).gram
    out = F.new_empty(F.shape[0], W.shape[2], W.shape[2], dtype=torch.float64)
    blocks.factorised(F, W, precision, _products(F, precision), inverted=True, gram=out)
    return out


def normal_equations(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_c W_cF̃D_c⁻¹F̃ᵀW_cᵀ [B, R, R] and w = Σ_c W_cF̃D_c⁻¹δ_c [S, B, R], float64; precision is diag D⁻¹."""
    w = _projected(x, loc, F, W.double(), None if m is None else m.double(), precision, inverted=True)
    return gram(F, W, precision), w.transpose(0, 1).contiguous()


def logdet(F: Tensor, W: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|Σ| [B], L⁻¹ [B, R, R], W_cG_c (empty where `keeps_products` says no), all float64, and `wide` [B]."""
    if _few(F, W):
        log_det, L_inv, WG, wide = closed_form.logdet(F, W, d)
        return log_det, L_inv, WG[..., : 0 if _by_blocks(W, d) else None].contiguous(), wide
    if _by_blocks(W, d):
        L_inv, log_det, wide = blocks.factorised(F, W, d, _products(F, d))
        return log_det, L_inv, L_inv.new_empty(*L_inv.shape[:1], *W.shape[1:3], 0), wide
    found = _factorised(F, W.double(), d)
    return found.logdet, found.L_inv, found.WG, found.wide


def logdet_backward(
    grad_logdet: Tensor, F: Tensor, W: Tensor, d: Tensor, L_inv: Tensor, WG: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_F = Σ_c 2b M_cF̃D_c⁻¹, grad_W and grad_d = bπ; `needs` is for F and d: what is not needed is empty."""
    b, kind, wide = grad_logdet.double().contiguous(), _products(F, d), wide.contiguous()
    if _few(F, W):
        v, x = b.new_empty(len(F), 0, W.shape[2]), F.new_empty(0, len(F), W.shape[1], F.shape[2])
        given = densely.Given(x, None, F, W.double(), None, d, L_inv, v, v, x, wide)
        _, grad_F, grad_W, _, grad_d = _densely(v[..., 0], b, given, W, [False, *needs])
        return grad_F, grad_W, grad_d
    if _by_blocks(W, d):
        wanted = [False, *needs]
        _, grad_F, grad_W, _, grad_d = blocks.gradients(None, b, F, W, d, L_inv.contiguous(), wide, wanted, kind)
        return grad_F, grad_W, grad_d
    grad_F, grad_d = _gradients(None, b, F, W.double(), d, L_inv, wide, None, needs, kind)
    grad_W = forms.weighted(2 * b[:, None, None] * inverse(L_inv), WG)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W
    return grad_F, grad_W.to(W.dtype), grad_d


def mahalanobis_and_logdet(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor
) -> tuple[Tensor, ...]:
    """q [S, B], log|Σ| [B], and for the backward pass L⁻¹, v [S, B, R], its last step, W_cG_c, F̃z_c, the residual and
    `wide`, as `aten`'s; W_cG_c and F̃z_c are empty where `keeps_products` says no.
    """
    (S, B, channels, _), R, W64, m64 = x.shape, W.shape[2], W.double(), None if m is None else m.double()
    WG = None
    if _few(F, W):
        *first, WG, zF, r, wide = closed_form.mahalanobis_and_logdet(x, loc, F, W, m, d)
        kept = 0 if _by_blocks(W, d) else None
        return *first, WG[..., :kept], zF[..., :kept], r, wide
    if _by_blocks(W, d):
        L_inv, log_det, wide = blocks.factorised(F, W, d, _products(F, x, d, loc))
        w = _projected(x, loc, F, W64, m64, d)
    else:
        WG, wF, _, L_inv, log_det, wide = _factorised(F, W64, d, x, loc)
        if S and not wF.shape[1]:
            wF, _ = residual.sums(x, loc, F, d, None, None)
        w = forms.projection(wF, WG, W64, m64)
    r = x.new_empty(x.shape, dtype=product_dtype(x, F, W, d))
    v = applied(L_inv, w)
    u = forms.coefficients(v, W64)
    zF, q = residual.sums(x, loc, F, d, u if m64 is None else u + m64, r)
    q, v, step = last_step(q + v.square().sum(-1), forms.projection(zF, None, W64, None) - v, v, L_inv)
    if WG is None:
        WG, zF = W64.new_empty(B, channels, R, 0), W64.new_empty(B, S, channels, 0)
    else:
        zF = forms.of_scores(zF, WG, step)
    return q.mT, log_det, L_inv, v.transpose(0, 1), step.transpose(0, 1), WG, zF, r, wide


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    L_inv: Tensor,
    v: Tensor,
    step: Tensor,
    WG: Tensor,
    zF: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, channels, pixels], grad_F, grad_W, grad_m (empty without m) and grad_d; `needs` is for x, F and d:
    what is not needed is empty. grad_loc is −grad_x."""
    a, b, kind = grad_mahalanobis.double(), grad_logdet.double().contiguous(), _products(F, residual, d)
    wide, none = wide.contiguous(), F.new_empty(0)
    if _few(F, W):
        of_v = v.transpose(0, 1), step.transpose(0, 1)
        given = densely.Given(x, loc, F, W.double(), m, d, L_inv, *of_v, residual, wide)
        return _densely(a.T, b, given, W, needs)
    if _by_blocks(W, d):
        kept = blocks.Kept(a, v.contiguous(), step.contiguous(), residual, m)
        made = blocks.gradients(kept, b, F, W, d, L_inv.contiguous(), wide, needs, kind)
        grad_x, grad_F, grad_W, grad_m, grad_d = made
        return none if grad_x is None else grad_x, grad_F, grad_W, none if grad_m is None else grad_m, grad_d
    need_x, *others = needs
    W64, a = W.double(), a.T.contiguous()  # [B, S]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = forms.coefficients(v, W64)
    minus_2au = -2 * a[:, :, None, None] * (u if m is None else u + m.double())
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=residual.dtype)
    samples = Samples(a, residual, forms.coefficients(step, W64), minus_2au)
    grad_F, grad_d = _gradients(samples, b, F, W64, d, L_inv, wide, grad_x if need_x else None, others, kind)
    grad_W = forms.grad_weight(a, b, L_inv, v, WG, zF, shared=W.shape[0] == 1)
    grad_m = none if m is None else forms.grad_mean(a, zF).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d


def _few(F: Tensor, W: Tensor) -> bool:
    """Whether so few pixels that each of them may be one that P explains almost alone."""
    return W.shape[1] * F.shape[2] <= 2 * W.shape[2]


def _densely(
    grad_q: Tensor, grad_logdet: Tensor, given: densely.Given, W: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients by way of P; `needs` is for x, F and d."""
    (need_x, need_F, need_d), F = needs, given.F
    made, none = densely.gradients(grad_q, grad_logdet, given, need_x, need_d), F.new_empty(0)
    grad_W = made.W.sum(0, keepdim=True) if W.shape[0] == 1 else made.W
    return (
        none.to(given.residual.dtype) if made.x is None else made.x.to(given.residual.dtype),
        made.F.to(F.dtype) if need_F else none,
        grad_W.to(W.dtype),
        none if made.m is None or given.m is None else made.m.to(given.m.dtype),
        given.d.new_empty(0) if made.d is None else made.d.to(given.d.dtype),
    )


def _gradients(
    samples: Samples | None,
    b: Tensor,
    F: Tensor,
    W: Tensor,
    d: Tensor,
    L_inv: Tensor,
    wide: Tensor,
    grad_x: Tensor | None,
    needs: list[bool],
    kind: str,
) -> tuple[Tensor, Tensor]:
    """grad_F and grad_d; fills grad_x, if there is one. W is in float64."""
    (need_F, need_d), channels, one = needs, W.shape[1], one_d(d)
    if one:
        A = 2 * b[:, None, None, None] / d.double().unsqueeze(-1) * forms.quadratic_sum(L_inv, W)
    else:
        A = forms.quadratic(L_inv, W)  # M_c
    grad_F = torch.empty_like(F) if need_F else None
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if need_d else None
    listed = heaviest.empty(F, len(F), W.shape[2]) if need_d and not one else None
    sums = backward.gradients(samples, b, F, d, A, channels, wide, Gradients(grad_x, grad_F, grad_d, listed), kind)
    if grad_d is not None and listed is not None:
        add_pi(grad_d, listed, F, W, d, L_inv, b)
    elif grad_d is not None:
        grad_d.copy_((b * sum_of_pi(d[:, 0, 0], channels * F.shape[2], L_inv) + sums)[:, None, None])
    return F.new_empty(0) if grad_F is None else grad_F, d.new_empty(0) if grad_d is None else grad_d
