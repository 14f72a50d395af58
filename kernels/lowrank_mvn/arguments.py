"""The arguments of the public functions: checked once, and given the form that everything below works with."""

import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.distribution import Distribution

from . import checks, sharding
from .factors.base import Factor, Mean, Noise, Operand, result_dtype
from .factors.dense.factor import DenseFactor, DenseMean
from .layout import broadcast
from .local.base import Local
from .local.diagonal import Diagonal
from .local.precision import Precision


class Normal(NamedTuple):
    """The parameters of N(μ, PPᵀ + D); `batch_shape` is what they broadcast to, without N."""

    mean: Mean
    factor: Factor
    local: Local
    batch_shape: torch.Size

    @property
    def N(self) -> int:
        return self.factor.shape[-2]

    @property
    def reason(self) -> str:
        """Why an event has N values, for errors."""
        return f"cov_factor has shape {list(self.factor.shape)}"

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of densities and entropies."""
        return result_dtype(self.mean, self.factor, *self.local.tensors().values())


class LocalNormal(NamedTuple):
    """The parameters of N(μ, (TTᵀ)⁻¹), without a factor."""

    mean: Mean
    local: Precision
    batch_shape: torch.Size

    @property
    def N(self) -> int:
        return self.local.N

    @property
    def reason(self) -> str:
        return _reason(self.local)

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of densities and entropies."""
        return self.local.result_dtype(self.mean)


def precise(loc: Tensor | Mean, stencil: Precision) -> LocalNormal:
    """The parameters of N(μ, (TTᵀ)⁻¹), checked.

    Raises: as `normal`.
    """
    mean, local = as_mean(loc), as_precision(stencil)
    checks.alike(**named(loc=mean), **_of_stencil(local))
    checks.last_size("loc", mean.shape, _reason(local), (local.N,))
    shape = broadcast(mean.shape[:-1], local.batch_shape, names="loc and stencil")
    return LocalNormal(mean, local, shape)


def global_local(loc: Tensor | Mean, cov_factor: Tensor | Factor, stencil: Precision) -> Normal:
    """The parameters of N(μ, PPᵀ + (TTᵀ)⁻¹), checked.

    Raises: as `normal`.
    """
    mean, factor, local = as_mean(loc), as_factor(cov_factor), as_precision(stencil)
    checks.alike(**named(loc=mean, cov_factor=factor), **_of_stencil(local))
    _check_factor(factor)
    if factor.shape[-2] != local.N:
        raise ValueError(
            f"cov_factor has shape {list(factor.shape)}, expected [..., {local.N}, R] because {_reason(local)}"
        )
    checks.last_size("loc", mean.shape, _reason(local), (local.N,))
    names = "loc, cov_factor and stencil"
    shape = broadcast(mean.shape[:-1], factor.shape[:-2], local.batch_shape, names=names)
    return Normal(mean, factor, local, shape)


def as_precision(stencil: Precision) -> Precision:
    if not isinstance(stencil, Precision):
        raise TypeError(f"stencil must be a Stencil, got {checks.describe(stencil)}")
    return stencil


def _of_stencil(local: Precision) -> dict[str, Tensor]:
    return {f"stencil.{name}": t for name, t in local.tensors().items()}


def _reason(local: Precision) -> str:
    return f"the stencil has {local.channels} channels of {list(local.spatial)}"


def normal(loc: Tensor | Mean, cov_factor: Tensor | Factor, cov_diag: Tensor | float) -> Normal:
    """The parameters, checked.

    Raises:
        ValueError: a shape that does not fit, R = 0, or different devices.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.
    """
    return _normal(as_mean(loc), cov_factor, cov_diag)


def centred(cov_factor: Tensor | Factor, cov_diag: Tensor | float) -> Normal:
    """The same with mean 0. An entropy needs no mean."""
    return _normal(None, cov_factor, cov_diag)


def _normal(mean: Mean | None, cov_factor: Tensor | Factor, cov_diag: Tensor | float) -> Normal:
    factor = as_factor(cov_factor)
    local = as_local(cov_diag, factor)
    d = local.variance()
    operands: dict[str, Operand] = {} if mean is None else {"loc": mean}
    checks.alike(**named(**operands, cov_factor=factor), cov_diag=d)
    batch_shape = _check_shapes(mean, factor, d)
    if mean is None:
        zero = torch.zeros((1,), dtype=factor.dtype, device=factor.device).expand(factor.shape[-2])
        mean = DenseMean(sharding.beside(zero, *factor.tensors().values()))
    return Normal(mean, factor, local, batch_shape)


def as_factor(cov_factor: Tensor | Factor) -> Factor:
    """A tensor becomes a `DenseFactor`; the one place that asks."""
    if isinstance(cov_factor, Factor):
        return cov_factor
    return DenseFactor(checks.floating("cov_factor", cov_factor))


def as_mean(loc: Tensor | Mean) -> Mean:
    """A tensor becomes a `DenseMean`; the one place that asks."""
    return loc if isinstance(loc, Mean) else DenseMean(checks.floating("loc", loc))


def as_local(cov_diag: Tensor | float, factor: Factor) -> Local:
    """A number or a 0-d tensor is a variance of all pixels."""
    if isinstance(cov_diag, int | float | numbers.Real):
        d = checks.number("cov_diag", cov_diag, result_dtype(factor), factor.device)
        return Diagonal(sharding.beside(d, *factor.tensors().values()))
    return Diagonal(checks.floating("cov_diag", cov_diag, checks.NUMBER_OR_TENSOR))


def as_value(value: object, parameters: Normal | LocalNormal, owner: Distribution | None = None) -> Tensor:
    """`value` [..., N], checked; of a distribution that validates what it is given, the values too. Integers, bools and
    narrower floats take the dtype of `loc`, as in torch's arithmetic.

    Raises:
        ValueError: also where it is no tensor, as in torch.
    """
    mean = parameters.mean
    if not isinstance(value, Tensor):
        raise ValueError(f"value must be a tensor, got {checks.describe(value)}")
    known = value.dtype in (torch.bool, *checks.INTEGERS, *checks.FLOATS) and checks.is_dense(value)
    if known and torch.promote_types(value.dtype, mean.dtype) == mean.dtype:
        value = value.to(mean.dtype)
    checks.alike(**named(loc=mean), value=value)
    checks.last_size("value", value.shape, parameters.reason, (parameters.N,))
    broadcast(value.shape[:-1], parameters.batch_shape, names="value and of the parameters")
    if owner is not None and owner._validate_args and checks.have_values(value):
        _check_support(value, owner)
    return value


def _check_support(value: Tensor, owner: Distribution) -> None:
    if not sharding.is_distributed(value):
        owner._validate_sample(value)
    elif not torch._is_all_true(constraints.real_vector.check(sharding.local(value))):
        raise ValueError(f"value of shape {list(value.shape)} has values that are NaN")


def as_observed(observed: object, parameters: Normal | LocalNormal) -> Tensor:
    """A mask [..., N] of dtype bool."""
    return checks.mask("observed", observed, parameters.N, parameters.mean.device)


def as_noise(
    noise: tuple[Tensor, Tensor] | None,
    parameters: Normal,
    shape: torch.Size,
    impl: str,
    temperature: tuple[float, float] = (1.0, 1.0),
) -> Noise:
    """Noise for samples of that shape [*shape, N], times its temperatures: given, or drawn.

    The kernels of "triton" draw ω_d themselves where nothing scales it.
    """
    N, R = parameters.N, parameters.factor.shape[-1]
    t_P, t_L = checks.temperatures(temperature)
    plain = temperature == (1.0, 1.0)
    if noise is None:
        by_kernel = impl == "triton" and plain
        found = Noise(_drawn(parameters, shape, R), None if by_kernel else _drawn(parameters, shape, N))
    else:
        omega_p, omega_d = checks.pair("noise", noise, f"ω_p [..., {R}] and ω_d [..., {N}]")
        checks.alike(**named(loc=parameters.mean), **{"noise[0]": omega_p, "noise[1]": omega_d})
        checks.noise("noise[0]", omega_p, shape, R)
        checks.noise("noise[1]", omega_d, shape, N)
        found = Noise(omega_p.expand(*shape, R), omega_d)
    return found if plain else Noise(t_P * found.omega_p, None if found.omega_d is None else t_L * found.omega_d)


def as_local_noise(noise: tuple[Tensor | None, Tensor] | None, parameters: LocalNormal, shape: torch.Size) -> Tensor:
    """ω_d for samples of that shape: given, or drawn."""
    N = parameters.N
    if noise is None:
        return _drawn(parameters, shape, N)
    omega: Tensor = checks.pair("noise", noise, f"ω_p, which is ignored, and ω_d [..., {N}]")[1]
    checks.alike(**named(loc=parameters.mean), **{"noise[1]": omega})
    checks.noise("noise[1]", omega, shape, N)
    return omega


def _drawn(parameters: Normal | LocalNormal, shape: torch.Size, size: int) -> Tensor:
    """Noise from torch's generator; every process of distributed tensors draws all of it, from one seed."""
    mean = parameters.mean
    omega = torch.randn(*shape, size, dtype=mean.dtype, device=mean.device)
    return sharding.beside(omega, *mean.tensors().values())


def as_noise_variance(noise: Tensor | float | None, parameters: Normal | LocalNormal) -> Tensor | None:
    """τ² [..., N] or [..., 1] of what is observed; none where it is exact."""
    if noise is None:
        return None
    is_number = isinstance(noise, int | float | numbers.Real)
    number = checks.number("variance", noise, torch.float64, parameters.mean.device) if is_number else noise
    variance = checks.floating("variance", number, checks.NUMBER_OR_TENSOR)
    variance = variance.unsqueeze(0) if variance.dim() == 0 else variance
    checks.last_size("variance", variance.shape, parameters.reason, (parameters.N, 1))
    if not torch.compiler.is_compiling() and not bool((variance.detach() >= 0).all()):
        raise ValueError("variance has values that are negative or NaN, expected τ² ≥ 0 of what is observed")
    return variance


def named(**operands: Operand) -> dict[str, Tensor]:
    """The tensors that arguments are made of, by the name that an error should give."""
    return {
        f"{name}.{part}" if part else name: t
        for name, operand in operands.items()
        for part, t in operand.tensors().items()
    }


def _check_shapes(mean: Mean | None, factor: Factor, d: Tensor) -> torch.Size:
    """The batch shape of the parameters."""
    _check_factor(factor)
    shapes = [factor.shape[:-2], d.shape[:-1]]
    N, reason = factor.shape[-2], f"cov_factor has shape {list(factor.shape)}"
    if mean is not None:
        checks.last_size("loc", mean.shape, reason, (N,))
        shapes.append(mean.shape[:-1])
    checks.last_size("cov_diag", d.shape, reason, (N, 1))
    return broadcast(*shapes, names="cov_factor, cov_diag and loc")


def _check_factor(factor: Factor) -> None:
    if factor.dim() < 2:
        raise ValueError(
            f"cov_factor must be at least two-dimensional, with optional leading batch dimensions: "
            f"it has shape {list(factor.shape)}, expected [..., N, R]"
        )
    N, R = factor.shape[-2:]
    if R == 0:
        raise ValueError(
            f"cov_factor has shape {list(factor.shape)}, expected [..., {N}, R] with a rank R of at least 1"
        )
