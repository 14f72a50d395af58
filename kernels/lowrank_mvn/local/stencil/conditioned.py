"""What is left of a stencil when values are known: the precision TTᵀ + M, in which exactly known pixels are pinned."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...capacitance import posterior
from ...factors.base import Factor, Mean
from ...factors.dense.factor import DenseFactor
from ...layout import Layout, broadcast
from ...state import state_of
from ..precision import Precision
from .banded import Banded

if TYPE_CHECKING:
    from .stencil import Stencil


class Conditioned(Precision):
    """(TTᵀ + M)⁻¹ over the pixels that are not pinned, 0 at those that are; in float64, by a Cholesky factorisation.

    Args:
        stencil: T.
        weight: the diagonal of M, 1/τ² where a value is known up to a variance τ², [..., N].
        pinned: bool, [..., N].
    """

    shared = False

    def __init__(self, stencil: "Stencil", weight: Tensor, pinned: Tensor) -> None:
        self.stencil, self.weight, self.pinned = stencil, weight, pinned
        self.channels, self.spatial = stencil.channels, stencil.spatial
        self.batch_shape = broadcast(stencil.batch_shape, weight.shape[:-1], pinned.shape[:-1])
        self.dtype, self.device = stencil.dtype, stencil.device
        self._kept: tuple[Any, Banded] | None = None  # the factorisation, and of what it is

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.stencil.requires_grad or self.weight.requires_grad

    def tensors(self) -> dict[str, Tensor]:
        return self.stencil.tensors()

    def free(self) -> Tensor:
        return (~self.pinned).sum(-1, dtype=torch.float64).expand(self.batch_shape)

    @property
    def _layout(self) -> Layout:
        return Layout(self.batch_shape, self.batch_shape)

    @property
    def _factor(self) -> Banded:
        """Factorised once where nothing is to be differentiated (a graph serves one backward pass), and again when a
        weight has moved."""
        if self.requires_grad and torch.is_grad_enabled():
            return self._factorised()
        state = state_of([*self.tensors().values(), self.weight, self.pinned])
        now = None if state is None else (state, torch.is_inference_mode_enabled())
        if self._kept is None or now is None or self._kept[0] != now:
            with torch.no_grad():
                self._kept = now, self._factorised()
        return self._kept[1]

    def _factorised(self) -> Banded:
        layout, root = self._layout, self.stencil.banded(self.batch_shape)
        return root.plus(layout.samples(self.weight.double()), layout.samples(~self.pinned))

    def given(self, weight: Tensor, pinned: Tensor) -> "Conditioned":
        return Conditioned(self.stencil, self.weight + weight, self.pinned | pinned)

    def condition(
        self,
        value: Tensor,
        observed: Tensor,
        mean: Mean,
        factor: Factor,
        shape: torch.Size,
        impl: str,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Factor, Precision]:
        return condition(self, self.stencil, value, observed, noise, mean, factor, shape)

    # --- Products and solves --------------------------------------------------------------------------------------

    def own(self, value: Tensor, loc: Tensor | None, impl: str) -> tuple[Tensor, Tensor, Tensor]:
        delta = self._masked(value.double() if loc is None else value.double() - loc.double())
        layout = Layout(broadcast(delta.shape[:-1], self.batch_shape), self.batch_shape)
        y = layout.restore(self._factor.times(layout.samples(delta)))
        return y, y.square().sum(-1), self.own_logdet()

    def own_logdet(self) -> Tensor:
        return self._factor.logdet().reshape(self.batch_shape)

    def colour(self, omega: Tensor, impl: str) -> Tensor:
        return self._solve(omega, False)

    def uncolour(self, value: Tensor) -> Tensor:
        return self._solve(self._masked(value), True)

    def covariance_times(self, value: Tensor) -> Tensor:
        """(TTᵀ + M)⁻¹ · value [..., N]."""
        return self.colour(self.uncolour(value), "aten")

    def double(self) -> "Conditioned":
        return Conditioned(self.stencil.double(), self.weight, self.pinned)

    def variance(self) -> Tensor:
        variance = self._factor.variance().reshape(*self.batch_shape, self.N)
        return self._masked(variance).to(self.dtype)

    def _solve(self, value: Tensor, transposed: bool) -> Tensor:
        layout = Layout(broadcast(value.shape[:-1], self.batch_shape), self.batch_shape)
        return self._masked(layout.restore(self._factor.solve(layout.samples(value.double()), transposed)))

    def _masked(self, t: Tensor) -> Tensor:
        return torch.where(self.pinned, t.new_zeros(()), t)


def known(observed: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonal of M of observed pixels with variance τ² = `noise`, and the mask of those without (τ = 0)."""
    if noise is None:
        return torch.zeros(observed.shape[-1], dtype=torch.float64, device=observed.device), observed
    soft = observed & (noise > 0)
    weight = torch.where(soft, noise.double(), torch.ones((), dtype=torch.float64, device=noise.device)).reciprocal()
    return weight * soft, observed & ~soft


def fill(after: Conditioned, weight: Tensor, pinned: Tensor, delta: Tensor) -> Tensor:
    """The local deviation [..., N] that follows from the deviations `delta` of what is newly known, float64.

    (Λ + M)⁻¹Mδ; where M → ∞, δ itself, and with it −Λᵤᵤ⁻¹Λᵤₒδₒ at the other pixels.
    """
    delta = delta.double()
    right = weight * delta
    if pinned.any():
        right = right - after.stencil.double().precision_times(torch.where(pinned, delta, delta.new_zeros(())))
    return torch.where(pinned, delta, after.covariance_times(right))


def condition(
    prior: Precision,
    stencil: "Stencil",
    value: Tensor,
    observed: Tensor,
    noise: Tensor | None,
    mean: Mean,
    factor: Factor,
    shape: torch.Size,
) -> tuple[Tensor, Factor, Precision]:
    """Mean, factor and local part given the values at observed pixels, by R + 1 solves.

    With fill K of `fill`, A = KP and f = K(b − μ): C₂ = I + AᵀΛA + (P − A)ᵀM(P − A) = L₂L₂ᵀ is a sum of squares, also
    where M → ∞; ω̂ = C₂⁻¹(AᵀΛf + (P − A)ᵀM(b − μ − f)), the mean is μ + f + (P − A)ω̂ and the factor (P − A)L₂⁻ᵀ.
    """
    dtype = torch.promote_types(mean.dtype, factor.dtype)
    weight, pinned = known(observed, noise)
    after = prior.given(weight, pinned)
    loc, P = (t.materialise(torch.float64).double() for t in (mean, factor))
    delta = torch.where(observed, value.double() - loc, torch.zeros((), dtype=torch.float64, device=loc.device))
    P = P.movedim(-1, 0)  # [R, ..., N]
    A, f = fill(after, weight, pinned, P), fill(after, weight, pinned, delta)
    rest = P - A
    wide = prior.double()
    left, right = wide.whiten(A, "aten"), wide.whiten(f, "aten")
    gram = torch.einsum("r...n,q...n->...rq", left, left)
    gram = gram + torch.einsum("r...n,q...n->...rq", rest * weight, rest)
    w = torch.einsum("r...n,...n->...r", left, right)
    w = w + torch.einsum("r...n,...n->...r", rest * weight, delta - f)
    batch = broadcast(gram.shape[:-2], w.shape[:-1])
    L_inv_t, v = posterior(gram.expand(*batch, *gram.shape[-2:]), w.unsqueeze(-1).expand(*batch, -1, 1))
    loc = loc + f + torch.einsum("r...n,...r->...n", rest, v.squeeze(-1))
    made = torch.einsum("r...n,...rq->...qn", rest, L_inv_t).mT
    loc = torch.where(pinned, value.double(), loc)
    return loc.to(dtype).expand(*shape, -1), DenseFactor(made.to(dtype)), after
