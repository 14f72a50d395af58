"""The closed forms as compiled C++ for the CPU: what `aten` computes, in its order, with less traffic.

A pass is a C++ file of the name that it has in `aten`:

    dense.h         the calls; how they are cut into units, chunks and blocks: `device/csrc/blocks.h`
    capacitance     read P: C, w, log|D|
    residual        read P: r = δ − Pv in float64, q(v), PᵀD⁻¹r
    forward         these two, with the R×R algebra between them and after
    backward        read P, write grad_P, and every other gradient
    sampling        samples from given noise, and their gradients
    few             all of it for items of few pixels, one in each lane of a vector
    passes          how those without a second step are shared out

Items for which even float64 needs care (rows of P that outweigh others, leverages near one) are made by `aten`.
`aten` says what the functions take and give.
"""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.native import NOTHING, View, function, view, view_of_diagonal
from ....device.pages import empty_gradient
from .. import aten
from ..aten.sampling import NO_NOISE, noise

F64 = torch.float64
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_forward = function("lowrank_dense_forward", 39)
_backward = function("lowrank_dense_backward", 60)
_samples = function("lowrank_dense_samples", 37)
_samples_backward = function("lowrank_dense_samples_backward", 47)


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> Kept:
    """q, log|Σ|, L⁻¹, v and its last step C⁻¹g, r and `wide`, as `aten` has them."""
    (S, B, N), R, dtype = x.shape, P.shape[2], product_dtype(x, loc, P, d)
    new, given = P.new_empty, L_inv is not None and logdet is not None and wide is not None
    if L_inv is None or logdet is None or wide is None:
        L_inv, logdet = new(B, R, R, dtype=F64), new(B, dtype=F64)
        wide = new(B, dtype=torch.bool)
    else:
        L_inv, logdet, wide = L_inv.clone(), logdet.clone(), wide.clone()
    q, v, step = new(S, B, dtype=F64), new(S, B, R, dtype=F64), new(S, B, R, dtype=F64)
    residual, rough = new(S, B, N, dtype=dtype), torch.empty_like(wide)
    found = q, logdet, L_inv, v, step, residual, wide
    sizes, choices = (S, B, N, R, torch.get_num_threads()), (d.shape[1] == 1, False, dtype == F64, given)
    views = *view(x), *view(loc, S), *view(P), *view_of_diagonal(d)
    outputs = (t.data_ptr() for t in (L_inv, logdet, wide, rough, q, v, step, residual))
    if _forward(*sizes, *views, *choices, 0, 0, *outputs):
        for t in _flagged(rough):
            made = aten.mahalanobis_and_logdet(x[:, t], loc[:, t], P[t], d[t])
            for out, part in zip(found, made, strict=True):
                out[t if out.dim() == 1 or out is L_inv else (slice(None), t)] = part
    return found


def logdet(P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log|Σ| [B], L⁻¹ [B, R, R] and `wide` [B]."""
    B, R, new = P.shape[0], P.shape[2], P.new_empty
    logdet, L_inv, wide = new(B, dtype=F64), new(B, R, R, dtype=F64), new(B, dtype=torch.bool)
    rough = _sums(None, P, d, False, product_dtype(P, d), wide, (0, 0, L_inv.data_ptr(), logdet.data_ptr()))
    for t in _flagged(rough):
        logdet[t], L_inv[t], wide[t] = aten.logdet(P[t], d[t])
    return logdet, L_inv, wide


def gram(P: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], from products in float64."""
    found, wide = P.new_empty(P.shape[0], P.shape[2], P.shape[2], dtype=F64), P.new_empty(len(P), dtype=torch.bool)
    _sums(None, P, precision, True, F64, wide, (found.data_ptr(), 0, 0, 0))
    return found


def normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    (S, B, _), R, dtype, new = x.shape, P.shape[2], product_dtype(x, loc, P, precision), P.new_empty
    found, w, L_inv = new(B, R, R, dtype=F64), new(S, B, R, dtype=F64), new(B, R, R, dtype=F64)
    outputs = found.data_ptr(), w.data_ptr(), L_inv.data_ptr(), 0
    _sums((x, loc), P, precision, True, dtype, new(B, dtype=torch.bool), outputs)
    return found, w


def _sums(
    samples: tuple[Tensor, Tensor] | None,
    P: Tensor,
    d: Tensor,
    inverted: bool,
    dtype: torch.dtype,
    wide: Tensor,
    outputs: tuple[int, int, int, int],
) -> Tensor | None:
    """The forward pass without a residual; items that are not good enough, if any.

    `outputs` are the addresses of gram, w, L⁻¹ and log|Σ|.
    """
    B, N, R = P.shape
    S, of_samples = 0, (*NOTHING, *NOTHING)
    if samples:
        S = samples[0].shape[0]
        of_samples = *view(samples[0]), *view(samples[1], S)
    sizes, choices = (S, B, N, R, torch.get_num_threads()), (d.shape[1] == 1, inverted, dtype == F64, False)
    rough = torch.empty_like(wide)
    flags = wide.data_ptr(), rough.data_ptr()
    views = *of_samples, *view(P), *view_of_diagonal(d)
    return rough if _forward(*sizes, *views, *choices, *outputs, *flags, 0, 0, 0, 0) else None


def _flagged(flags: Tensor | None) -> list[slice]:
    """The items that are flagged, one by one: views, of which there are few."""
    return [] if flags is None else [slice(b, b + 1) for b in flags.nonzero().flatten().tolist()]


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
    need_x, need_loc, need_P, need_d = needs
    S, (B, N, R) = x.shape[0], P.shape
    grads = _empty(x, need_x), _empty(loc, need_loc), _gradient(P, need_P), _empty(d, need_d)
    a, b, v, step = (t.to(F64).contiguous() for t in (grad_mahalanobis, grad_logdet, v, step))
    L_inv, wide, doubtful = L_inv.contiguous(), wide.contiguous(), torch.empty(B, dtype=torch.bool)
    sizes = S, B, N, R, torch.get_num_threads()
    views = *view(x), *view(loc, S), *view(P), *view_of_diagonal(d)
    choices = d.shape[1] == 1, product_dtype(x, loc, P, d) == F64, loc.shape[0]
    given = (t.data_ptr() for t in (a, b, L_inv, v, step, wide))
    outputs = (number for grad, need in zip(grads, needs, strict=True) for number in _viewed(grad, need))
    if _backward(*sizes, *views, *choices, *given, *view(residual), *outputs, doubtful.data_ptr()):
        for t in _flagged(doubtful):
            of_q, kept_ = (a[:, t], b[t], x[:, t], loc[:, t]), (v[:, t], step[:, t], residual[:, t], wide[t])
            made = aten.mahalanobis_and_logdet_backward(*of_q, P[t], d[t], L_inv[t], *kept_, needs)
            _replace(grads, made, t)
    return grads


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, L_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2 grad_logdet D⁻¹PC⁻¹ and grad_d = grad_logdet π; empty where `needs` says no."""
    (B, N, R), grads = P.shape, (_gradient(P, needs[0]), _empty(d, needs[1]))
    b, L_inv, wide = grad_logdet.to(F64).contiguous(), L_inv.contiguous(), wide.contiguous()
    doubtful = torch.empty(B, dtype=torch.bool)
    views = *NOTHING, *NOTHING, *view(P), *view_of_diagonal(d)
    choices, given = (d.shape[1] == 1, product_dtype(P, d) == F64, 0), (0, b.data_ptr(), L_inv.data_ptr(), 0, 0)
    outputs = (number for grad, need in zip(grads, needs, strict=True) for number in _viewed(grad, need))
    sizes, no_samples = (0, B, N, R, torch.get_num_threads()), (*NOTHING, *NOTHING, *NOTHING)
    if _backward(*sizes, *views, *choices, *given, wide.data_ptr(), *no_samples, *outputs, doubtful.data_ptr()):
        for t in _flagged(doubtful):
            _replace(grads, aten.logdet_backward(b[t], P[t], d[t], L_inv[t], wide[t], needs), t)
    return grads


def _viewed(grad: Tensor, need: bool) -> View:
    if not need:
        return NOTHING
    return view(grad) if grad.dim() == 3 else view_of_diagonal(grad)


def _empty(t: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)


def _gradient(P: Tensor, need: bool) -> Tensor:
    return empty_gradient(P) if need else P.new_empty(0)


def _replace(grads: tuple[Tensor, ...], made: tuple[Tensor, ...], t: slice) -> None:
    """The last two are grad_P and grad_d, the others have samples first."""
    for i, (grad, part) in enumerate(zip(grads, made, strict=True)):
        if part.numel():
            grad[t if i >= len(grads) - 2 else (slice(None), t)] = part


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y = μ + Pω_p + √d ω_d [S, B, N] in loc's dtype, with the noise given."""
    if omega_d is None:
        raise ValueError(NO_NOISE)
    S, (B, N, R) = omega_p.shape[0], P.shape
    y, in_double = loc.new_empty(S, B, N), product_dtype(loc, P, d) == F64
    views = *view(loc, S), *view(P), *view_of_diagonal(d), *view(omega_p), *view(omega_d, S)
    _samples(S, B, N, R, torch.get_num_threads(), *views, d.shape[1] == 1, in_double, *view(y))
    return y


def rsample_backward(
    grad_y: Tensor,
    P: Tensor,
    d: Tensor,
    omega_p: Tensor,
    omega_d: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_P, grad_d and grad_ω_d, each in its input's shape and dtype; empty where `needs` says no."""
    assert omega_d is not None, NO_NOISE
    need_P, need_d, need_omega_d = needs
    (S, B, N), R, one_d = grad_y.shape, P.shape[2], d.shape[1] == 1
    in_double = product_dtype(grad_y, P, d) == F64
    grads = _gradient(P, need_P), _empty(d, need_d), _empty(omega_d, need_omega_d)
    views = *view(grad_y), *view(P), *view_of_diagonal(d), *view(omega_p), *view(omega_d, S)
    outputs = (number for grad, need in zip(grads, needs, strict=True) for number in _viewed(grad, need))
    _samples_backward(S, B, N, R, torch.get_num_threads(), *views, one_d, in_double, *outputs)
    return grads


__all__ = [
    "gram",
    "logdet",
    "logdet_backward",
    "mahalanobis_and_logdet",
    "mahalanobis_and_logdet_backward",
    "noise",
    "normal_equations",
    "rsample",
    "rsample_backward",
]
