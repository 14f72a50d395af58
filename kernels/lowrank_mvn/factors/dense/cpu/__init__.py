"""The closed forms as compiled C++ for the CPU: what `aten` computes, in its order, with less traffic.

A pass is a C++ file of the name that it has in `aten`:

    dense.h         the calls, and how they are cut into units, chunks and blocks
    capacitance     read P: C, w, log|D|
    residual        read P: r = δ − Pv in float64, q(v), PᵀD⁻¹r
    forward         these two, with the R×R algebra between them and after
    backward        read P, write grad_P, and every other gradient
    sampling        samples from given noise, and their gradients
    sums, products  tiles of sums over pixels, and over columns
    passes          how those without a second step are shared out

Where π cancels, `leverage` makes grad_d again in torch's operators. `aten` says what the functions take and give.
"""

import torch
from torch import Tensor

from ....capacitance import product_dtype, sum_of_pi
from ....device.native import NOTHING, View, function, view, view_of_diagonal
from ....device.pages import empty_gradient
from ....leverage import SMALL, Items, Remainders, doubtful_sums, mend
from ....registry import kept
from ..aten.pixels import Pixels
from ..aten.sampling import NO_NOISE, noise

# The residual of the forward pass is an output of it.
KEEPS_RESIDUAL = True

F64 = torch.float64
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_forward = function("lowrank_dense_forward", 38)
_backward = function("lowrank_dense_backward", 61)
_samples = function("lowrank_dense_samples", 37)
_samples_backward = function("lowrank_dense_samples_backward", 47)


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> Kept:
    """q, log|Σ|, C⁻¹, v and its last step C⁻¹g, r and `wide`, as `aten` has them."""
    (S, B, N), R, dtype = x.shape, P.shape[2], product_dtype(x, loc, P, d)
    new, given = P.new_empty, C_inv is not None and logdet is not None and wide is not None
    if C_inv is None or logdet is None or wide is None:
        C_inv, logdet = new(B, R, R, dtype=F64), new(B, dtype=F64)
        wide = new(B, dtype=torch.bool)
    else:
        C_inv, logdet, wide = C_inv.clone(), logdet.clone(), wide.clone()
    q, v, step = new(S, B, dtype=F64), new(S, B, R, dtype=F64), new(S, B, R, dtype=F64)
    residual = new(S, B, N, dtype=dtype)
    outputs = (t.data_ptr() for t in (C_inv, logdet, wide, q, v, step, residual))
    sizes = S, B, N, R, torch.get_num_threads()
    choices = d.shape[1] == 1, False, dtype == F64, given
    views = *view(x), *view(loc, S), *view(P), *view_of_diagonal(d)
    _forward(*sizes, *views, *choices, 0, 0, *outputs)
    return q, logdet, C_inv, v, step, residual, wide


def logdet(P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log|Σ| [B], C⁻¹ [B, R, R] and `wide` [B]."""
    B, R, new = P.shape[0], P.shape[2], P.new_empty
    found = new(B, dtype=F64), new(B, R, R, dtype=F64), new(B, dtype=torch.bool)
    _sums(None, P, d, False, product_dtype(P, d), (0, 0, found[1].data_ptr(), found[0].data_ptr(), found[2].data_ptr()))
    return found


def gram(P: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], from products in float64."""
    found = P.new_empty(P.shape[0], P.shape[2], P.shape[2], dtype=F64)
    wide = P.new_empty(P.shape[0], dtype=torch.bool)
    _sums(None, P, precision, True, F64, (found.data_ptr(), 0, 0, 0, wide.data_ptr()))
    return found


def normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    (S, B, _), R, dtype = x.shape, P.shape[2], product_dtype(x, loc, P, precision)
    found, w, C_inv = P.new_empty(B, R, R, dtype=F64), P.new_empty(S, B, R, dtype=F64), P.new_empty(B, R, R, dtype=F64)
    wide = P.new_empty(B, dtype=torch.bool)
    outputs = found.data_ptr(), w.data_ptr(), C_inv.data_ptr(), 0, wide.data_ptr()
    _sums((x, loc), P, precision, True, dtype, outputs)
    return found, w


def _sums(
    samples: tuple[Tensor, Tensor] | None,
    P: Tensor,
    d: Tensor,
    inverted: bool,
    dtype: torch.dtype,
    outputs: tuple[int, ...],
) -> None:
    """The forward pass without a residual. `outputs`: addresses of gram, w, C⁻¹, log|Σ| and `wide`."""
    B, N, R = P.shape
    S, of_samples = 0, (*NOTHING, *NOTHING)
    if samples:
        S = samples[0].shape[0]
        of_samples = *view(samples[0]), *view(samples[1], S)
    sizes, choices = (S, B, N, R, torch.get_num_threads()), (d.shape[1] == 1, inverted, dtype == F64, False)
    _forward(*sizes, *of_samples, *view(P), *view_of_diagonal(d), *choices, *outputs, 0, 0, 0, 0)


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
    (S, _, N), R = x.shape, P.shape[2]
    samples = grad_mahalanobis, x, loc, v, step, residual
    grad_x, grad_loc = _empty(x, need_x), _empty(loc, need_loc)
    outputs = _viewed(grad_x, need_x), _viewed(grad_loc, need_loc)
    grad_P, grad_d, rest = _go_back(samples, grad_logdet, P, d, C_inv, wide, outputs, (need_P, need_d))

    def pixels(t: Items) -> Pixels:
        return Pixels((x[:, t], loc[:, t]), P[t])

    def with_d_per_pixel(t: Items) -> Tensor:
        of_q = grad_mahalanobis[:, t], grad_logdet[t], x[:, t], loc[:, t]
        saved = C_inv[t], v[:, t], step[:, t], residual[:, t], wide[t]
        each, wanted = d[t].double().expand(-1, N), [False, False, False, True]
        return mahalanobis_and_logdet_backward(*of_q, P[t], each, *saved, wanted)[3]

    if need_d:
        doubtful, size = _doubtful(N, C_inv, rest), N * (R + 2 * S)
        of_q, of_logdet = grad_mahalanobis.T.double(), grad_logdet.double()
        mend(grad_d, doubtful, pixels, with_d_per_pixel, d, C_inv, of_q, of_logdet, (N, size))
    return grad_x, grad_loc, grad_P, grad_d.to(d.dtype)


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, C_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2 grad_logdet D⁻¹PC⁻¹ and grad_d = grad_logdet π; empty where `needs` says no."""
    need_P, need_d = needs
    B, N, R = P.shape
    grad_P, grad_d, rest = _go_back(None, grad_logdet, P, d, C_inv, wide, (NOTHING, NOTHING), (need_P, need_d))

    def pixels(t: Items) -> Pixels:
        return Pixels(None, P[t])

    def with_d_per_pixel(t: Items) -> Tensor:
        each = d[t].double().expand(-1, N)
        return logdet_backward(grad_logdet[t], P[t], each, C_inv[t], wide[t], [False, True])[1]

    if need_d:
        no_q = grad_logdet.new_empty(B, 0, dtype=F64)
        doubtful, of_logdet = _doubtful(N, C_inv, rest), grad_logdet.double()
        mend(grad_d, doubtful, pixels, with_d_per_pixel, d, C_inv, no_q, of_logdet, (N, N * R))
    return grad_P, grad_d.to(d.dtype)


def _go_back(
    samples: tuple[Tensor, ...] | None,
    grad_logdet: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor,
    wide: Tensor,
    outputs: tuple[View, View],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Remainders | None]:
    """grad_P, grad_d (float64 where d is one value) and 1 − h where d is one of each pixel and has a gradient.

    `samples` are grad_q, x, loc, v, step and the residual.
    """
    (B, N, R), one_d, (need_P, need_d) = P.shape, d.shape[1] == 1, needs
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    b = grad_logdet.to(F64).contiguous()
    rest = None
    if not need_d:
        grad_d = d.new_empty(0)
    elif one_d:
        grad_d = (b * sum_of_pi(d[:, 0], N, C_inv)).unsqueeze(1)
    else:
        grad_d = torch.empty_like(d, memory_format=torch.contiguous_format)
        rest = Remainders(N, C_inv, wide)
        rest.total = torch.empty_like(rest.least)
    of_rest = (rest.least.data_ptr(), rest.total.data_ptr()) if rest and rest.total is not None else (0, 0)
    S, loc_samples, dtype, of_q = 0, 0, product_dtype(P, d), (*NOTHING, *NOTHING)
    a, v, step, residual = 0, 0, 0, NOTHING
    alive = [C_inv.contiguous(), wide.contiguous()]
    if samples:
        x, loc = samples[1:3]
        S, loc_samples, dtype, of_q = len(x), len(loc), product_dtype(x, loc, P, d), (*view(x), *view(loc, len(x)))
        alive += [samples[0].to(F64).contiguous(), samples[3].contiguous(), samples[4].contiguous(), samples[5]]
        a, v, step = (t.data_ptr() for t in alive[2:5])
        residual = view(alive[5])
    sizes = S, B, N, R, torch.get_num_threads()
    choices = one_d, dtype == F64, loc_samples
    given = a, b.data_ptr(), alive[0].data_ptr(), v, step, alive[1].data_ptr()
    made = *outputs[0], *outputs[1], *_viewed(grad_P, need_P), *_viewed(grad_d, need_d)
    _backward(*sizes, *of_q, *view(P), *view_of_diagonal(d), *choices, *given, *residual, *made, *of_rest)
    return grad_P, grad_d, rest


def _viewed(grad: Tensor, need: bool) -> View:
    if not need:
        return NOTHING
    return view(grad) if grad.dim() == 3 else view_of_diagonal(grad)


def _empty(t: Tensor, need: bool) -> Tensor:
    return kept(torch.empty_like(t, memory_format=torch.contiguous_format), need)


def _doubtful(N: int, C_inv: Tensor, rest: Remainders | None) -> Tensor:
    """Indices of the items whose grad_d `leverage` makes again."""
    if rest is None:
        return doubtful_sums(N, C_inv)
    if not bool((rest.least < SMALL).any() | rest.wide.any()):
        return torch.empty(0, dtype=torch.int64)
    return rest.doubtful()


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
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    grad_d = d.new_empty(d.shape, dtype=F64 if one_d else d.dtype) if need_d else d.new_empty(0)
    grad_omega_d = omega_d.new_empty(omega_d.shape if need_omega_d else 0)
    views = *view(grad_y), *view(P), *view_of_diagonal(d), *view(omega_p), *view(omega_d, S)
    made = (grad_P, need_P), (grad_d, need_d), (grad_omega_d, need_omega_d)
    outputs = (number for grad, need in made for number in _viewed(grad, need))
    _samples_backward(S, B, N, R, torch.get_num_threads(), *views, one_d, in_double, *outputs)
    return grad_P, grad_d.to(d.dtype), grad_omega_d


__all__ = [
    "KEEPS_RESIDUAL",
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
