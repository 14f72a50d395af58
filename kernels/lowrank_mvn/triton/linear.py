r"""The Triton implementation of a linear factor: the functions of `aten_linear`, from three reads of F and one write.

    linear_common     sums over columns in either layout, and how work is cut
    linear_gram       pass 1: G, F̃D⁻¹(x − loc), log|D|
    linear_residual   pass 2: the residual, the quadratic form as a sum of squares, and F̃D⁻¹r
    linear_backward   every gradient in one pass; `linear_tile` has its parts
    linear_sampling   samples

What is of the size of G or smaller is made in float64 between the passes; C is factorised by `solve`. As for a full
factor nothing waits for the host: items that need float64 are found and made again on the device.
"""

import torch
from torch import Tensor

from ..aten import LOG_DET_TOLERANCE
from ..aten_linear import product_dtype
from . import common, linear_backward, solve
from .linear_common import one_value
from .linear_gram import sums as gram_sums
from .linear_residual import sums as residual_sums
from .linear_sampling import linear_rsample


def _per_item(W: Tensor, B: int) -> Tensor:
    """W [B, C, R, K+1] in float64, of [C, R, K+1] or [1 or B, C, R, K+1]."""
    W = W.unsqueeze(0) if W.dim() == 3 else W
    return W.double().expand(B, -1, -1, -1)


def _assemble(G: Tensor, W: Tensor) -> Tensor:
    """C − I = Σ_c W_c G_c W_cᵀ [B, R, R]."""
    WG = torch.matmul(W, G)  # [B, C, R, K+1]
    return torch.bmm(WG.transpose(1, 2).flatten(2), W.transpose(1, 2).flatten(2).mT).contiguous()


def _factorised(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, d: Tensor, inverted: bool):
    """G, F̃D⁻¹(x − loc) (S = 0 if it does not ride along), C − I, C⁻¹ [B, R, R], log|Σ| [B] and `wide` [B].

    W is [B, C, R, K+1]. `wide` as in `aten_linear`: |ΔGₖₗ| ≤ ε√(GₖₖGₗₗ) moves C by at most ε aᵣaₛ with
    aᵣ² = Σ_c (Σₖ |W_crk|√Gₖₖ)², which takes the place of C_rr.
    """
    (_, B, C, M), R = x.shape, W.shape[2]
    kind = common.products(F, x, d, *([] if loc is None else [loc]))
    first = kind != "float64"
    C_inv, v, logdet = (F.new_empty(shape, dtype=torch.float64) for shape in ((B, R, R), (1, B, R), (B,)))
    wide = torch.ones(B, dtype=torch.bool, device=F.device)
    flat = d.flatten(1)

    def solved(G: Tensor, log_D: Tensor | None, final: bool, flagged: bool) -> Tensor:
        whole = _assemble(G, W)
        parts = whole.unsqueeze(1), v, logdet[:, None] if log_D is None else log_D[:, None]
        solve.solve(parts, flat, C * M, (C_inv, v, logdet, wide), with_w=False, final=final, flagged=flagged)
        return whole

    G, wF, log_D = gram_sums(x, loc, F, d, inverted, kind)
    whole = solved(G, log_D, final=not first, flagged=False)
    if first:
        a = torch.einsum("bcrk,bck->bcr", W.abs(), G.diagonal(dim1=-2, dim2=-1).sqrt().expand(-1, C, -1))
        spread = (a.square().sum(1) * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square()
        wide |= ~(torch.finfo(torch.float32).eps * spread <= LOG_DET_TOLERANCE)
        G_wide, wF_wide, log_D_wide = gram_sums(x, loc, F, d, inverted, "float64", wide.view(torch.uint8))
        G = torch.where(wide[:, None, None, None], G_wide, G)
        wF = torch.where(wide[:, None, None, None], wF_wide, wF)
        if log_D is not None and log_D_wide is not None:
            log_D = torch.where(wide, log_D_wide, log_D)
        whole = solved(G, log_D, final=True, flagged=True)
    return G, wF, whole, C_inv, logdet, wide


def linear_gram(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """C = I + Σ_c W_cF̃D_c⁻¹F̃ᵀW_cᵀ [B, R, R] and w = Σ_c W_cF̃D_c⁻¹δ_c [S, B, R], float64; precision is diag D⁻¹."""
    W64 = _per_item(W, F.shape[0])
    whole = _factorised(x[:0], loc, F, W64, precision, True)[2]
    u = None if m is None else m.double().expand(F.shape[0], x.shape[0], -1, -1)
    zF, _ = residual_sums(x, loc, F, precision, u, None, inverted=True)
    identity = torch.eye(W64.shape[2], dtype=torch.float64, device=F.device)
    return whole + identity, torch.einsum("bsck,bcrk->sbr", zF, W64)


def linear_mahalanobis_and_logdet(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor):
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, G, the residual and `wide`.

    As `aten_linear`'s.
    """
    S, W64 = x.shape[0], _per_item(W, F.shape[0])
    G, wF, _, C_inv, logdet, wide = _factorised(x, loc, F, W64, d, False)
    residual = x.new_empty(x.shape, dtype=product_dtype(x, F, d))
    if S and not wF.shape[1]:
        wF, _ = residual_sums(x, loc, F, d, None, None)
    if m is not None:
        wF = wF - torch.matmul(G, m.double().unsqueeze(-1))[..., 0].unsqueeze(1)  # G_c m_c, G for all c or each
    v = torch.einsum("bsck,bcrk->bsr", wF, W64) @ C_inv
    u = torch.einsum("bsr,bcrk->bsck", v, W64)
    zF, q = residual_sums(x, loc, F, d, u if m is None else u + m.double(), residual)
    g = torch.einsum("bsck,bcrk->bsr", zF, W64) - v
    step = g @ C_inv
    q = q + (v.square() - g * step).sum(-1)
    return q.mT, logdet, C_inv, (v + step).transpose(0, 1), step.transpose(0, 1), G, residual, wide


def linear_mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    residual: Tensor,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    G: Tensor,
    wide: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M] (empty if not needed), grad_F, grad_W, grad_m (empty without m) and grad_d."""
    (S, B, C, M), W64 = residual.shape, _per_item(W, F.shape[0])
    R, K = W64.shape[2], F.shape[1]
    scalar_d, kind = one_value(d), common.products(F, residual, d)
    a, b = grad_mahalanobis.T.double().contiguous(), grad_logdet.double().contiguous()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = torch.einsum("bsr,bcrk->bsck", v, W64)
    u_step = torch.einsum("bsr,bcrk->bsck", step, W64)
    minus_2au = -2 * a[:, :, None, None] * (u if m is None else u + m.double())
    C_inv_W = torch.matmul(C_inv.unsqueeze(1), W64)  # [B, C, R, K+1]
    A = torch.matmul(W64.mT, C_inv_W)  # M_c
    if scalar_d:
        A = 2 * b[:, None, None, None] / d.double().unsqueeze(-1) * A.sum(1, keepdim=True)
    splits, columns = linear_backward.splits(F, d)
    rides = linear_backward.rides(S, C)
    grad_x = torch.empty_like(residual, memory_format=torch.contiguous_format) if need_x else residual.new_empty(0)
    grad_F = torch.empty_like(F)
    sums = F.new_empty(B, splits, dtype=torch.float64)
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format)
    zF = F.new_empty(B, splits, S if rides else 0, C, K + 1, dtype=torch.float64)
    A = torch.nn.functional.pad(A, (0, -(K + 1) % 4))  # rows that can be read four values at a time
    small = A.contiguous(), u_step.contiguous(), minus_2au.contiguous()
    grads = grad_x if need_x else None, grad_F, sums if scalar_d else grad_d
    if kind != "float64":
        narrow = small[0].float(), small[1].float(), small[2].float()
        linear_backward.gradients(a, b, residual, F, d, narrow, wide, grads, zF, columns, kind, flagged=True)
    flagged = kind != "float64"
    linear_backward.gradients(a, b, residual, F, d, small, wide, grads, zF, columns, "float64", flagged)
    if rides:
        zF = zF.sum(1)
    else:
        zF, _ = residual_sums(residual, None, F, d, u_step, None)
    if scalar_d:
        # Σ π = (N − R + tr C⁻¹)/d.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d.copy_(((b * (C * M - R + trace)) / d[:, 0, 0].double() + sums.sum(1))[:, None, None])
    grad_W = 2 * b[:, None, None, None] * torch.matmul(C_inv_W, G)
    grad_W = grad_W - torch.einsum("bsr,bsck->bcrk", 2 * a.unsqueeze(-1) * v, zF)
    grad_m = F.new_empty(0) if m is None else torch.einsum("bs,bsck->ck", -2 * a, zF).to(m.dtype)
    if W.dim() == 3 or W.shape[0] != B:
        grad_W = grad_W.sum(0, keepdim=W.dim() == 4)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d


__all__ = [
    "linear_gram",
    "linear_mahalanobis_and_logdet",
    "linear_mahalanobis_and_logdet_backward",
    "linear_rsample",
]
