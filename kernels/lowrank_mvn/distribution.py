"""`LowRankMultivariateNormal`: a drop-in for torch's class of that name, faster and more exact."""

import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.distribution import Distribution
from torch.distributions.kl import kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from . import functional, ops, reference
from .functional import Capacitance
from .linear import LinearFactor, LinearMean

__all__ = ["LowRankMultivariateNormal"]


class LowRankMultivariateNormal(td.LowRankMultivariateNormal):
    r"""
    Multivariate normal whose covariance matrix is low-rank plus diagonal, N(μ, PPᵀ + D)::

        covariance_matrix = cov_factor @ cov_factor.T + diag(cov_diag)

    A drop-in for :class:`torch.distributions.LowRankMultivariateNormal`: same arguments, properties, sample shapes,
    errors and, on the CPU, the same samples from the same seed. The log-density is that of the residual form (exact
    in float32 where torch's is off by thousands of nats), nothing of the size of `cov_factor` is allocated but its
    gradient, and nothing is factorised before it is needed. Tensors on a GPU go through Triton kernels, whose samples
    come from another stream of noise than torch's (the same seed gives the same sample there too).

    Example:
        >>> m = LowRankMultivariateNormal(torch.zeros(2), torch.tensor([[1.0], [0.0]]), torch.ones(2))
        >>> m.sample().shape  # normally distributed with mean=`[0,0]`, cov_factor=`[[1],[0]]`, cov_diag=`[1,1]`
        torch.Size([2])
        >>> log_prob, entropy = m.log_prob_and_entropy(torch.zeros(2))

    Args:
        loc (Tensor or LinearMean): mean μ of the distribution with shape `batch_shape + event_shape`
        cov_factor (Tensor or LinearFactor): low-rank factor P with shape `batch_shape + event_shape + (rank,)`, any
            strides; a `LinearFactor` of features is materialised only when somebody reads `cov_factor`, a matrix over
            all pixels, or a KL divergence
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

    def __init__(
        self,
        loc: Tensor | LinearMean,
        cov_factor: Tensor | LinearFactor,
        cov_diag: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        d = functional.as_diag(cov_diag, cov_factor)
        functional.check_tensors(**functional.parts(loc=loc, cov_factor=cov_factor), cov_diag=d)
        batch_shape = functional.check_shapes(None, loc, cov_factor, d)
        event_shape = cov_factor.shape[-2:-1]
        # As given: nothing below works on an expanded copy.
        self._loc, self._P, self._d = loc, cov_factor, d
        if isinstance(loc, Tensor):
            self.loc = loc.expand(batch_shape + event_shape)
        if isinstance(cov_factor, Tensor):
            self.cov_factor = cov_factor.expand(batch_shape + cov_factor.shape[-2:])
            self._unbroadcasted_cov_factor = cov_factor
        self.cov_diag = d.expand(batch_shape + event_shape)
        self._unbroadcasted_cov_diag = d.expand(d.shape[:-1] + event_shape)
        self._memory = _Memory()
        # Not torch's own constructor, which factorises the capacitance matrix; torch's constraints fail on nothing.
        empty = 0 in batch_shape
        Distribution.__init__(self, batch_shape, event_shape, validate_args=False if empty else validate_args)
        if empty:
            self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        elif self._validate_args:
            for name, t in functional.parts(loc=loc, cov_factor=cov_factor, cov_diag=d).items():
                # By way of the extremes, which take no memory: P, or the features, may be most of what there is.
                if t.numel() and not torch._is_all_true(torch.isfinite(torch.stack(torch.aminmax(t.detach())))):
                    raise ValueError(f"{name} of shape {list(t.shape)} has values that are not finite")

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(LowRankMultivariateNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        if isinstance(self._loc, Tensor):
            new.loc = self.loc.expand(batch_shape + self.event_shape)
        if isinstance(self._P, Tensor):
            new.cov_factor = self.cov_factor.expand(batch_shape + self._P.shape[-2:])
            new._unbroadcasted_cov_factor = self._P
        new.cov_diag = self.cov_diag.expand(batch_shape + self.event_shape)
        for name in ("_unbroadcasted_cov_diag", "_loc", "_P", "_d", "_memory"):
            setattr(new, name, getattr(self, name))
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    # Attributes of an instance unless they are linear maps of features, which are made when somebody asks.

    @lazy_property
    def loc(self) -> Tensor:
        return functional.materialised(self._loc).expand(self._batch_shape + self._event_shape)

    @lazy_property
    def cov_factor(self) -> Tensor:
        return self._unbroadcasted_cov_factor.expand(self._batch_shape + self._P.shape[-2:])

    def __repr__(self) -> str:
        """As torch's, and of what is linear in features the shape, without making it."""
        shape = self._batch_shape + self._event_shape
        shapes = {"loc": shape, "cov_factor": self._batch_shape + self._P.shape[-2:], "cov_diag": shape}
        made = {name: self.__dict__.get(name) for name in shapes}
        values = (f"{n}: {shapes[n] if t is None or t.numel() != 1 else t}" for n, t in made.items())
        return f"{type(self).__name__}({', '.join(values)})"

    @property
    def _mean(self) -> Tensor | LinearMean:
        """The mean in the whole batch shape, a `LinearMean` as long as it has that."""
        linear = isinstance(self._loc, LinearMean) and self._loc.shape[:-1] == self._batch_shape
        return self._loc if linear else self.loc

    @lazy_property
    def _unbroadcasted_cov_factor(self) -> Tensor:
        return functional.materialised(self._P)

    def __getstate__(self):
        return {**self.__dict__, "_memory": _Memory()}

    # --- Densities ------------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of shape `sample_shape + batch_shape`; `entropy` then costs nothing more."""
        q, logdet = self._mahalanobis_and_logdet(value)
        return functional.log_density(q, logdet, self._event_shape[0]).to(self._result_dtype)

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape `batch_shape`.

        After `log_prob` it costs nothing: both then come from one node, with one backward pass. Asked for first, it
        leaves the capacitance of a factor that is a tensor to `log_prob`, whose backward pass is then another one.
        """
        logdet = self._memory.logdet()
        if logdet is None:
            impl = functional.check_impl(None, self._P)
            logdet, capacitance = functional.logdet_alone(self._P, self._d, impl)
            self._remember(logdet, capacitance)
        return functional._entropy(logdet, self._event_shape[0]).to(self._result_dtype).expand(self._batch_shape)

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob(value)` and `entropy()` from one capacitance matrix, with one backward pass for both."""
        log_prob = self.log_prob(value)
        return log_prob, self.entropy()

    def _mahalanobis_and_logdet(self, value: Tensor) -> tuple[Tensor, Tensor]:
        value = functional.as_value(value, self._loc)
        if self._validate_args and value.numel():
            self._validate_sample(value)
        functional.check_tensors(**functional.parts(loc=self._loc), value=value)
        functional.check_shapes(value, self._loc, self._P, self._d)
        P, d = self._P, self._d
        impl, given = functional.check_impl(None, P), self._memory.capacitance()
        q, logdet, capacitance = functional.mahalanobis_and_logdet(value, self._loc, P, d, impl, given)
        self._remember(logdet, capacitance)
        return q.expand(functional.broadcast(value.shape[:-1], self._batch_shape)), logdet

    def _remember(self, logdet: Tensor, capacitance: Capacitance | None) -> None:
        # The joint node also hangs on the value and the mean: without a gradient for P or d the entropy must not.
        learned = self._P.requires_grad or self._d.requires_grad or torch.jit.is_tracing()
        self._memory.keep(logdet if learned else logdet.detach(), capacitance)

    @property
    def _result_dtype(self) -> torch.dtype:
        return functional.result_dtype(self._loc, self._P, self._d)

    # --- Samples and conditionals ---------------------------------------------------------------------------

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        *,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """y = μ + P ω_p + √d ⊙ ω_d, of shape `sample_shape + batch_shape + event_shape`.

        Args:
            noise: ω_p [..., R] and ω_d [..., N] to use in place of fresh noise, for interpolation and editing.
        """
        return functional.rsample(self._mean, self._P, self._d, torch.Size(sample_shape), noise=noise)

    def condition(self, value: Tensor, observed: Tensor) -> "LowRankMultivariateNormal":
        """The distribution given that the pixels of the mask `observed` have the values that stand in `value`.

        It is over all N pixels: observed ones are pinned (variance 0), so that its samples are whole images. For a
        density over the rest, take the rows of its parameters at `~observed`. A `LinearFactor` stays one. See
        `functional.condition`.
        """
        conditional = functional.condition(value, observed, self._mean, self._P, self._d)
        return LowRankMultivariateNormal(*conditional, validate_args=False)

    def mix(self, A: Tensor) -> "LowRankMultivariateNormal":
        """The distribution with the factor PA in place of P, `A` [..., R, Q]; a `LinearFactor` stays one."""
        P = self._P.mix(A) if isinstance(self._P, LinearFactor) else self._P @ A.to(self._P.dtype)
        return LowRankMultivariateNormal(self._mean, P, self._d, validate_args=False)

    @property
    def factor_gram(self) -> Tensor:
        """PᵀP as float64, [..., R, R], from products in the dtype of P; of a `LinearFactor`, of its features."""
        P = self._P
        return P.gram() if isinstance(P, LinearFactor) else (P.mT @ P).double()

    def covariance_row(self, index: int | Tensor) -> Tensor:
        """Row `index` of Σ, P pₙ + dₙ eₙ: the covariance of every pixel with that one, `batch_shape + event_shape`."""
        N = self._event_shape[0]
        n = int(index)
        if not -N <= n < N:
            raise ValueError(f"index {n} is out of range for event shape [{N}]")
        P = self._P
        if isinstance(P, LinearFactor):
            row = P.times(P.row(n)).to(P.dtype)
        else:
            row = (P @ P[..., n, :].unsqueeze(-1)).squeeze(-1)
        pixel = torch.zeros(N, dtype=row.dtype, device=row.device)
        pixel[n] = 1
        return (row + self._unbroadcasted_cov_diag[..., n, None] * pixel).expand(torch.Size((*self._batch_shape, N)))

    # --- What others read from torch's class ----------------------------------------------------------------

    @lazy_property
    def _capacitance_tril(self) -> Tensor:
        """Cholesky factor of C = I + PᵀD⁻¹P, differentiable; made in float64 when somebody asks for it."""
        with ops.without_autocast(self.loc.device):
            P = functional.materialised(self._P, torch.float64).double()
            C = reference.capacitance(P, self._d.double().reciprocal())
            return torch.linalg.cholesky(C).to(self._result_dtype)

    @lazy_property
    def variance(self) -> Tensor:
        P = self._P
        norms = P.row_norms() if isinstance(P, LinearFactor) else P.square().sum(-1)
        return (norms + self._unbroadcasted_cov_diag).expand(self._batch_shape + self._event_shape)

    @lazy_property
    def precision_matrix(self) -> Tensor:
        return _double(self).precision_matrix.to(self._result_dtype).expand(self._matrix_shape)

    @lazy_property
    def scale_tril(self) -> Tensor:
        return _double(self).scale_tril.to(self._result_dtype).expand(self._matrix_shape)

    @property
    def rank(self) -> int:
        """R, the number of columns of the factor."""
        return self._P.shape[-1]

    @property
    def _matrix_shape(self) -> torch.Size:
        return self._batch_shape + self._event_shape + self._event_shape


class _Memory:
    """What `log_prob` leaves for the calls after it: the capacitance, and the log-determinant of the joint node.

    The node is kept for the grad mode it was made in, and nothing inside a transform of `torch.func`, whose tensors
    must not outlive it.
    """

    def __init__(self) -> None:
        self._mode: tuple[bool, bool] | None = None
        self._logdet: Tensor | None = None
        self._capacitance: Capacitance | None = None

    def keep(self, logdet: Tensor, capacitance: Capacitance | None) -> None:
        if not ops.transformed() and not functional.forward_mode():
            self._mode, self._logdet, self._capacitance = _grad_mode(), logdet, capacitance

    def logdet(self) -> Tensor | None:
        unusable = self._mode != _grad_mode() or ops.transformed() or functional.forward_mode()
        return None if unusable else self._logdet

    def capacitance(self) -> Capacitance | None:
        """Constants to autograd, so that only tensors made in inference mode are tied to the mode."""
        tied = self._mode == (False, True) != _grad_mode()
        return None if tied or ops.transformed() else self._capacitance


def _grad_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


# --- Kullback–Leibler divergence: torch's formulas, in float64 ----------------------------------------------------


def _kl(p, q) -> Tensor:
    means = (d._loc if isinstance(d, LowRankMultivariateNormal) else d.loc for d in (p, q))
    dtype = torch.promote_types(*map(functional.result_dtype, means))
    return kl_divergence(_double(p), _double(q)).to(dtype)


def _double(p):
    """The same distribution as torch's class in float64, where the textbook is exact enough."""
    if isinstance(p, LowRankMultivariateNormal):  # what is linear in features is made in float64, and not kept
        loc, factor = (functional.materialised(t, torch.float64).double() for t in (p._loc, p._P))
        loc, diag = loc.expand(p.batch_shape + p.event_shape), p._unbroadcasted_cov_diag.double()
        return td.LowRankMultivariateNormal(loc, factor, diag, validate_args=False)
    if isinstance(p, td.LowRankMultivariateNormal):
        factor, diag = p._unbroadcasted_cov_factor, p._unbroadcasted_cov_diag
        return td.LowRankMultivariateNormal(p.loc.double(), factor.double(), diag.double(), validate_args=False)
    return td.MultivariateNormal(p.loc.double(), scale_tril=p._unbroadcasted_scale_tril.double(), validate_args=False)


for _other in (LowRankMultivariateNormal, td.LowRankMultivariateNormal, td.MultivariateNormal):
    register_kl(LowRankMultivariateNormal, _other)(_kl)
    if _other is not LowRankMultivariateNormal:
        register_kl(_other, LowRankMultivariateNormal)(_kl)
