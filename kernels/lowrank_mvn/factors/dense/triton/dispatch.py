"""Which kernels make the density, its gradients and the normal equations of a dense factor."""

import torch
from torch import Tensor

from ....capacitance import sum_of_pi
from ....device import heaviest, launch, solve
from ....leverage import add_pi, sum_of_few
from . import backward, capacitance, residual
from .backward import Gradients, Samples

# The residual is made again in the backward pass, from the block of P that is at hand there.
KEEPS_RESIDUAL = False


def _factorised(
    P: Tensor,
    d: Tensor,
    kind: str,
    inverted: bool = False,
    vectors: tuple[Tensor, Tensor] | None = None,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """C⁻¹ [B, R, R], v [1, B, R] of `vectors` x and loc [B, N], if given, log|Σ| [B] and `wide` [B].

    `gram` [B, R, R] is filled with PᵀD⁻¹P, if given.
    """
    B, N, R = P.shape
    C_inv = P.new_empty(B, R, R, dtype=torch.float64)
    v = None if vectors is None else P.new_empty(1, B, R, dtype=torch.float64)
    logdet = P.new_empty(B, dtype=torch.float64)
    wide = torch.ones(B, dtype=torch.bool, device=P.device)
    out = (C_inv, v, logdet, wide)
    flags = None
    if kind != "float64":
        parts = capacitance.partial_sums(vectors, P, d, kind, inverted)
        solve.solve(parts, d, N, out, final=False, flagged=False, rounding=launch.ROUNDING[kind])
        flags = wide.view(torch.uint8)
        if gram is not None:
            solve.whole(parts[0], gram, None)
    parts = capacitance.partial_sums(vectors, P, d, "float64", inverted, flags)
    solve.solve(parts, d, N, out, final=True, flagged=flags is not None)
    if gram is not None:
        solve.whole(parts[0], gram, flags)
    return out


def gram(P: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], float64."""
    out = P.new_empty(P.shape[0], P.shape[2], P.shape[2], dtype=torch.float64)
    _factorised(P, precision, launch.products(P, precision), inverted=True, gram=out)
    return out


def normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    return gram(P, precision), residual.partial_sums(x, loc, P, precision, None, inverted=True)[0].sum(2)


def logdet(P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log|Σ| [B], C⁻¹ [B, R, R] (float64) and `wide` [B]."""
    C_inv, _, log_det, wide = _factorised(P, d, launch.products(P, d))
    return log_det, C_inv, wide


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, C_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2b D⁻¹PC⁻¹ and grad_d = bπ, each in its input's shape and dtype; empty where `needs` says no."""
    kind = launch.products(P, d)
    return _gradients(None, grad_logdet, P, d, C_inv, wide, None, None, needs, kind)


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
    v = None
    if C_inv is None or logdet is None or wide is None:
        vectors = (x[0], loc[0]) if S == 1 else None
        C_inv, v, logdet, wide = _factorised(P, d, launch.products(P, x, loc, d), vectors=vectors)
    else:
        C_inv, logdet, wide = (t.clone(memory_format=torch.contiguous_format) for t in (C_inv, logdet, wide))
    if v is None:
        v = P.new_empty(S, B, R, dtype=torch.float64)
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
    need_x, need_loc, *others = needs
    kind, shared = launch.products(P, x, loc, d), loc.shape[0] != x.shape[0]
    chunks = launch.sample_chunks(x.shape[0], *P.shape[1:])
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_loc = loc.new_empty(loc.shape) if need_loc else None
    if need_loc and shared:
        grad_loc = launch.empty_chunks(chunks, loc[0], torch.float64 if kind == "float64" else torch.float32)
    samples = Samples(grad_mahalanobis.double(), x, loc, v.contiguous())
    grad_P, grad_d = _gradients(samples, grad_logdet, P, d, C_inv, wide, grad_x, grad_loc, others, kind, chunks)
    if grad_loc is not None and shared:
        grad_loc = launch.sum_chunks(grad_loc, loc[0])[None]
    empty = x.new_empty(0)
    return empty if grad_x is None else grad_x, empty if grad_loc is None else grad_loc, grad_P, grad_d


def _gradients(
    samples: Samples | None,
    grad_logdet: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor,
    wide: Tensor,
    grad_x: Tensor | None,
    grad_loc: Tensor | None,
    needs: list[bool],
    kind: str,
    chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """grad_P and grad_d; fills grad_x and grad_loc, where there are any."""
    need_P, need_d = needs
    (B, N, R), one_d = P.shape, d.shape[1] == 1
    work = torch.float64 if kind == "float64" else torch.float32
    grad_P = launch.empty_chunks(chunks, P, work) if need_P else None
    grad_d = launch.empty_chunks(chunks, d, work) if need_d else None
    b, C_inv = grad_logdet.double(), C_inv.contiguous()
    listed = heaviest.empty(P, B, R) if need_d and not one_d else None
    grads = Gradients(grad_x, grad_loc, grad_P, grad_d, listed)
    if kind == "float64":
        sums = backward.gradients(samples, b, P, d, C_inv, None, grads, kind, chunks)
    else:
        wide = wide.contiguous()
        sums = backward.gradients(samples, b, P, d, C_inv, wide, grads, kind, chunks)
        sums = sums + backward.gradients(samples, b, P, d, C_inv, wide, grads, "float64", chunks)
    total_P = P.new_empty(0) if grad_P is None else launch.sum_chunks(grad_P, P)
    if grad_d is None:
        return total_P, d.new_empty(0)
    total_d = launch.sum_chunks(grad_d, d)
    if listed is not None:
        items = torch.arange(B, device=P.device).unsqueeze(1)
        add_pi(total_d, listed, d, b, lambda H: P[items, H].double(), lambda *of: _gram_of_flagged(P, *of))
    else:
        total_pi = sum_of_few(P.double(), d[:, 0]) if N <= R else sum_of_pi(d[:, 0], N, C_inv)
        total_d.copy_((b * total_pi + sums).unsqueeze(1))
    return total_P, total_d


def _gram_of_flagged(P: Tensor, precision: Tensor, flags: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R] from products in float64 where a flag [B] is set, elsewhere zeros."""
    gram = P.new_zeros(P.shape[0], P.shape[2], P.shape[2], dtype=torch.float64)
    solve.whole(capacitance.partial_sums(None, P, precision, "float64", inverted=True, flags=flags)[0], gram, flags)
    return gram
