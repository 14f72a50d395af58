"""Which kernels make the density, its gradients and the normal equations of a dense factor."""

import torch
from torch import Tensor

from ....capacitance import inverse, sum_of_pi
from ....device import again, heaviest, launch, solve
from ....leverage import Gradients as Mended
from ....leverage import Listed
from ..aten import backward as closed_form
from . import backward, capacitance, residual
from .backward import Gradients, Samples


def _factorised(
    P: Tensor, d: Tensor, kind: str, vectors: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """L⁻¹ [B, R, R], v [1, B, R] of `vectors` x and loc [B, N], if given, log|Σ| [B] and `wide` [B]."""
    B, N, R = P.shape
    L_inv = P.new_empty(B, R, R, dtype=torch.float64)
    v = None if vectors is None else P.new_empty(1, B, R, dtype=torch.float64)
    logdet = P.new_empty(B, dtype=torch.float64)
    flags = torch.empty(B, dtype=torch.bool, device=P.device)
    parts = capacitance.partial_sums(vectors, P, d, kind)
    solve.solve(parts, d, N, (L_inv, v, logdet, flags), launch.ROUNDING[kind], launch.tolerance(kind, R))
    bits = flags.view(torch.uint8)
    parts = capacitance.partial_sums(vectors, P, d, "float64", flags=bits, mix=L_inv)
    again.again(parts, d, N, (L_inv, v, logdet), bits)
    return L_inv, v, logdet, torch.ones_like(flags) if kind == "float64" else flags


def gram(P: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], float64."""
    (B, N, R), kind = P.shape, launch.products(P, precision)
    out = P.new_empty(B, R, R, dtype=torch.float64)
    parts = capacitance.partial_sums(None, P, precision, kind, inverted=True)
    solve.whole(parts[0], out, None)
    if kind != "float64":
        wide = torch.empty(B, dtype=torch.bool, device=P.device)
        made = torch.empty_like(out), None, P.new_empty(B, dtype=torch.float64), wide
        solve.solve(parts, precision, N, made, launch.ROUNDING[kind], launch.tolerance(kind, R))
        flags = wide.view(torch.uint8)
        parts = capacitance.partial_sums(None, P, precision, "float64", inverted=True, flags=flags)
        solve.whole(parts[0], out, flags)
    return out


def normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    return gram(P, precision), residual.partial_sums(x, loc, P, precision, None, inverted=True)[0].sum(2)


def logdet(P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log|Σ| [B], L⁻¹ [B, R, R] (float64) and `wide` [B]."""
    L_inv, _, log_det, wide = _factorised(P, d, launch.products(P, d))
    return log_det, L_inv, wide


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, L_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2b D⁻¹PC⁻¹ and grad_d = bπ, each in its input's shape and dtype; empty where `needs` says no."""
    if _few(P):
        return closed_form.logdet_backward(grad_logdet, P, d, L_inv, wide, needs)
    grad_P, grad_d, top = _gradients(None, grad_logdet, P, d, L_inv, wide, None, None, needs, launch.products(P, d))
    if top is not None:
        none = P.new_empty(0, *P.shape[::2], dtype=torch.float64)
        top.mend(_mended(None, None, grad_P, grad_d, needs), none[..., 0].T, grad_logdet.double(), none, none, none)
    return grad_P, grad_d


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q = δᵀΣ⁻¹δ [S, B], log|Σ| [B], L⁻¹ [B, R, R], v and its last step [S, B, R] (all float64), r [S, B, N] and `wide`
    [B], as `aten`'s."""
    S, (B, N, R), kind = x.shape[0], P.shape, launch.products(P, x, loc, d)
    q = P.new_empty(S, B, dtype=torch.float64)
    v = None
    if L_inv is None or logdet is None or wide is None:
        L_inv, v, logdet, wide = _factorised(P, d, kind, (x[0], loc[0]) if S == 1 else None)
    else:
        L_inv, logdet, wide = (t.clone(memory_format=torch.contiguous_format) for t in (L_inv, logdet, wide))
    step = P.new_empty(S, B, R, dtype=torch.float64)
    if v is None:
        v = torch.empty_like(step)
        solve.refine(*residual.partial_sums(x, loc, P, d, None), L_inv, v, None, q, first=True)
    r = P.new_empty(S, B, N, dtype=torch.float64 if kind == "float64" else torch.float32)
    solve.refine(*residual.partial_sums(x, loc, P, d, v, r), L_inv, v, step, q, first=False)
    return q, logdet, L_inv, v, step, r, wide


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor,
    v: Tensor,
    step: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_loc, grad_P, grad_d, each in its input's shape and dtype; empty where `needs` says no."""
    if _few(P):
        given = x, loc, P, d, L_inv, v, step, residual, wide
        return closed_form.mahalanobis_and_logdet_backward(grad_mahalanobis, grad_logdet, *given, needs)
    need_x, need_loc, *others = needs
    kind, shared = launch.products(P, x, loc, d), loc.shape[0] != x.shape[0]
    chunks = launch.sample_chunks(x.shape[0], *P.shape[1:])
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_loc = loc.new_empty(loc.shape) if need_loc else None
    if need_loc and shared:
        grad_loc = launch.empty_chunks(chunks, loc[0], torch.float64 if kind == "float64" else torch.float32)
    samples = Samples(grad_mahalanobis.double(), residual, v.contiguous(), step.contiguous(), shared)
    made = _gradients(samples, grad_logdet, P, d, L_inv, wide, grad_x, grad_loc, others, kind, chunks)
    grad_P, grad_d, top = made
    if grad_loc is not None and shared:
        grad_loc = launch.sum_chunks(grad_loc, loc[0])[None]
    if top is not None:
        of_q = residual, samples.step, samples.v
        top.mend(_mended(grad_x, grad_loc, grad_P, grad_d, others), samples.a.T, grad_logdet.double(), *of_q)
    empty = x.new_empty(0)
    return empty if grad_x is None else grad_x, empty if grad_loc is None else grad_loc, grad_P, grad_d


def _few(P: Tensor) -> bool:
    """Whether so few pixels that each of them may be one that P explains almost alone."""
    return P.shape[1] <= 2 * P.shape[2]


def _mended(
    grad_x: Tensor | None, grad_loc: Tensor | None, grad_P: Tensor, grad_d: Tensor, needs: list[bool]
) -> Mended:
    """What is made again at the pixels of a list."""
    need_P, need_d = needs
    per_pixel = need_d and grad_d.shape[1] > 1
    return Mended(grad_d if per_pixel else None, grad_x, grad_loc, grad_P if need_P else None)


def _gradients(
    samples: Samples | None,
    grad_logdet: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor,
    wide: Tensor,
    grad_x: Tensor | None,
    grad_loc: Tensor | None,
    needs: list[bool],
    kind: str,
    chunks: int = 1,
) -> tuple[Tensor, Tensor, Listed | None]:
    """grad_P and grad_d, and in float64 the pixels where they are to be mended; fills grad_x and grad_loc, where there
    are any."""
    need_P, need_d = needs
    (B, N, R), one_d, exactly = P.shape, d.shape[1] == 1, kind == "float64"
    work = torch.float64 if exactly else torch.float32
    grad_P = launch.empty_chunks(chunks, P, work) if need_P else None
    grad_d = launch.empty_chunks(chunks, d, work) if need_d else None
    b, L_inv = grad_logdet.double(), L_inv.contiguous()
    listed = heaviest.empty(P, B, R) if (need_d and not one_d) or (need_P and exactly) else None
    grads = Gradients(grad_x, grad_loc, grad_P, grad_d, listed)
    inverses = inverse(L_inv), L_inv
    if exactly:
        sums = backward.gradients(samples, b, P, d, inverses, None, grads, kind, chunks)
    else:
        wide = wide.contiguous()
        sums = backward.gradients(samples, b, P, d, inverses, wide, grads, kind, chunks)
        sums = sums + backward.gradients(samples, b, P, d, inverses, wide, grads, "float64", chunks)
    total_P = P.new_empty(0) if grad_P is None else launch.sum_chunks(grad_P, P)
    total_d = d.new_empty(0) if grad_d is None else launch.sum_chunks(grad_d, d)
    if need_d and one_d:
        total_d.copy_((b * sum_of_pi(d[:, 0], N, L_inv) + sums).unsqueeze(1))
    if listed is None:
        return total_P, total_d, None
    items = torch.arange(B, device=P.device).unsqueeze(1)
    of = d.expand(B, N), L_inv, lambda H: P[items, H].double(), lambda *of: _gram_of_flagged(P, *of)
    top = Listed(listed, *of, exactly)
    if not exactly:
        top.add_pi(total_d, b)
    return total_P, total_d, top if exactly else None


def _gram_of_flagged(P: Tensor, precision: Tensor, flags: Tensor, mix: Tensor | None) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R] from products in float64 where a flag [B] is set, elsewhere zeros; of rows mix·pₙ
    where there is `mix`."""
    gram = P.new_zeros(P.shape[0], P.shape[2], P.shape[2], dtype=torch.float64)
    mix = None if mix is None else mix.contiguous()
    parts = capacitance.partial_sums(None, P, precision, "float64", inverted=True, flags=flags, mix=mix)
    solve.whole(parts[0], gram, flags)
    return gram
