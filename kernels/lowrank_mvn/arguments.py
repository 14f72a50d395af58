"""The arguments of the public functions: checked once, and given the form that everything below works with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .factors.base import Factor, Mean, Noise, Operand, result_dtype
from .factors.dense.factor import DenseFactor, DenseMean
from .layout import broadcast, broadcasts_to
from .local.base import Local
from .local.diagonal import Diagonal
from .local.precision import Precision

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
        """Of densities and entropies."""
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
        """Of densities and entropies."""
        return self.local.result_dtype(self.mean)


def precise(loc: Tensor | Mean, stencil: Precision) -> LocalNormal:
    """The parameters of N(μ, (TTᵀ)⁻¹), checked.

    Raises: as `normal`.
    """
    mean, local = as_mean(loc), as_precision(stencil)
    check_tensors(**named(loc=mean), **_of_stencil(local))
    check_sizes("loc", mean, _reason(local), (local.N,))
    shape = broadcast(mean.shape[:-1], local.batch_shape, names="loc and stencil")
    return LocalNormal(mean, local, shape)


def global_local(loc: Tensor | Mean, cov_factor: Tensor | Factor, stencil: Precision) -> Normal:
    """The parameters of N(μ, PPᵀ + (TTᵀ)⁻¹), checked.

    Raises: as `normal`.
    """
    mean, factor, local = as_mean(loc), as_factor(cov_factor), as_precision(stencil)
    check_tensors(**named(loc=mean, cov_factor=factor), **_of_stencil(local))
    _check_factor(factor)
    if factor.shape[-2] != local.N:
        raise ValueError(
            f"cov_factor has shape {list(factor.shape)}, expected [..., {local.N}, R] because {_reason(local)}"
        )
    check_sizes("loc", mean, _reason(local), (local.N,))
    names = "loc, cov_factor and stencil"
    shape = broadcast(mean.shape[:-1], factor.shape[:-2], local.batch_shape, names=names)
    return Normal(mean, factor, local, shape)


def as_precision(stencil: Precision) -> Precision:
    if not isinstance(stencil, Precision):
        raise TypeError(f"stencil must be a Stencil, got {_describe(stencil)}")
    return stencil


def _of_stencil(local: Precision) -> dict[str, Tensor]:
    return {f"stencil.{name}": t for name, t in local.tensors().items()}


def _reason(local: Precision) -> str:
    return f"the stencil has {local.channels} channels of {list(local.spatial)}"


def normal(loc: Tensor | Mean | None, cov_factor: Tensor | Factor, cov_diag: Tensor | float) -> Normal:
    """The parameters, checked; without `loc`, which an entropy has no use for, the mean is 0.

    Raises:
        ValueError: a shape that does not fit, R = 0, or different devices.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.
    """
    factor = as_factor(cov_factor)
    local = as_local(cov_diag, factor)
    d = local.variance()
    mean = None if loc is None else as_mean(loc)
    operands: dict[str, Operand] = {} if mean is None else {"loc": mean}
    check_tensors(**named(**operands, cov_factor=factor), cov_diag=d)
    batch_shape = _check_shapes(mean, factor, d)
    if mean is None:
        mean = DenseMean(torch.zeros((1,), dtype=factor.dtype, device=factor.device).expand(factor.shape[-2]))
    return Normal(mean, factor, local, batch_shape)


def as_factor(cov_factor: Tensor | Factor) -> Factor:
    """A tensor becomes a `DenseFactor`; the one place that asks."""
    if isinstance(cov_factor, Factor):
        return cov_factor
    return DenseFactor(_tensor("cov_factor", cov_factor))


def as_mean(loc: Tensor | Mean) -> Mean:
    """A tensor becomes a `DenseMean`; the one place that asks."""
    return loc if isinstance(loc, Mean) else DenseMean(_tensor("loc", loc))


def as_local(cov_diag: Tensor | float, factor: Factor) -> Local:
    """A number or a 0-d tensor is a variance of all pixels, [1]."""
    if isinstance(cov_diag, int | float):
        return Diagonal(torch.full((1,), cov_diag, dtype=result_dtype(factor), device=factor.device))
    d = _tensor("cov_diag", cov_diag)
    return Diagonal(d.unsqueeze(0) if d.dim() == 0 else d)


def as_value(value: Tensor, parameters: Normal | LocalNormal, check: Callable[[Tensor], None] | None = None) -> Tensor:
    """`value` [..., N], checked, by `check` too. Integers, bools and narrower floats take the dtype of `loc`, as in
    torch's arithmetic."""
    mean = parameters.mean
    if isinstance(value, Tensor) and torch.promote_types(value.dtype, mean.dtype) == mean.dtype:
        value = value.to(mean.dtype)
    if check:
        check(value)
    check_tensors(**named(loc=mean), value=value)
    check_sizes("value", value, parameters.reason, (parameters.N,))
    broadcast(value.shape[:-1], parameters.batch_shape, names="value and of the parameters")
    return value


def as_observed(observed: Tensor, N: int) -> Tensor:
    """A mask [..., N] of dtype bool."""
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        raise TypeError(f"observed must be a tensor of dtype bool, got {_describe(observed)}")
    if observed.shape[-1:] != (N,):
        raise ValueError(f"observed has shape {list(observed.shape)}, expected [..., {N}]")
    return observed


def as_noise(noise: tuple[Tensor, Tensor] | None, parameters: Normal, shape: torch.Size, impl: str) -> Noise:
    """Noise for samples of that shape [*shape, N]: given, or drawn; the kernels of "triton" draw ω_d themselves."""
    mean, N, R = parameters.mean, parameters.N, parameters.factor.shape[-1]
    if noise is None:
        omega_p = torch.randn(*shape, R, dtype=mean.dtype, device=mean.device)
        drawn = None if impl == "triton" else torch.randn(*shape, N, dtype=mean.dtype, device=mean.device)
        return Noise(omega_p, drawn)
    omega_p, omega_d = noise
    check_tensors(**named(loc=mean), **{"noise[0]": omega_p, "noise[1]": omega_d})
    check_noise("noise[0]", omega_p, shape, R)
    check_noise("noise[1]", omega_d, shape, N)
    return Noise(omega_p.expand(*shape, R), omega_d)


def as_local_noise(noise: tuple[Tensor | None, Tensor] | None, parameters: LocalNormal, shape: torch.Size) -> Tensor:
    """ω_d for samples of that shape: given, or drawn."""
    mean, N = parameters.mean, parameters.N
    if noise is None:
        return torch.randn(*shape, N, dtype=mean.dtype, device=mean.device)
    check_tensors(**named(loc=mean), **{"noise[1]": noise[1]})
    check_noise("noise[1]", noise[1], shape, N)
    return noise[1]


def check_noise(name: str, omega: Tensor, shape: torch.Size, size: int) -> None:
    if omega.dim() < 1 or omega.shape[-1] != size or not broadcasts_to(omega.shape[:-1], shape):
        raise ValueError(f"{name} has shape {list(omega.shape)}, expected one that broadcasts to {[*shape, size]}")


def as_noise_variance(noise: Tensor | float | None, parameters: Normal | LocalNormal) -> Tensor | None:
    """τ² [..., N] or [..., 1] of what is observed; none where it is exact."""
    if noise is None:
        return None
    device = parameters.mean.device
    variance = torch.as_tensor(noise, dtype=torch.float64, device=device) if isinstance(noise, int | float) else noise
    variance = _tensor("variance", variance)
    variance = variance.unsqueeze(0) if variance.dim() == 0 else variance
    check_sizes("variance", variance, parameters.reason, (parameters.N, 1))
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


def check_tensors(**tensors: Tensor) -> None:
    """Floating-point tensors of one dtype on one device.

    Beside half precision a float32 `cov_diag` is welcome: rounding 1e-5 to bfloat16 moves log|D| by 100 nats at the
    size of an image. So are float32 weights beside half features, which a layer's are where autocast made the
    features. Under autocast any mixture without float64 is.
    """
    for name, t in tensors.items():
        _tensor(name, t)
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


def _check_shapes(mean: Mean | None, factor: Factor, d: Tensor) -> torch.Size:
    """The batch shape of the parameters."""
    _check_factor(factor)
    shapes = [factor.shape[:-2], d.shape[:-1]]
    N, reason = factor.shape[-2], f"cov_factor has shape {list(factor.shape)}"
    if mean is not None:
        check_sizes("loc", mean, reason, (N,))
        shapes.append(mean.shape[:-1])
    check_sizes("cov_diag", d, reason, (N, 1))
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


def check_sizes(name: str, t: Tensor | Operand, reason: str, sizes: tuple[int, ...]) -> None:
    """Whether the last dimension is one of `sizes`, which it has to be for that `reason`."""
    if t.dim() < 1:
        raise ValueError(f"{name} must be at least one-dimensional: expected [..., {sizes[0]}]")
    if t.shape[-1] not in sizes:
        expected = " or ".join(f"[..., {size}]" for size in sizes)
        raise ValueError(f"{name} has shape {list(t.shape)}, expected {expected} because {reason}")


def _tensor(name: str, t: object) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
        raise TypeError(f"{name} must be a floating-point tensor, got {_describe(t)}")
    return t


def _describe(t: object) -> str:
    return f"a tensor of dtype {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
