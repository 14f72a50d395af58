"""The public functions: log-density, entropy, samples and conditionals of N(μ, PPᵀ + D).

Shapes broadcast as in `torch.distributions`: with event size N and rank R,

    value, loc   [..., N]
    cov_factor   [..., N, R], any strides (the transposed view of [..., R, N] is read as it lies), or a
                 `LinearFactor` of features, which is never materialised; `loc` may then be a `LinearMean`
    cov_diag     [..., N] or [..., 1], a 0-d tensor or a number: one variance for every pixel, never expanded; where
                 there is a density, not below the smallest normal number (1.2e-38 in float32): 1/d has to exist

float32 and float64 are computed in as they are; float16 and bfloat16 are read as such, computed in float32, and
give a float32 log-density and entropy. `impl` is "aten" (closed forms, any device), "triton" (the same as GPU kernels;
the default for CUDA and ROCm tensors, and for CPU tensors only in Triton's interpreter) or "reference" (the textbook
formulas, inexact in float32). Forward-mode derivatives, and derivatives beyond the first, go through the formulas
of the reference in float64 whatever the implementation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import linear, ops, ops_linear_rsample, ops_rsample, reference
from .linear import LinearFactor, LinearMean, broadcast, joined
from .ops import forward_mode

__all__ = ["Conditional", "condition", "entropy", "log_prob", "log_prob_and_entropy", "rsample"]

Factor = Tensor | LinearFactor
Mean = Tensor | LinearMean

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Conditional(NamedTuple):
    """Parameters of a conditional normal over all N pixels; observed ones have their value, and variance 0.

    Of a `LinearFactor` the factor is one again, with a weight for each item and zero rows at observed pixels. Factor
    and diagonal depend on everything but the value: several values of one item share them. They are expanded to the
    whole batch shape; a `LinearFactor` and its diagonal have that of what they depend on.
    """

    loc: Tensor  # [..., N]
    cov_factor: Factor  # [..., N, R]
    cov_diag: Tensor  # [..., N]


class Capacitance(NamedTuple):
    """What one pass over P leaves behind for the next call with the same P and d (canonical shapes, see `ops`)."""

    C_inv: Tensor
    logdet: Tensor
    wide: Tensor


def log_prob(
    value: Tensor, loc: Mean, cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None
) -> Tensor:
    """log p(value) = −½ (N log 2π + log|Σ| + δᵀΣ⁻¹δ) in nats, of the broadcast batch shape.

    The quadratic form is a sum of squares of the residual δ − Pv, never a difference of two large numbers.

    Raises:
        ValueError: a shape does not fit, R = 0, tensors on different devices, or an unknown `impl`.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ (outside autocast).
    """
    return log_prob_and_entropy(value, loc, cov_factor, cov_diag, impl=impl)[0]


def entropy(cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None) -> Tensor:
    """H = ½ (N (1 + log 2π) + log|Σ|) in nats, of the batch shape of `cov_factor` and `cov_diag`.

    Raises: as `log_prob`.
    """
    d = as_diag(cov_diag, cov_factor)
    check_tensors(**parts(cov_factor=cov_factor), cov_diag=d)
    batch = check_shapes(None, None, cov_factor, d)
    logdet, _ = logdet_alone(cov_factor, d, check_impl(impl, cov_factor))
    return _entropy(logdet.expand(batch), cov_factor.shape[-2]).to(result_dtype(cov_factor, d))


def log_prob_and_entropy(
    value: Tensor, loc: Mean, cov_factor: Factor, cov_diag: Tensor | float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`log_prob` and `entropy` from one capacitance matrix, with one backward pass for both.

    Returns: the log-density, of the broadcast shape of all four arguments, and the entropy, of that of the last
    three; both in nats.

    Raises: as `log_prob`.
    """
    d = as_diag(cov_diag, cov_factor)
    value = as_value(value, loc)
    check_tensors(value=value, **parts(loc=loc, cov_factor=cov_factor), cov_diag=d)
    batch = check_shapes(value, loc, cov_factor, d)
    q, logdet, _ = mahalanobis_and_logdet(value, loc, cov_factor, d, check_impl(impl, cov_factor))
    N, dtype = cov_factor.shape[-2], result_dtype(value, loc, cov_factor, d)
    return log_density(q, logdet, N).to(dtype), _entropy(logdet.expand(batch), N).to(dtype)


def rsample(
    loc: Mean,
    cov_factor: Factor,
    cov_diag: Tensor | float,
    sample_shape: torch.Size | tuple[int, ...] = (),
    *,
    noise: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = μ + P ω_p + √d ⊙ ω_d, of shape `sample_shape` + batch + [N], differentiable.

    Args:
        noise: ω_p [..., R] and ω_d [..., N], broadcast to `sample_shape` + batch; drawn from torch's generator, in
            this order, where it is not given. The kernels of "triton" draw ω_d themselves, from a seed that they take
            from torch's generator: the same seed gives the same sample, but not that of "aten".

    All samples share one pass over P. Nothing is factorised: a zero diagonal gives samples.

    Raises: as `log_prob`.
    """
    d = as_diag(cov_diag, cov_factor)
    check_tensors(**parts(loc=loc, cov_factor=cov_factor), cov_diag=d)
    impl = check_impl(impl, cov_factor)
    shape = torch.Size(sample_shape) + check_shapes(None, loc, cov_factor, d)
    N, R = cov_factor.shape[-2:]
    fused = not forward_mode() and (
        impl != "reference" if isinstance(cov_factor, Tensor) else impl == "triton" and _has_kernel(cov_factor, d)
    )
    if noise is None:
        omega_p = torch.randn(*shape, R, dtype=loc.dtype, device=loc.device)
        omega_d = None if impl == "triton" else torch.randn(*shape, N, dtype=loc.dtype, device=loc.device)
    else:
        omega_p, omega_d = noise
        check_tensors(**parts(loc=loc), **{"noise[0]": omega_p, "noise[1]": omega_d})
        for name, omega, size in (("noise[0]", omega_p, R), ("noise[1]", omega_d, N)):
            if omega.dim() < 1 or omega.shape[-1] != size or not _broadcasts_to(omega.shape[:-1], shape):
                raise ValueError(f"{name} has shape {_shape(omega)}, expected one that broadcasts to {[*shape, size]}")
        omega_p = omega_p.expand(*shape, R)
    if fused:
        return _rsample_fused(loc, cov_factor, d, shape, omega_p, omega_d, impl)
    if omega_d is None:
        omega_d = _drawn(cov_factor, d, shape, result_dtype(loc, cov_factor, d))
    dtype = torch.promote_types(loc.dtype, cov_factor.dtype)
    with ops.without_autocast(cov_factor.device):
        high = result_dtype(loc, cov_factor, d)
        loc = materialised(loc, high)
        if impl == "reference" or isinstance(cov_factor, Tensor):  # the latter in forward mode
            P = materialised(cov_factor, high)
            return reference.rsample(*(t.to(high) for t in (loc, P, d, omega_p, omega_d))).to(dtype)
        y = cov_factor.times(omega_p)
        return (loc.to(high) + y.to(high) + d.to(high).sqrt() * omega_d.to(high)).to(dtype)


def _has_kernel(P: LinearFactor, d: Tensor) -> bool:
    """Whether samples from a linear factor have a kernel: one item for each of the features', and no batching rule."""
    return P.mask is None and broadcast(P.shape[:-2], d.shape[:-1]) == P.features.shape[:1] and not ops.transformed()


def _rsample_fused(
    loc: Mean, P: Factor, d: Tensor, shape: torch.Size, omega_p: Tensor, omega_d: Tensor | None, impl: str
) -> Tensor:
    """The operators of `ops_rsample` and `ops_linear_rsample`; ω_d, if not given, comes from one seed per item."""
    layout = _Layout(shape, broadcast(P.shape[:-2], d.shape[:-1]))
    mean = joined(loc, P)
    shift = layout.samples(materialised(loc)) if mean is None else None
    seed = layout.seed(P.device) if omega_d is None else None
    noise = None if omega_d is None else layout.samples(omega_d.expand(*shape, P.shape[-2]), everything=True)
    omega, diag = layout.samples(omega_p, everything=True), layout.items(d, 1)
    if isinstance(P, LinearFactor):
        return layout.restore(ops_linear_rsample.rsample(shift, P, mean, diag, omega, noise, seed, impl))
    assert shift is not None
    shift = shift.to(torch.promote_types(loc.dtype, P.dtype))
    return layout.restore(ops_rsample.rsample(shift, layout.items(P, 2), diag, omega, noise, seed, impl))


def _drawn(P: Factor, d: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """ω_d [*shape, N] as the kernels draw it for the same state of torch's generator: a sample with nothing else."""
    layout, N = _Layout(shape, broadcast(P.shape[:-2], d.shape[:-1])), P.shape[-2]
    S, B = layout.S, layout.B
    sizes = (1, B, N), (B, N, 1), (S, B, 1)
    loc, factor, omega_p = (torch.zeros(size, dtype=dtype, device=P.device) for size in sizes)
    one = loc.new_ones(B, 1)
    return layout.restore(ops_rsample.rsample(loc, factor, one, omega_p, None, layout.seed(P.device), "triton"))


def condition(
    value: Tensor,
    observed: Tensor,
    loc: Mean,
    cov_factor: Factor,
    cov_diag: Tensor | float,
    *,
    impl: str | None = None,
) -> Conditional:
    """p(y | y[observed] = value[observed]), again low-rank plus diagonal, over all N pixels.

    With index 1 for the rest, 2 for what is observed and C₂ = I + P₂ᵀD₂⁻¹P₂ = L₂L₂ᵀ, the mean of the rest is
    μ₁ + P₁C₂⁻¹P₂ᵀD₂⁻¹(value₂ − μ₂), its factor P₁L₂⁻ᵀ, its diagonal d₁ (paper, equations 6 and 7, and Woodbury's
    identity). Observed pixels keep their value with a zero factor and a zero diagonal: the result can be sampled as
    it is, and has a density over the rest (index the rows with `~observed`). O(N R²).

    Of a `LinearFactor` the result is one again: the same features, weight WL₂⁻ᵀ for each item, zero rows at observed
    pixels. Several edits of one item share its features, which are neither copied nor is P made of them.

    Args:
        value: [..., N]; what stands at pixels that are not observed is ignored, NaN too.
        observed: bool, [..., N].

    Raises: as `log_prob`; TypeError where `observed` is not of dtype bool.
    """
    d = as_diag(cov_diag, cov_factor)
    value = as_value(value, loc)
    check_tensors(value=value, **parts(loc=loc, cov_factor=cov_factor), cov_diag=d)
    impl = check_impl(impl, cov_factor)
    batch = check_shapes(value, loc, cov_factor, d)
    N, R = cov_factor.shape[-2:]
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        raise TypeError(f"observed must be a tensor of dtype bool, got {_describe(observed)}")
    if observed.shape[-1:] != (N,):
        raise ValueError(f"observed has shape {_shape(observed)}, expected [..., {N}]")
    shape = broadcast(value.shape[:-1], observed.shape[:-1], batch, names="value, observed and the parameters")
    dtype, high = torch.promote_types(loc.dtype, cov_factor.dtype), result_dtype(loc, cov_factor, d)
    if isinstance(cov_factor, LinearFactor) and impl in linear.IMPLEMENTATIONS and not forward_mode():
        return _condition_linear(value, observed, loc, cov_factor, d, shape, impl)
    loc, cov_factor = materialised(loc, high), materialised(cov_factor, high)
    value, loc = value.to(high), loc.to(high)
    value = torch.where(observed, value, loc)
    items = broadcast(observed.shape[:-1], cov_factor.shape[:-2], d.shape[:-1])
    d = d.to(high).expand(*d.shape[:-1], N)
    with ops.without_autocast(cov_factor.device):
        if impl == "reference" or forward_mode():
            work = high if impl == "reference" else torch.float64
            value, loc, d = (t.to(work).expand(*shape, N) for t in (value, loc, d))
            mean, factor, diag = reference.condition(value, observed.expand(*shape, N), loc, cov_factor.to(work), d)
            return Conditional(mean.to(dtype), factor.expand(*shape, N, R).to(dtype), diag.to(dtype))
        # Values of one item share its C and its factor.
        layout = _Layout(shape, items)
        P = layout.items(cov_factor, 2)
        precision = layout.items(torch.where(observed, d, d.new_ones(())).reciprocal() * observed, 1)
        C, w = ops.gram(layout.samples(value, everything=True), layout.samples(loc), P, precision, impl)
        L_inv_t, v = (t.to(high) for t in _posterior(C, w.permute(1, 2, 0)))
        P = P.to(high)
        deviation = layout.restore(torch.bmm(v.mT, P.mT).transpose(0, 1))
        factor = torch.bmm(P, L_inv_t) if P.stride(-1) <= P.stride(-2) else torch.bmm(L_inv_t.mT, P.mT).mT
        factor = factor.mul_(layout.items(~observed, 1).to(high).unsqueeze(-1)).reshape(*items, N, R)
        return Conditional(
            torch.where(observed, value, loc + deviation).to(dtype),
            factor.to(dtype).expand(*shape, N, R),
            torch.where(observed, d.new_zeros(()), d).to(dtype).expand(*shape, N),
        )


def _posterior(C: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻ᵀ and C⁻¹w of C = LLᵀ [B, R, R] and w [B, R, S]."""
    L = torch.linalg.cholesky_ex(C)[0]
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L.mT, identity, upper=True), torch.cholesky_solve(w, L)


def _condition_linear(
    value: Tensor, observed: Tensor, loc: Mean, P: LinearFactor, d: Tensor, shape: torch.Size, impl: str
) -> Conditional:
    """`condition` from products of the features; what is observed and d are those of items, the value of samples."""
    dtype, high = torch.promote_types(loc.dtype, P.dtype), result_dtype(loc, P, d)
    N, R = P.shape[-2:]
    items = broadcast(observed.shape[:-1], P.shape[:-2], d.shape[:-1])
    layout = _Layout(shape, items)
    known = observed if P.mask is None else observed & P.mask
    d = d.to(high).expand(*d.shape[:-1], N)
    precision = torch.where(known, d, d.new_ones(())).reciprocal() * known
    x = torch.where(observed, value.to(high), torch.zeros((), dtype=high, device=value.device))
    with ops.without_autocast(P.device):
        mean = joined(loc, P)
        loc = materialised(loc, high).to(high)
        shift = None if mean is not None else layout.samples(loc)
        x, precision = layout.samples(x, everything=True), layout.items(precision, 1)
        C, w = linear.gram(x, shift, P, items, mean, precision, impl)
        L_inv_t, v = _posterior(C, w.permute(1, 2, 0))
        factor = P.mix(L_inv_t.reshape(*items, R, R)).masked(~observed)
        deviation = P.times(layout.restore(v.permute(2, 0, 1)).to(high))
        return Conditional(
            torch.where(observed, value.to(high), loc + deviation.to(high)).to(dtype),
            factor,
            torch.where(observed, torch.zeros_like(d), d).to(dtype),
        )


# --- Shared with the distribution class -------------------------------------------------------------------------


def mahalanobis_and_logdet(
    value: Tensor, loc: Mean, P: Factor, d: Tensor, impl: str, given: Capacitance | None = None
) -> tuple[Tensor, Tensor, Capacitance | None]:
    """q in the broadcast shape of everything, log|Σ| in that of P and d, and what a next call can be given."""
    items_shape = broadcast(P.shape[:-2], d.shape[:-1])
    if isinstance(P, LinearFactor) and not _stays_linear(P, impl):
        P = P.materialise(result_dtype(P, d))
    if joined(loc, P) is None:
        loc = materialised(loc, result_dtype(P, d))
    if isinstance(P, LinearFactor):
        return *_linear(value, loc, P, d, items_shape, impl), None
    assert isinstance(loc, Tensor)
    if impl == "reference" or forward_mode():
        work = torch.promote_types(result_dtype(P), torch.float64 if impl != "reference" else P.dtype)
        with ops.without_autocast(P.device):
            q, logdet = reference.mahalanobis_and_logdet(*(t.to(work) for t in (value, loc, P, d)))
        return q, logdet.expand(items_shape), None
    shape = broadcast(value.shape[:-1], loc.shape[:-1], items_shape)
    layout = _Layout(shape, items_shape)
    q, logdet, *rest = ops.mahalanobis_and_logdet(
        layout.samples(value, everything=True),
        layout.samples(loc),
        layout.items(P, 2),
        layout.items(d, 1),
        *(given or (None, None, None)),
        impl,
    )
    C_inv, *_, wide = rest
    return layout.restore(q), logdet.reshape(items_shape), Capacitance(C_inv, logdet.detach(), wide)


def _stays_linear(P: LinearFactor, impl: str) -> bool:
    """Whether the operators for linear factors apply."""
    return impl in linear.IMPLEMENTATIONS and P.mask is None and not forward_mode()


def _linear(
    value: Tensor, loc: Mean, P: LinearFactor, d: Tensor, items_shape: torch.Size, impl: str
) -> tuple[Tensor, Tensor]:
    mean = loc if isinstance(loc, LinearMean) else None
    layout = _Layout(broadcast(value.shape[:-1], loc.shape[:-1], items_shape), items_shape)
    x = layout.samples(value, everything=True)
    shift = layout.samples(loc) if isinstance(loc, Tensor) else None
    q, logdet = linear.mahalanobis_and_logdet(x, shift, P, items_shape, mean, layout.items(d, 1), impl)
    return layout.restore(q), logdet.reshape(items_shape)


def logdet_alone(P: Factor, d: Tensor, impl: str) -> tuple[Tensor, Capacitance | None]:
    """log|Σ|: the same for no samples at all."""
    nothing = d.new_empty(0, *(1 for _ in broadcast(P.shape[:-2], d.shape[:-1])), P.shape[-2])
    _, logdet, capacitance = mahalanobis_and_logdet(nothing, nothing, P, d, impl)
    return logdet, capacitance


def log_density(mahalanobis: Tensor, logdet: Tensor, N: int) -> Tensor:
    return -0.5 * (N * math.log(2 * math.pi) + logdet + mahalanobis)


def _entropy(logdet: Tensor, N: int) -> Tensor:
    return 0.5 * (N * (1 + math.log(2 * math.pi)) + logdet)


class _Layout:
    """Sorts the dimensions of a broadcast shape into items (those P and d vary over) and samples (those they share).

    P is then [B, N, R] and everything else [S, B, N], whatever was broadcast, and P is read once for all samples.
    """

    def __init__(self, shape: torch.Size, items_shape: torch.Size):
        self.shape = shape
        padded = (1,) * (len(shape) - len(items_shape)) + tuple(items_shape)
        self.item_dims = [i for i, size in enumerate(padded) if size == shape[i]]
        self.sample_dims = [i for i, size in enumerate(padded) if size != shape[i]]
        self.order = self.sample_dims + self.item_dims
        self.S = math.prod([shape[i] for i in self.sample_dims])
        self.B = math.prod([shape[i] for i in self.item_dims])
        self.items_shape = items_shape

    def items(self, t: Tensor, trailing: int) -> Tensor:
        """[..., *event] -> [B, *event], a view or, where `t` is itself broadcast over some of the items, a copy that
        lies as `t` does."""
        if trailing == 2 and t.stride(-2) < t.stride(-1):
            return self.items(t.mT, 2).mT
        event = t.shape[t.dim() - trailing :]
        return t.expand(*self.items_shape, *event).reshape(self.B, *event)

    def samples(self, t: Tensor, everything: bool = False) -> Tensor:
        """[..., N] -> [S, B, N], or [1, B, N] where it has no sample dimension (unless `everything`)."""
        padded = t[(None,) * (len(self.shape) + 1 - t.dim())]
        shared = not everything and all(padded.shape[i] == 1 for i in self.sample_dims)
        shape = [1 if shared and i in self.sample_dims else size for i, size in enumerate(self.shape)]
        ordered = padded.expand(*shape, t.shape[-1]).permute([*self.order, len(self.shape)])
        return ordered.reshape(1 if shared else self.S, self.B, t.shape[-1])

    def seed(self, device: torch.device) -> Tensor:
        """One for each item [B], from torch's generator."""
        return torch.randint(2**62, (self.B,), device=device)

    def restore(self, t: Tensor) -> Tensor:
        """[S, B, ...] -> the broadcast shape."""
        trailing = t.shape[2:]
        back = [self.order.index(i) for i in range(len(self.shape))]
        extra = range(len(back), len(back) + len(trailing))
        ordered = t.reshape([self.shape[i] for i in self.order] + list(trailing))
        return ordered.permute([*back, *extra])


def materialised(t: Tensor | LinearFactor | LinearMean, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as it is; a linear map of features made, in `dtype` if that is given, so that nothing is rounded."""
    return t if isinstance(t, Tensor) else t.materialise(dtype)


def result_dtype(*tensors: Tensor | LinearFactor | LinearMean) -> torch.dtype:
    """The dtype of a log-density: float64 where any tensor is, else float32; never half precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# --- Arguments --------------------------------------------------------------------------------------------------


def parts(**arguments: Tensor | LinearFactor | LinearMean) -> dict[str, Tensor]:
    """The tensors that arguments are made of, by the name that an error should give."""
    found: dict[str, Tensor] = {}
    for name, t in arguments.items():
        if isinstance(t, LinearFactor | LinearMean):
            found |= {f"{name}.{part}": tensor for part, tensor in t.tensors().items()}
        else:
            found[name] = t
    return found


def available_implementations(P: Factor) -> list[str]:
    """What a factor can choose from, by its kind and device."""
    implementations = linear.IMPLEMENTATIONS if isinstance(P, LinearFactor) else ops.IMPLEMENTATIONS
    return [impl for impl in (*implementations, "reference") if ops.runs_on(impl, P.device)]


def check_impl(impl: str | None, P: Factor) -> str:
    available = available_implementations(P)
    if impl is None:
        return "triton" if P.is_cuda and "triton" in available else "aten"
    if impl not in available:
        kind = "a LinearFactor" if isinstance(P, LinearFactor) else "tensors"
        raise ValueError(f"impl={impl!r} is not available for {kind} on {P.device}, expected one of {available}")
    return impl


def as_diag(cov_diag: Tensor | float, cov_factor: Factor) -> Tensor:
    """A number or a 0-d tensor as [1]."""
    if isinstance(cov_diag, int | float):
        like = cov_factor if isinstance(cov_factor, Tensor | LinearFactor) else torch.empty(())
        return torch.full((1,), cov_diag, dtype=result_dtype(like), device=like.device)
    return cov_diag.unsqueeze(0) if isinstance(cov_diag, Tensor) and cov_diag.dim() == 0 else cov_diag


def as_value(value: Tensor, loc: Mean) -> Tensor:
    """Integers, bools and narrower floats take the dtype of `loc`, as they do in torch's arithmetic."""
    if (
        isinstance(value, Tensor)
        and isinstance(loc, Tensor | LinearMean)
        and torch.promote_types(value.dtype, loc.dtype) == loc.dtype
    ):
        return value.to(loc.dtype)
    return value


def check_tensors(**tensors: Tensor) -> None:
    """Floating-point tensors of one dtype on one device.

    Beside half precision a float32 `cov_diag` is welcome: rounding 1e-5 to bfloat16 moves log|D| by 100 nats at the
    size of an image. So are float32 weights beside half features, which a layer's are where autocast made the
    features. Under autocast any mixture without float64 is.
    """
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
            raise TypeError(f"{name} must be a floating-point tensor, got {_describe(t)}")
    (first, anchor), *others = tensors.items()
    for name, t in others:
        if t.device != anchor.device:
            raise ValueError(f"{name} is on {t.device}, {first} on {anchor.device}; expected one device")
        if t.dtype == anchor.dtype:
            continue
        narrow = torch.float64 not in (t.dtype, anchor.dtype)
        may_be_wide = name == "cov_diag" or name.endswith((".weight", ".bias"))
        mixable = (may_be_wide and t.dtype == torch.float32) or torch.is_autocast_enabled(t.device.type)
        if not (narrow and mixable):
            raise TypeError(f"{name} has dtype {t.dtype}, {first} has {anchor.dtype}; expected one dtype")


def check_shapes(value: Tensor | None, loc: Mean | None, cov_factor: Factor, d: Tensor) -> torch.Size:
    """The batch shape of the parameters; raises ValueError where something does not fit."""
    if cov_factor.dim() < 2:
        raise ValueError(
            f"cov_factor must be at least two-dimensional, with optional leading batch dimensions: "
            f"it has shape {_shape(cov_factor)}, expected [..., N, R]"
        )
    N, R = cov_factor.shape[-2:]
    if R == 0:
        raise ValueError(
            f"cov_factor has shape {_shape(cov_factor)}, expected [..., {N}, R] with a rank R of at least 1"
        )
    for name, t, sizes in (("value", value, (N,)), ("loc", loc, (N,)), ("cov_diag", d, (N, 1))):
        if t is None:
            continue
        if t.dim() < 1:
            raise ValueError(f"{name} must be at least one-dimensional: expected [..., {N}]")
        if t.shape[-1] not in sizes:
            expected = " or ".join(f"[..., {size}]" for size in sizes)
            raise ValueError(
                f"{name} has shape {_shape(t)}, expected {expected} because cov_factor has shape {_shape(cov_factor)}"
            )
    shapes = [cov_factor.shape[:-2], d.shape[:-1], *([] if loc is None else [loc.shape[:-1]])]
    batch = broadcast(*shapes, names="cov_factor, cov_diag and loc")
    if value is not None:
        broadcast(value.shape[:-1], batch, names="value and of the parameters")
    return batch


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    try:
        return broadcast(shape, target) == target
    except ValueError:
        return False


def _shape(t: Tensor | LinearFactor | LinearMean) -> list[int]:
    return list(t.shape)


def _describe(t: object) -> str:
    return f"a tensor of dtype {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
