"""The Triton kernels: the same closed forms as `aten`, from two reads of P forward, one read and one write backward.

    common        reading blocks, split products, how work is cut into programs
    capacitance   pass 1: C, w, log|D|
    solve         R×R in float64: log|C|, C⁻¹, v, and which items float32 was not good enough for
    residual      pass 2: the quadratic form as a sum of squares, and the correction of v
    backward      every gradient in one pass
    sampling      samples, with their noise drawn in the kernel and drawn again in the backward
    linear        the same of a factor that is a linear map of features, with kernels of its own

Nothing waits for the host: items that need float64 are found and made again on the device, by kernels that leave the
others at once, so that a step can be captured in a CUDA graph. The functions have the signatures of `aten`.
"""

import torch
from torch import Tensor

from . import backward, capacitance, common, residual, solve
from .sampling import rsample, rsample_backward

__all__ = [
    "gram",
    "mahalanobis_and_logdet",
    "mahalanobis_and_logdet_backward",
    "rsample",
    "rsample_backward",
]

# The residual is made again in the backward pass, from the block of P that is at hand there.
KEEPS_RESIDUAL = False


def _factorised(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, inverted: bool, C: Tensor | None):
    """C⁻¹ [B, R, R], v [S, B, R] (filled if S = 1), log|Σ| [B] and `wide` [B]; C [B, R, R] is filled if given."""
    S, (B, N, R) = x.shape[0], P.shape
    kind = common.products(P, x, loc, d)
    first = kind != "float64"
    C_inv = P.new_empty(B, R, R, dtype=torch.float64)
    v = P.new_empty(S, B, R, dtype=torch.float64)
    logdet = P.new_empty(B, dtype=torch.float64)
    wide = torch.ones(B, dtype=torch.bool, device=P.device)
    out = (C_inv, v, logdet, wide)
    if first:
        parts = capacitance.partial_sums(x, loc, P, d, inverted, kind)
        solve.solve(parts, d, N, out, with_w=S == 1, final=False, flagged=False, rounding=common.ROUNDING[kind])
        if C is not None:
            solve.whole(parts[0], C, None)
    parts = capacitance.partial_sums(x, loc, P, d, inverted, "float64", wide.view(torch.uint8) if first else None)
    solve.solve(parts, d, N, out, with_w=S == 1, final=True, flagged=first)
    if C is not None:
        solve.whole(parts[0], C, wide.view(torch.uint8) if first else None)
    return out


def gram(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """C = I + Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    C = P.new_empty(P.shape[0], P.shape[2], P.shape[2], dtype=torch.float64)
    _factorised(x[:0], loc, P, precision, True, C)
    return C, residual.partial_sums(x, loc, P, precision, None, inverted=True)[0].sum(2)


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q = δᵀΣ⁻¹δ [S, B], log|Σ| [B], C⁻¹ [B, R, R], v [S, B, R] (all float64), two empty tensors and `wide` [B].

    As `aten`'s, but that v is the last one and r is made again in the backward pass.
    """
    S, (B, _, R) = x.shape[0], P.shape
    q = P.new_empty(S, B, dtype=torch.float64)
    if C_inv is None or logdet is None or wide is None:
        C_inv, v, logdet, wide = _factorised(x, loc, P, d, False, None)
        projected = S == 1
    else:
        C_inv, logdet, wide = (t.clone(memory_format=torch.contiguous_format) for t in (C_inv, logdet, wide))
        v, projected = P.new_empty(S, B, R, dtype=torch.float64), False
    if not projected:
        solve.refine(*residual.partial_sums(x, loc, P, d, None), C_inv, v, q, first=True)
    solve.refine(*residual.partial_sums(x, loc, P, d, v), C_inv, v, q, first=False)
    return q, logdet, C_inv, v, v.new_empty(S, B, 0), v.new_empty(S, B, 0), wide


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
    need_x, need_loc, need_P, need_d = needs
    contiguous = torch.contiguous_format
    grad_x = torch.empty_like(x, memory_format=contiguous) if need_x else None
    S, (_, N, R) = x.shape[0], P.shape
    scalar_d, shared_loc = d.shape[1] == 1, loc.shape[0] != S
    kind = common.products(P, x, loc, d)
    chunks = common.sample_chunks(S, N, R)
    work = torch.float64 if kind == "float64" else torch.float32
    grad_P = common.empty_chunks(chunks, P, work) if need_P else None
    grad_d = common.empty_chunks(chunks, d, work) if need_d else None
    grad_loc = torch.empty_like(loc, memory_format=contiguous) if need_loc else None
    if need_loc and shared_loc:
        grad_loc = common.empty_chunks(chunks, loc[0], work)
    a, b = grad_mahalanobis.double(), grad_logdet.double()
    C_inv, v, wide = C_inv.contiguous(), v.contiguous(), wide.contiguous()
    given = (a, b, x, loc, P, d, C_inv, v, wide, (grad_x, grad_loc, grad_P, grad_d), chunks)
    sums = backward.gradients(*given, kind, flagged=kind != "float64")
    if kind != "float64":
        sums = sums + backward.gradients(*given, "float64", flagged=True)
    grad_P = None if grad_P is None else common.sum_chunks(grad_P, P)
    grad_d = None if grad_d is None else common.sum_chunks(grad_d, d)
    if grad_loc is not None and shared_loc:
        grad_loc = common.sum_chunks(grad_loc, loc[0])[None]
    if grad_d is not None and scalar_d:
        # Σₙ πₙ = (N − R + tr C⁻¹)/d, because PᵀD⁻¹P = C − I.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d.copy_((b * (N - R + trace)).unsqueeze(1) / d.double() + sums.unsqueeze(1))
    empty = x.new_empty(0)
    grad_x, grad_loc = (empty if g is None else g for g in (grad_x, grad_loc))
    return grad_x, grad_loc, P.new_empty(0) if grad_P is None else grad_P, d.new_empty(0) if grad_d is None else grad_d
