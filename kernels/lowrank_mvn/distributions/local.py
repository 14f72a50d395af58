"""What distributions have in common whose local part is a sparse precision."""

import math
from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.distribution import Distribution

from .. import arguments, checks
from ..layout import broadcast
from ..local.precision import Precision

Temperature = tuple[float, float]


class LocalDistribution(Distribution):
    """N(μ, D), or N(μ, PPᵀ + D), with D⁻¹ = TTᵀ; events are flat, [N]."""

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012  (torch's class attribute, of torch's form)
    support = constraints.real_vector
    has_rsample = True

    _parameters: Any  # arguments.Normal or arguments.LocalNormal

    def _begin(self, parameters: Any, validate_args: bool | None) -> None:
        self._parameters = parameters
        Distribution.__init__(self, parameters.batch_shape, torch.Size((parameters.N,)), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            checks.finite(self, self._tensors().items())

    def _tensors(self) -> dict[str, Tensor]:
        p = self._parameters
        own = {f"stencil.{name}": t for name, t in self.stencil.tensors().items()}
        return {**arguments.named(loc=p.mean), **own}

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        new: Self = self._get_checked_instance(type(self), _instance)  # type: ignore[no-untyped-call]
        new._parameters = self._parameters
        shape = checks.expansion(batch_shape, self._batch_shape)
        Distribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        shape = self._batch_shape + self._event_shape
        names = ", ".join(f"{name}: {t.shape}" for name, t in self._tensors().items() if name != "loc")
        return f"{type(self).__name__}(loc: {shape}, {names})"

    # --- Densities ------------------------------------------------------------------------------------------

    @abstractmethod
    def _density(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """q and log|Σ|, float64."""

    @abstractmethod
    def _logdet(self) -> Tensor: ...

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats, of shape `sample_shape + batch_shape`."""
        return self.log_prob_and_entropy(value)[0]

    def entropy(self) -> Tensor:
        """Entropy in nats, of shape `batch_shape`."""
        return self._entropy_of(self._logdet())

    def log_prob_and_entropy(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob(value)` and `entropy()` from one pass, with one backward pass for both."""
        p = self._parameters._replace(batch_shape=self._batch_shape)
        value = arguments.as_value(value, p, self)
        q, logdet = self._density(value)
        shape = broadcast(value.shape[:-1], self._batch_shape)
        log_prob = -0.5 * (self.stencil.free() * math.log(2 * math.pi) + logdet + q.expand(shape))
        return log_prob.to(p.result_dtype), self._entropy_of(logdet)

    def _entropy_of(self, logdet: Tensor) -> Tensor:
        entropy = 0.5 * (self.stencil.free() * (1 + math.log(2 * math.pi)) + logdet)
        return entropy.to(self._parameters.result_dtype).expand(self._batch_shape)

    # --- What can be read off ---------------------------------------------------------------------------------

    def _observed(self, value: Tensor, observed: Tensor, variance: Tensor | float | None) -> tuple[Any, ...]:
        """value, mask, τ² and the shape of all, checked."""
        p = self._parameters
        value, observed = arguments.as_value(value, p), arguments.as_observed(observed, p)
        noise = arguments.as_noise_variance(variance, p)
        shapes = [value.shape[:-1], observed.shape[:-1], self._batch_shape]
        shapes += [] if noise is None else [noise.shape[:-1]]
        return value, observed, noise, broadcast(*shapes, names="value, observed, variance and the parameters")

    def _index(self, index: int | Tensor) -> int:
        N = self._event_shape.numel()
        return checks.index("index", index, N, f"event shape [{N}]")

    @property
    def stencil(self) -> Precision:
        local: Precision = self._parameters.local
        return local

    @property
    def loc(self) -> Tensor:
        loc: Tensor = self._parameters.mean.materialise()
        return loc.expand(self._batch_shape + self._event_shape)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @abstractmethod
    def covariance_row(self, index: int | Tensor) -> Tensor: ...
