"""`LowRankMultivariateNormal`: a drop-in for torch's class of that name, faster and more exact."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal as TorchLowRank  # bound once, whatever the name means later
from torch.distributions import constraints
from torch.distributions.distribution import Distribution

from .. import arguments, checks, functional, reference
from ..factors.base import Mean
from ..factors.linear.factor import LinearFactor
from ..factors.linear.mean import LinearMean
from ..layout import broadcast, broadcasts_to
from ..registry import forward_mode, recorded, transformed, without_autocast
from .cache import Cache
from .local import Temperature

__all__ = ["LowRankMultivariateNormal"]


class _Parameter:
    """A parameter under one of the names that torch's class has for it: made when it is read, replaced when it is set.

    No `property`, because torch's class has plain attributes here and wrappers compare the properties of the two.
    """

    def __init__(self, read: Callable[[Any], Tensor], replace: Callable[[Any, Any], None]) -> None:
        self.read, self.replace = read, replace

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else self.read(owner)

    def __set__(self, owner: Any, value: Any) -> None:
        self.replace(owner, value)


class LowRankMultivariateNormal(TorchLowRank):
    r"""
    Multivariate normal whose covariance matrix is low-rank plus diagonal, N(μ, PPᵀ + D)::

        covariance_matrix = cov_factor @ cov_factor.T + diag(cov_diag)

    A drop-in for :class:`torch.distributions.LowRankMultivariateNormal`: same arguments, properties, sample shapes,
    errors and, on the CPU, the same samples from the same seed. The log-density is that of the residual form (exact
    in float32 where torch's is off by thousands of nats), nothing of the size of `cov_factor` is allocated but its
    gradient, and nothing is factorised before it is needed. Tensors on a GPU go through Triton kernels, whose samples
    come from another stream of noise than torch's (the same seed gives the same sample there too).

    Parameters may change: what an optimiser's step writes into them, and what is assigned to `loc`, `cov_factor` or
    `cov_diag`, is what the next call computes with.

    Example:
        >>> m = LowRankMultivariateNormal(torch.zeros(2), torch.tensor([[1.0], [0.0]]), torch.ones(2))
        >>> m.sample().shape  # normally distributed with mean=`[0,0]`, cov_factor=`[[1],[0]]`, cov_diag=`[1,1]`
        torch.Size([2])
        >>> log_prob, entropy = m.log_prob_and_entropy(torch.zeros(2))

    Args:
        loc (Tensor or LinearMean): mean μ of the distribution with shape `batch_shape + event_shape`
        cov_factor (Tensor or LinearFactor): low-rank factor P with shape `batch_shape + event_shape + (rank,)`, any
            strides; a `LinearFactor` of features is materialised, anew each time, only when somebody reads
            `cov_factor`, a matrix over all pixels, or a KL divergence
        cov_diag (Tensor or float): diagonal of D with shape `batch_shape + event_shape`; or one variance for all
            pixels, with shape `batch_shape + (1,)` or a scalar, which is never expanded in memory
        validate_args (bool, optional): whether to check values as well as shapes (finite, and `cov_diag` positive)

    Raises:
        ValueError: a shape that does not fit, R = 0, different devices, or (under `validate_args`) values that do not
            satisfy `arg_constraints` or are not finite.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ.

    Half precision (float16, bfloat16, autocast) is read as such and computed in float32; log-density and entropy
    come out in float32. Without `validate_args`, an item with non-finite parameters has a log-density of NaN and
    leaves the other items of the batch alone; a zero diagonal gives samples.
    """

    arg_constraints = {  # noqa: RUF012  (torch's class attribute, of torch's form)
        "loc": constraints.real_vector,
        "cov_factor": constraints.independent(constraints.real, 2),
        "cov_diag": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    _parameters: arguments.Normal
    _replaced = False  # whether something was assigned since all of them were last checked together

    def __init__(
        self,
        loc: Tensor | LinearMean,
        cov_factor: Tensor | LinearFactor,
        cov_diag: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self._parameters = p = arguments.normal(loc, cov_factor, cov_diag)
        self._cache = Cache()
        # Not torch's own constructor, which factorises the capacitance matrix and would make a factor of features.
        Distribution.__init__(self, p.batch_shape, torch.Size((p.N,)), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            self._validate_parameters()

    def _validate_parameters(self) -> None:
        p = self._parameters
        tensors = {**arguments.named(loc=p.mean, cov_factor=p.factor), **p.local.tensors()}
        checks.finite(self, tensors.items(), "cov_diag", self.arg_constraints["cov_diag"])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankMultivariateNormal":
        new: LowRankMultivariateNormal = self._get_checked_instance(  # type: ignore[no-untyped-call]
            LowRankMultivariateNormal, _instance
        )
        shape = checks.expansion(batch_shape, self._batch_shape)
        new._parameters, new._replaced, new._cache = self._parameters, self._replaced, self._cache
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        """Torch's text. A linear factor or mean shows its shape and is not built."""
        p, shape = self._parameters, self._batch_shape + self._event_shape
        found: list[str] = []
        for name, t, whole in (
            ("loc", p.mean.given, shape),
            ("cov_factor", p.factor.given, self._batch_shape + p.factor.shape[-2:]),
            ("cov_diag", p.local.variance(), shape),
        ):
            found.append(f"{name}: {t.expand(whole) if whole.numel() == 1 and isinstance(t, Tensor) else whole}")
        return f"{type(self).__name__}({', '.join(found)})"

    # --- Parameters, under torch's names: one state, which all of them read and replace ---------------------------

    loc = _Parameter(
        lambda self: self._parameters.mean.materialise().expand(self._batch_shape + self._event_shape),
        lambda self, value: self._replace(mean=self._checked("loc", value, arguments.as_mean(value), 1)),
    )
    cov_factor = _Parameter(
        lambda self: self._unbroadcasted_cov_factor.expand(self._batch_shape + self._parameters.factor.shape[-2:]),
        lambda self, value: self._replace(factor=self._checked("cov_factor", value, arguments.as_factor(value), 2)),
    )
    cov_diag = _Parameter(
        lambda self: self._unbroadcasted_cov_diag.expand(self._batch_shape + self._event_shape),
        lambda self, value: self._replace(local=self._checked_diagonal(value)),
    )
    _unbroadcasted_cov_factor = _Parameter(lambda self: self._parameters.factor.materialise(), cov_factor.replace)
    _unbroadcasted_cov_diag = _Parameter(lambda self: self._expanded_diagonal(), cov_diag.replace)
    _capacitance_tril = _Parameter(
        lambda self: self._cholesky(), lambda self, value: self._compare_with_capacitance(value)
    )

    @property
    def _normal(self) -> arguments.Normal:
        """The parameters, checked together again after an assignment.

        Not during it: parameters that are moved one by one to another device are on two devices in between.
        """
        if self._replaced:
            p = self._parameters
            arguments.normal(p.mean, p.factor, p.local.variance())
            self._replaced = False
        return self._parameters

    def _replace(self, **changed: Any) -> None:
        self._parameters = self._parameters._replace(**changed)
        self._replaced, self._cache = True, Cache()

    def _checked(self, name: str, value: Any, operand: Any, trailing: int) -> Any:
        """An operand whose event is that of the distribution and whose batch broadcasts to its own."""
        event, batch = operand.shape[-trailing:][:1], operand.shape[: operand.dim() - trailing]
        if event != self._event_shape or not broadcasts_to(batch, self._batch_shape):
            expected = list(self._batch_shape + self._event_shape) + ["R"] * (trailing - 1)
            raise ValueError(f"{name} has shape {list(operand.shape)}, expected one that broadcasts to {expected}")
        return operand

    def _checked_diagonal(self, value: Any) -> Any:
        local = arguments.as_local(value, self._parameters.factor)
        if local.variance().shape[-1] != 1:
            self._checked("cov_diag", value, local.variance(), 1)
        return local

    def _expanded_diagonal(self) -> Tensor:
        d = self._parameters.local.variance()
        return d.expand(d.shape[:-1] + self._event_shape)

    def _cholesky(self) -> Tensor:
        """Cholesky factor of C = I + PᵀD⁻¹P, differentiable, from float64; also of parameters that are half moved."""
        p = self._parameters
        with without_autocast(p.factor.device):
            P = p.factor.materialise(torch.float64).double()
            C = reference.capacitance(P, p.local.variance().to(P).reciprocal())
            L: Tensor = torch.linalg.cholesky(C)
            return L.to(p.result_dtype)

    def _compare_with_capacitance(self, value: Tensor) -> None:
        """It follows from the other parameters: assigned, it has to be what they say, on any device."""
        P, d = (t.detach().cpu().double() for t in (self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag))
        expected = torch.linalg.cholesky(reference.capacitance(P, d.reciprocal()))
        given = value.detach().cpu().double()
        if given.shape != expected.shape or not torch.allclose(given, expected, rtol=1e-3, atol=1e-5):
            raise ValueError(
                "_capacitance_tril follows from cov_factor and cov_diag: assign these, or the value that they imply"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": Cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the state of torch's class: a pickle from before ours took its place."""
        self.__dict__.update(state)
        if "_parameters" not in state:
            parameters = (state[n] for n in ("loc", "_unbroadcasted_cov_factor", "_unbroadcasted_cov_diag"))
            self._parameters, self._cache = arguments.normal(*parameters), Cache()
            for name in set(state) & set(dir(TorchLowRank)).union(vars(LowRankMultivariateNormal)):
                del self.__dict__[name]  # hidden behind what is made of the parameters

    # --- Densities ------------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of shape `sample_shape + batch_shape`; `entropy` then costs nothing more."""
        return self._log_prob_and_logdet(value)[0]

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape `batch_shape`.

        After `log_prob` it costs nothing: both then come from one node, with one backward pass. If called first, it
        caches the capacitance for `log_prob`; the two backward passes stay separate.
        """
        p = self._normal
        logdet = self._cache.logdet(self._tensors)
        if logdet is None:
            logdet, capacitance = p.local.logdet(p.factor, p.factor.implementation(None))
            self._cache.keep(self._tensors, logdet, capacitance)
        return self._entropy_of(logdet)

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob(value)` and `entropy()` from one capacitance matrix, with one backward pass for both."""
        log_prob, logdet = self._log_prob_and_logdet(value)
        return log_prob, self._entropy_of(logdet)

    def _log_prob_and_logdet(self, value: Tensor) -> tuple[Tensor, Tensor]:
        p = self._normal
        value = arguments.as_value(value, p._replace(batch_shape=self._batch_shape), self)
        given = self._cache.capacitance(self._tensors)
        q, logdet, capacitance = p.local.density(value, p.mean, p.factor, p.factor.implementation(None), given)
        q = q.expand(broadcast(value.shape[:-1], self._batch_shape))
        log_prob = functional.log_density(q, logdet, p.N).to(p.result_dtype)
        # The joint node also hangs on the value and the mean: without a gradient for P or d the entropy must not.
        learned = p.factor.requires_grad or p.local.requires_grad
        if not (learned or recorded() or transformed() or forward_mode()):
            logdet = logdet.detach()
        self._cache.keep(self._tensors, logdet, capacitance, (value, *p.mean.tensors().values()))
        return log_prob, logdet

    def _entropy_of(self, logdet: Tensor) -> Tensor:
        p = self._parameters
        return functional.entropy_of(logdet, p.N).to(p.result_dtype).expand(self._batch_shape)

    @property
    def _tensors(self) -> list[Tensor]:
        """What the covariance is made of."""
        p = self._parameters
        return [*p.factor.tensors().values(), *p.local.tensors().values()]

    # --- Samples and conditionals ---------------------------------------------------------------------------

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        noise: tuple[Tensor, Tensor] | None = None,
        temperature: Temperature = (1.0, 1.0),
    ) -> Tensor:
        """y = μ + t_P·P ω_p + t_L·√d ⊙ ω_d, of shape `sample_shape + batch_shape + event_shape`.

        Args:
            noise: ω_p [..., R] and ω_d [..., N] to use in place of fresh noise, for interpolation and editing.
            temperature: t_P of what is global, and t_L of what is local; the distribution itself has (1, 1).
        """
        p = self._normal
        impl = p.factor.implementation(None)
        shape = checks.sizes("sample_shape", sample_shape) + self._batch_shape
        given = arguments.as_noise(noise, p, shape, impl, temperature)
        return p.local.sample(self._mean, p.factor, shape, given, impl)

    def condition(self, value: Tensor, observed: Tensor) -> "LowRankMultivariateNormal":
        """The distribution given that the pixels of the mask `observed` have the values that stand in `value`.

        It is over all N pixels: observed ones are pinned (variance 0), so that its samples are whole images. For a
        density over the rest, take the rows of its parameters at `~observed`. If P is a `LinearFactor`, the result's
        factor is one too. See `functional.condition`.
        """
        p = self._normal
        conditional = functional.condition(value, observed, self._mean.given, p.factor.given, p.local.variance())
        return LowRankMultivariateNormal(*conditional, validate_args=False)

    def mix(self, A: Tensor) -> "LowRankMultivariateNormal":
        """The distribution with the factor PA in place of P, `A` [..., R, Q]; a `LinearFactor` stays one."""
        p = self._normal
        mixed = p.factor.mix(A).given
        return LowRankMultivariateNormal(self._mean.given, mixed, p.local.variance(), validate_args=False)

    def rank(self) -> int:
        """R, the number of columns of the factor."""
        return self._parameters.factor.shape[-1]

    def factor_gram(self) -> Tensor:
        """PᵀP as float64, [..., R, R]; of a `LinearFactor` from its features."""
        return self._normal.factor.gram()

    def covariance_row(self, index: int | Tensor) -> Tensor:
        """Row `index` of Σ, P pₙ + dₙ eₙ: the covariance of every pixel with that one, `batch_shape + event_shape`."""
        p = self._normal
        n = checks.index("index", index, p.N, f"event shape [{p.N}]")
        row = p.factor.times(p.factor.row(n)).to(p.factor.dtype)
        return (row + p.local.row(n, p.N)).expand(self._batch_shape + self._event_shape)

    # --- What others read from torch's class ----------------------------------------------------------------

    @property
    def _mean(self) -> Mean:
        """The mean in the whole batch shape, in the form that joins the passes of the factor as long as it can."""
        return self._normal.mean.expands_to(self._batch_shape)

    @property
    def variance(self) -> Tensor:
        p = self._normal
        return (p.factor.row_norms() + p.local.variance()).expand(self._batch_shape + self._event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        P, d = self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag
        Sigma: Tensor = P @ P.mT + torch.diag_embed(d)
        return Sigma.expand(self._matrix_shape)

    @property
    def precision_matrix(self) -> Tensor:
        return double(self).precision_matrix.to(self._normal.result_dtype).expand(self._matrix_shape)

    @property
    def scale_tril(self) -> Tensor:
        if not self._normal.N:  # where torch's reshape finds no size
            return self.covariance_matrix
        return double(self).scale_tril.to(self._normal.result_dtype).expand(self._matrix_shape)

    @property
    def _matrix_shape(self) -> torch.Size:
        return self._batch_shape + self._event_shape + self._event_shape


def double(p: LowRankMultivariateNormal) -> TorchLowRank:
    """The same distribution as torch's class in float64, where the textbook is exact enough."""
    mean, factor, local, _ = p._normal
    # What is linear in features is made in float64, and not kept.
    loc, P = (t.materialise(torch.float64).double() for t in (mean, factor))
    loc, diag = loc.expand(p.batch_shape + p.event_shape), local.variance().expand(*local.batch_shape, factor.shape[-2])
    return TorchLowRank(loc, P, diag.double(), validate_args=False)
