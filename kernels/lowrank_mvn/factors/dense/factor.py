"""A factor, and a mean, that is a tensor."""

from typing import Self

import torch
from torch import Tensor

from ... import checks, reference
from ...capacitance import fixed, posterior
from ...layout import Layout, broadcast
from ...registry import decomposed, without_autocast
from ..base import Capacitance, Factor, Mean, Noise, Operand, Root, result_dtype
from . import op, op_sampling


class _Dense(Operand):
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def given(self) -> Tensor:
        return self.tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.tensor}

    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor


class DenseMean(_Dense, Mean):
    """μ [..., N] as a tensor."""

    def expands_to(self, batch_shape: torch.Size) -> "DenseMean":
        return DenseMean(self.tensor.expand(batch_shape + self.tensor.shape[-1:]))


class DenseFactor(_Dense, Factor):
    """P [..., N, R] as a tensor, any strides.

    Forward mode and the reference implementation go through the textbook, the former in float64.
    """

    kind = "tensors"
    implementations = op.IMPLEMENTATIONS

    def density(
        self, value: Tensor, mean: Mean, d: Tensor, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]:
        P, items = self.tensor, self._items(d)
        loc = mean.materialise(result_dtype(P, d))
        if _textbook(impl):
            with without_autocast(P.device):
                textbook = impl == "reference"
                formula = reference.mahalanobis_and_logdet if textbook else reference.by_residual
                q, logdet = formula(*self._work(impl, value, loc, P, d))
            return q, logdet.expand(items), None
        layout = Layout(broadcast(value.shape[:-1], loc.shape[:-1], items), items)
        q, logdet, L_inv, *_, wide = op.mahalanobis_and_logdet(
            layout.samples(value),
            layout.means(loc),
            layout.factors(P),
            layout.vectors(d),
            *(given or (None, None, None)),
            impl,
        )
        return layout.restore(q), logdet.reshape(items), Capacitance(L_inv, logdet.detach(), wide)

    def logdet(self, d: Tensor, impl: str) -> tuple[Tensor, Capacitance | None]:
        P, items = self.tensor, self._items(d)
        if _textbook(impl):
            with without_autocast(P.device):
                return reference.logdet(*self._work(impl, P, d)).expand(items), None
        layout = Layout(items, items)
        logdet, L_inv, wide = op.logdet(layout.factors(P), layout.vectors(d), impl)
        return logdet.reshape(items), Capacitance(L_inv, logdet.detach(), wide)

    def sample(self, mean: Mean, d: Tensor, shape: torch.Size, noise: Noise, impl: str) -> Tensor:
        P, omega_d = self.tensor, noise.omega_d
        loc, high = mean.materialise(), result_dtype(mean, P, d)
        dtype = torch.promote_types(loc.dtype, P.dtype)
        layout = Layout(shape, self._items(d))
        seed = layout.seed(P) if omega_d is None else None
        if _textbook(impl):
            if seed is not None:
                drawn = op_sampling.noise(seed, layout.S, P.shape[-2], high, impl)
                omega_d = layout.restore(drawn)
            assert omega_d is not None
            with without_autocast(P.device):
                loc = mean.materialise(high)
                return reference.rsample(*(t.to(high) for t in (loc, P, d, noise.omega_p, omega_d))).to(dtype)
        y = op_sampling.rsample(
            layout.means(loc).to(dtype),
            layout.factors(P),
            layout.vectors(d),
            layout.samples(noise.omega_p),
            None if omega_d is None else layout.samples(omega_d.expand(*shape, P.shape[-2])),
            seed,
            impl,
        )
        return layout.restore(y)

    def condition(
        self, value: Tensor, observed: Tensor, mean: Mean, d: Tensor, shape: torch.Size, impl: str
    ) -> tuple[Tensor, "DenseFactor", Tensor]:
        P, (N, R) = self.tensor, self.shape[-2:]
        dtype, high = torch.promote_types(mean.dtype, P.dtype), result_dtype(mean, P, d)
        loc = mean.materialise(high).to(high)
        value = torch.where(observed, value.to(high), loc)
        items = broadcast(observed.shape[:-1], self._items(d))
        given, d = d, d.to(high).expand(*d.shape[:-1], N)
        with without_autocast(P.device):
            if _textbook(impl):
                work = high if impl == "reference" else torch.float64
                value, loc, d = (t.to(work).expand(*shape, N) for t in (value, loc, d))
                found = reference.condition(value, observed.expand(*shape, N), loc, P.to(work), d)
                mean_, factor, diag = (t.to(dtype) for t in found)
                return mean_, DenseFactor(factor.expand(*shape, N, R)), diag
            # Values of one item share its C and its factor.
            layout = Layout(shape, items)
            P = layout.factors(P)
            known = torch.where(observed, fixed(given).to(high), d.new_ones(()))
            precision = layout.vectors(known.reciprocal() * observed)
            observations = layout.samples(value), layout.means(loc), P
            gram, w = op.normal_equations(*observations, precision, impl)

            def exactly() -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    none = None, None, None
                    made = op.mahalanobis_and_logdet(*observations, precision.reciprocal(), *none, impl)
                return made[2], made[3]

            root_and_v = posterior(gram, w.permute(1, 2, 0), layout.vectors(given), exactly, high)
            L_inv_t, v = (t.to(high) for t in root_and_v)
            P = P.to(high)
            deviation = layout.restore(torch.bmm(v.mT, P.mT).transpose(0, 1))
            factor = torch.bmm(P, L_inv_t) if P.stride(-1) <= P.stride(-2) else torch.bmm(L_inv_t.mT, P.mT).mT
            factor = factor.mul_(layout.vectors(~observed).to(high).unsqueeze(-1)).reshape(*items, N, R)
            return (
                torch.where(observed, value, loc + deviation).to(dtype),
                DenseFactor(factor.to(dtype).expand(*shape, N, R)),
                torch.where(observed, d.new_zeros(()), d).to(dtype).expand(*shape, N),
            )

    def whitened(self, root: Root, impl: str) -> "DenseFactor":
        return DenseFactor(root.whiten(self.tensor.movedim(-1, 0), impl).movedim(0, -1))

    def times(self, omega: Tensor) -> Tensor:
        return (self.tensor @ omega.unsqueeze(-1)).squeeze(-1)

    def row(self, n: int) -> Tensor:
        return self.tensor[..., n, :]

    def row_norms(self) -> Tensor:
        return self.tensor.square().sum(-1)

    def gram(self) -> Tensor:
        P, items = self.tensor, self.shape[:-2]
        if decomposed():
            P = P.double()
            return P.mT @ P
        layout = Layout(items, items)
        one = P.new_ones(1, dtype=result_dtype(P))
        gram: Tensor = op.gram(layout.factors(P), layout.vectors(one), self.implementation(None))
        return gram.reshape(*items, *gram.shape[1:])

    def mix(self, A: Tensor) -> Self:
        return type(self)(self.tensor @ checks.mixing(A, self.shape, self.device).to(self.dtype))

    def _items(self, d: Tensor) -> torch.Size:
        return broadcast(self.shape[:-2], d.shape[:-1])

    def _work(self, impl: str, *tensors: Tensor) -> list[Tensor]:
        """In the precision of the textbook: that of the tensors if it is asked for, else float64."""
        work = result_dtype(self.tensor) if impl == "reference" else torch.float64
        return [t.to(work) for t in tensors]


def _textbook(impl: str) -> bool:
    return impl == "reference" or decomposed()
