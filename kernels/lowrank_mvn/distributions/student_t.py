"""`LowRankMultivariateStudentT`: heavy tails over whole images, from the q and log|Σ| of the normal."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Chi2, constraints
from torch.distributions.distribution import Distribution

from .. import arguments, checks, sharding
from ..factors.dense.factor import DenseMean
from ..factors.linear.factor import LinearFactor
from ..factors.linear.mean import LinearMean
from ..layout import broadcast, broadcasts_to
from ..registry import without_autocast
from .local import Temperature

__all__ = ["LowRankMultivariateStudentT"]

NORMAL = 1e18  # degrees of freedom from which on float64 cannot tell the t from the normal: N²/ν, q²/ν < 1e-6 nats
ASYMPTOTIC = 100.0  # from here on three terms of Stirling's series are exact in float64, and do not cancel


class LowRankMultivariateStudentT(Distribution):
    r"""
    Multivariate Student's t whose scale matrix is low-rank plus diagonal, t_ν(μ, Σ)::

        scale matrix = cov_factor @ cov_factor.T + diag(cov_diag)

    It is the normal N(μ, Σ/u) with one random u ~ χ²_ν/ν for the whole event. An image that the model explains badly
    costs (ν + N)/2·log(1 + q/ν) nats in place of q/2. Log-density and entropy come from the operators of
    :class:`LowRankMultivariateNormal`, with the same exactness and memory; `df` → ∞ is that normal.

    Example:
        >>> m = LowRankMultivariateStudentT(3.0, torch.zeros(2), torch.tensor([[1.0], [0.0]]), torch.ones(2))
        >>> m.sample().shape, m.log_prob(torch.zeros(2)).shape
        (torch.Size([2]), torch.Size([]))

    Args:
        df (Tensor or float): degrees of freedom ν > 0, with shape `batch_shape` or one that broadcasts to it; infinity
            is the normal
        loc (Tensor or LinearMean): location μ with shape `batch_shape + event_shape`
        cov_factor (Tensor or LinearFactor): factor P of the scale matrix with shape
            `batch_shape + event_shape + (rank,)`, as of the normal
        cov_diag (Tensor or float): diagonal D of the scale matrix with shape `batch_shape + event_shape`, or one value
            for all pixels, as of the normal
        validate_args (bool, optional): whether to check values as well as shapes

    Raises:
        ValueError: a shape that does not fit, R = 0, different devices, or (under `validate_args`) a `df` or `cov_diag`
            that is not positive, or values that are not finite.
        TypeError: an argument that is not a floating-point tensor, or dtypes that differ; `df` may have another dtype.

    The covariance is ν/(ν − 2)·Σ. Functions of ν are computed in float64.
    """

    arg_constraints = {  # noqa: RUF012  (torch's class attribute, of torch's form)
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "cov_factor": constraints.independent(constraints.real, 2),
        "cov_diag": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        df: Tensor | float,
        loc: Tensor | LinearMean,
        cov_factor: Tensor | LinearFactor,
        cov_diag: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        self._parameters = p = arguments.normal(loc, cov_factor, cov_diag)
        self._df = _degrees_of_freedom(df, p)
        shape = broadcast(p.batch_shape, self._df.shape, names="df and of loc, cov_factor and cov_diag")
        Distribution.__init__(self, shape, torch.Size((p.N,)), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            tensors = {**arguments.named(loc=p.mean, cov_factor=p.factor), **p.local.tensors()}
            checks.finite(self, tensors.items(), "cov_diag", self.arg_constraints["cov_diag"])
            self._check_positive()

    def _check_positive(self) -> None:
        held = sharding.local(self._df.detach())
        if checks.have_values(held) and not torch._is_all_true(held > 0):
            raise ValueError(
                f"Expected parameter df (Tensor of shape {tuple(self._df.shape)}) of distribution {self!r} to satisfy"
                f" the constraint {self.arg_constraints['df']!r}, but found values that are not positive"
            )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankMultivariateStudentT":
        new: LowRankMultivariateStudentT = self._get_checked_instance(  # type: ignore[no-untyped-call]
            LowRankMultivariateStudentT, _instance
        )
        new._parameters, new._df = self._parameters, self._df
        shape = checks.expansion(batch_shape, self._batch_shape)
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        shape, R = self._batch_shape + self._event_shape, self.rank()
        parts = f"df: {self._batch_shape}, loc: {shape}, cov_factor: {torch.Size((*shape, R))}, cov_diag: {shape}"
        return f"{type(self).__name__}({parts})"

    # --- Parameters -------------------------------------------------------------------------------------------

    @property
    def df(self) -> Tensor:
        """ν, `batch_shape`."""
        return self._df.expand(self._batch_shape)

    @property
    def loc(self) -> Tensor:
        """μ, `batch_shape + event_shape`."""
        return self._parameters.mean.materialise().expand(self._batch_shape + self._event_shape)

    @property
    def cov_factor(self) -> Tensor:
        """P of the scale matrix, made where it is linear in features."""
        P = self._parameters.factor.materialise()
        return P.expand(self._batch_shape + P.shape[-2:])

    @property
    def cov_diag(self) -> Tensor:
        """Diagonal of D of the scale matrix, `batch_shape + event_shape`."""
        return self._parameters.local.variance().expand(self._batch_shape + self._event_shape)

    def rank(self) -> int:
        """R, the number of columns of the factor."""
        return self._parameters.factor.shape[-1]

    def factor_gram(self) -> Tensor:
        """PᵀP as float64, [..., R, R]; of a `LinearFactor` from its features."""
        return self._parameters.factor.gram()

    def mix(self, A: Tensor) -> "LowRankMultivariateStudentT":
        """The distribution with the factor PA in place of P, `A` [..., R, Q]; a `LinearFactor` stays one."""
        p = self._parameters
        mixed = p.factor.mix(A).given
        return LowRankMultivariateStudentT(self.df, p.mean.given, mixed, p.local.variance(), validate_args=False)

    # --- Densities --------------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of shape `sample_shape + batch_shape`."""
        return self._density(value)[0]

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape `batch_shape`."""
        p = self._parameters
        return self._entropy_of(p.local.logdet(p.factor, p.factor.implementation(None))[0])

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob(value)` and `entropy()` from one capacitance matrix, with one backward pass for both."""
        log_prob, logdet = self._density(value)
        return log_prob, self._entropy_of(logdet)

    def _density(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """log p = −½(N log 2π + log|Σ|) + Δ − (a + n) log(1 + q/2a) with a = ν/2 and n = N/2; and log|Σ|."""
        p = self._parameters
        value = arguments.as_value(value, p._replace(batch_shape=self._batch_shape), self)
        q, logdet, _ = p.local.density(value, p.mean, p.factor, p.factor.implementation(None))
        a, n = self._half_df(), p.N / 2
        tail = log_gamma_ratio(a, n) - (a + n) * torch.log1p(q / (2 * a))
        log_prob = tail - 0.5 * (p.N * math.log(2 * math.pi) + logdet)
        shape = broadcast(value.shape[:-1], self._batch_shape)
        return log_prob.to(p.result_dtype).expand(shape), logdet

    def _entropy_of(self, logdet: Tensor) -> Tensor:
        """H = ½(N log 2π + log|Σ|) − Δ + (a + n)(ψ(a + n) − ψ(a))."""
        p, a, n = self._parameters, self._half_df(), self._parameters.N / 2
        spread = (a + n) * digamma_difference(a, n) - log_gamma_ratio(a, n)
        entropy = 0.5 * (p.N * math.log(2 * math.pi) + logdet) + spread
        return entropy.to(p.result_dtype).expand(self._batch_shape)

    def _half_df(self) -> Tensor:
        return 0.5 * self._df.double().clamp(max=NORMAL)

    # --- Samples and conditionals -----------------------------------------------------------------------------

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        noise: tuple[Tensor, Tensor] | None = None,
        u: Tensor | None = None,
        temperature: Temperature = (1.0, 1.0),
    ) -> Tensor:
        """y = μ + (t_P·P ω_p + t_L·√d ⊙ ω_d)/√u, of shape `sample_shape + batch_shape + event_shape`.

        `df` has a gradient too.

        Args:
            noise: ω_p [..., R] and ω_d [..., N] to use in place of fresh noise, for interpolation and editing.
            u: χ²_ν/ν [...] that broadcasts to `sample_shape + batch_shape`. By default it is drawn; with given noise
                it is 1, its mean, so that the sample is a function of the noise.
            temperature: t_P of what is global, and t_L of what is local; the distribution itself has (1, 1).
        """
        p, dtype = self._parameters, self._parameters.result_dtype
        impl, shape = p.factor.implementation(None), checks.sizes("sample_shape", sample_shape) + self._batch_shape
        given = arguments.as_noise(noise, p, shape, impl, temperature)
        if u is None:
            u = self._df.new_ones(()) if noise is not None else self._mixing(shape)
        elif not broadcasts_to(checks.floating("u", u).shape, shape):
            raise ValueError(f"u has shape {list(u.shape)}, expected one that broadcasts to {list(shape)}")
        zero = torch.zeros(1, dtype=dtype, device=p.mean.device).expand(p.N)
        mean = DenseMean(sharding.beside(zero, *p.factor.tensors().values()))
        deviation = p.local.sample(mean, p.factor, shape, given, impl).to(dtype)
        scale = u.clamp_min(torch.finfo(dtype).tiny).rsqrt().to(dtype).expand(shape).unsqueeze(-1)
        with without_autocast(p.mean.device):
            y = torch.addcmul(p.mean.materialise(dtype).to(dtype), scale, deviation)
        return y.to(p.mean.dtype)

    def _mixing(self, shape: torch.Size) -> Tensor:
        """u ~ χ²_ν/ν of that shape, in float64; every process of distributed tensors draws all of it, from one seed."""
        df = 2 * sharding.whole(self._half_df()).expand(shape)
        return sharding.beside(Chi2(df, validate_args=False).rsample() / df, self._df)

    def condition(self, value: Tensor, observed: Tensor) -> "LowRankMultivariateStudentT":
        """The distribution given that the pixels of the mask `observed` have the values that stand in `value`.

        Given M pixels with the Mahalanobis distance q₂ it is t with ν + M degrees of freedom, the normal's conditional
        mean, and (ν + q₂)/(ν + M) times the normal's conditional covariance as its scale matrix. q₂ is q of the
        conditional mean, because q(x) = q₂ + q(x₁ | x₂) and the second term is zero there. Over all N pixels, as the
        normal's: observed ones are pinned.
        """
        p = self._parameters
        value, observed = arguments.as_value(value, p), arguments.as_observed(observed, p)
        names = "value, observed and the parameters"
        shape = broadcast(value.shape[:-1], observed.shape[:-1], self._batch_shape, names=names)
        impl = p.factor.implementation(None)
        loc, factor, local = p.local.condition(value, observed, p.mean, p.factor, shape, impl)
        q, _, _ = p.local.density(loc, p.mean, p.factor, impl)
        df, count = 2 * self._half_df(), observed.sum(-1)
        scale = (df + q) / (df + count)
        d = local.variance()
        identity = torch.eye(self.rank(), dtype=torch.float64, device=p.factor.device)
        identity = sharding.beside(identity, *p.factor.tensors().values())
        mixed = factor.mix(scale.sqrt()[..., None, None] * identity).given
        diag = (scale.unsqueeze(-1) * d).to(d.dtype)
        df = (df + count).to(torch.promote_types(self._df.dtype, p.result_dtype))
        return LowRankMultivariateStudentT(df, loc, mixed, diag, validate_args=False)

    # --- Moments ----------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """μ where ν > 1; undefined, NaN, elsewhere."""
        return torch.where((self.df > 1).unsqueeze(-1), self.loc, torch.nan)

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """ν/(ν − 2)·diag Σ where ν > 2, infinite where 1 < ν ≤ 2, undefined (NaN) elsewhere."""
        p = self._parameters
        undefined = torch.where(self.df > 1, torch.inf, torch.nan).unsqueeze(-1).to(p.result_dtype)
        variance = self._widening().unsqueeze(-1) * (p.factor.row_norms() + p.local.variance())
        variance = torch.where((self.df > 2).unsqueeze(-1), variance, undefined)
        return variance.to(p.mean.dtype).expand(self._batch_shape + self._event_shape)

    def covariance_row(self, index: int | Tensor) -> Tensor:
        """Row `index` of the covariance ν/(ν − 2)·Σ, `batch_shape + event_shape`; NaN where ν ≤ 2 and it has none."""
        p = self._parameters
        n = checks.index("index", index, p.N, f"event shape [{p.N}]")
        row = p.factor.times(p.factor.row(n)).to(p.factor.dtype) + p.local.row(n, p.N)
        row = (torch.where(self.df > 2, self._widening(), torch.nan).unsqueeze(-1) * row).to(p.mean.dtype)
        return row.expand(self._batch_shape + self._event_shape)

    def _widening(self) -> Tensor:
        """ν/(ν − 2) for ν > 2; the callers replace the 1 that stands elsewhere."""
        df = 2 * self._half_df().expand(self._batch_shape)
        return torch.where(df > 2, df / torch.where(df > 2, df - 2, 1), 1).to(self._parameters.result_dtype)


def _degrees_of_freedom(df: Tensor | float, parameters: arguments.Normal) -> Tensor:
    device = parameters.mean.device
    if isinstance(df, int | float | numbers.Real):
        number = checks.number("df", df, parameters.result_dtype, device)[0]
        return sharding.beside(number, *parameters.factor.tensors().values())
    checks.floating("df", df, checks.NUMBER_OR_TENSOR)
    if df.device != device:
        raise ValueError(f"df is on {df.device}, loc on {device}; expected one device")
    return df


def log_gamma_ratio(a: Tensor, n: float) -> Tensor:
    """Δ = log Γ(a + n) − log Γ(a) − n log a, which goes to 0 as `a` grows; float64.

    For large `a` by Stirling's series, because the logarithms of Γ cancel.
    """
    near, far = a.clamp(max=ASYMPTOTIC), a.clamp(min=ASYMPTOTIC)
    direct = torch.lgamma(near + n) - torch.lgamma(near) - n * near.log()

    def remainder(x: Tensor) -> Tensor:
        return 1 / (12 * x) - 1 / (360 * x**3) + 1 / (1260 * x**5)

    series = (far + (n - 0.5)) * torch.log1p(n / far) - n + (remainder(far + n) - remainder(far))
    return torch.where(a > ASYMPTOTIC, series, direct)


def digamma_difference(a: Tensor, n: float) -> Tensor:
    """ψ(a + n) − ψ(a), float64; for large `a` by the series, for the same reason."""
    near, far = a.clamp(max=ASYMPTOTIC), a.clamp(min=ASYMPTOTIC)
    direct = torch.digamma(near + n) - torch.digamma(near)

    def remainder(x: Tensor) -> Tensor:
        return -1 / (12 * x**2) + 1 / (120 * x**4) - 1 / (252 * x**6)

    series = torch.log1p(n / far) + n / (2 * far * (far + n)) + (remainder(far + n) - remainder(far))
    return torch.where(a > ASYMPTOTIC, series, direct)
