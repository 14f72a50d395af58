"""`LinearFactor`: a low-rank factor that is a linear map of features, and is never materialised.

If P is the output of a 1×1 convolution, P_c = F̃ᵀW_cᵀ for each channel, the features F give the log-density, the entropy
and every gradient (`aten` has the formulas, `op` the operators). Forward mode, derivatives beyond the first, densities
under a mask and the reference implementation make P.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import checks
from ...capacitance import fixed, posterior
from ...layout import Layout, broadcast, broadcasts_to, concatenated
from ...registry import decomposed, transformed, without_autocast
from ..base import Capacitance, Factor, Mean, Noise, Root, result_dtype
from ..dense.factor import DenseFactor
from ..dense.op_sampling import noise as drawn_noise
from . import forms, op, op_sampling
from .features import Linear, of_factor, offset_of_factor
from .mean import LinearMean

# Pixels of features in half precision that are converted to float32 at once where there is no kernel that reads them;
# with gradients, autograd keeps what was converted.
CONVERTED = 1 << 12


@dataclass(frozen=True, eq=False)
class LinearFactor(Linear, Factor):
    """A factor P that is a 1×1 convolution of features, P_(c,n),r = Σ_k weight_rck F_kn + bias_rc; never materialised.

    Stands where `cov_factor` is expected. The structured likelihood then needs the memory of a pixel-wise one: the
    only large tensor that is written is the gradient of the features. Its batch shape is [B], or what [B] and the
    leading dimensions of the weight broadcast to: several factors may share an item's features.

    Args:
        features: F, [B, K, *spatial], channels first or last, read as they lie (a crop, whose pixels are not one
            dimension, is copied). Half precision is converted block by block; only samples and conditionals on the
            CPU, where they have gradients, keep it in float32.
        weight: [R, channels, K], or one for each item, [..., R, channels, K]; or, with `channels`, the convolution's
            own [R·channels, K, 1, 1], with row r·channels + c for column r and channel c.
        bias: [R, channels] or [R·channels], or for each item as the weight, [..., R, channels]; or none.
        channels: needed where the weight is the convolution's own.
        mask: bool, [..., N]: rows where it is false are zero, as they are for observed pixels of a conditional. A
            log-density or entropy of a factor with a mask makes P; samples, variances and conditionals do not.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument that is not a tensor, or a mask that is not of dtype bool.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None
    channels: int | None = None
    mask: Tensor | None = None

    kind = "a LinearFactor"
    implementations = op.IMPLEMENTATIONS

    def __post_init__(self) -> None:
        K = self._checked()
        weight = of_factor(self.weight, self.channels, K)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "channels", weight.shape[-2])
        object.__setattr__(self, "bias", offset_of_factor(self.bias, weight))
        N = weight.shape[-2] * math.prod(self.features.shape[2:])
        if self.mask is not None:
            checks.mask("mask", self.mask, N, self.device)
        batch = broadcast(
            self.features.shape[:1],
            weight.shape[:-3],
            torch.Size() if self.mask is None else self.mask.shape[:-1],
            names="features, weight and mask",
        )
        object.__setattr__(self, "_shape", torch.Size((*batch, N, weight.shape[-3])))

    @property
    def shape(self) -> torch.Size:
        """Of P: [..., N, R], [B, N, R] where all items share a weight."""
        shape: torch.Size = self._shape  # type: ignore[attr-defined]
        return shape

    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        """P [..., N, R], differentiable: the transposed view of [..., R, N]. In `dtype`, or that of the features."""
        R, channels = self.weight.shape[-3:-1]
        F = self.features.flatten(2).to(dtype or self.dtype)
        with without_autocast(F.device):
            P = torch.matmul(self.weight.to(F.dtype).flatten(-3, -2), F)  # [..., R·channels, pixels]
        if self.bias is not None:
            P = P + self.bias.to(P.dtype).flatten(-2).unsqueeze(-1)
        P = P.unflatten(-2, (R, channels)).flatten(-2)  # [..., R, N]
        return (P if self.mask is None else torch.where(self.mask.unsqueeze(-2), P, P.new_zeros(()))).mT

    def homogeneous(self) -> Tensor:
        """W [..., channels, R, K+1]: weight and bias."""
        return self._homogeneous().transpose(-3, -2)

    # --- Densities, samples, conditionals -------------------------------------------------------------------------

    def density(
        self, value: Tensor, mean: Mean, d: Tensor, impl: str, given: Capacitance | None = None
    ) -> tuple[Tensor, Tensor, Capacitance | None]:
        if not self._stays_linear(impl):
            return self._made(d).density(value, mean, d, impl, given)
        items = self._items(d)
        layout = Layout(broadcast(value.shape[:-1], mean.shape[:-1], items), items)
        x, shift, joined = layout.samples(value), self._shift(mean, layout, result_dtype(self, d)), self._joined(mean)
        parts = [
            op.mahalanobis_and_logdet(*tensors, impl)[:2]
            for tensors in self._calls(layout, x, shift, joined, layout.vectors(d))
        ]
        q, logdet = (concatenated(part, dim) for part, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
        return layout.restore(q), logdet.reshape(items), None

    def logdet(self, d: Tensor, impl: str) -> tuple[Tensor, Capacitance | None]:
        if not self._stays_linear(impl):
            return self._made(d).logdet(d, impl)
        items = self._items(d)
        layout = Layout(items, items)
        calls = self._item_calls(layout, layout.vectors(d))
        return concatenated([op.logdet(*tensors, impl)[0] for tensors in calls]).reshape(items), None

    def sample(self, mean: Mean, d: Tensor, shape: torch.Size, noise: Noise, impl: str) -> Tensor:
        N, high = self.shape[-2], result_dtype(mean, self, d)
        layout = Layout(shape, self._items(d))
        omega_p, omega_d = noise
        seed = layout.seed(self.features) if omega_d is None else None
        if impl == "triton" and not decomposed() and self._has_kernel(d):
            given = None if omega_d is None else layout.samples(omega_d.expand(*shape, N))
            return self._rsample(mean, layout.vectors(d), layout, omega_p, given, seed, impl)
        if omega_d is None:
            omega_d = layout.restore(drawn_noise(seed, layout.S, N, high, impl))
        if impl == "reference":
            return (
                DenseFactor(self.materialise(high))
                .sample(mean, d, shape, Noise(omega_p, omega_d), impl)
                .to(torch.promote_types(mean.dtype, self.dtype))
            )
        with without_autocast(self.device):
            y = mean.materialise(high).to(high) + self.times(omega_p).to(high) + d.to(high).sqrt() * omega_d.to(high)
            return y.to(torch.promote_types(mean.dtype, self.dtype))

    def condition(
        self, value: Tensor, observed: Tensor, mean: Mean, d: Tensor, shape: torch.Size, impl: str
    ) -> tuple[Tensor, Factor, Tensor]:
        dtype, high = torch.promote_types(mean.dtype, self.dtype), result_dtype(mean, self, d)
        if impl == "reference" or decomposed():
            made = DenseFactor(self.materialise(high))
            loc, dense, diag = made.condition(value, observed, mean, d, shape, impl)
            return loc.to(dtype), DenseFactor(dense.tensor.to(dtype)), diag.to(dtype)
        N, R = self.shape[-2:]
        items = broadcast(observed.shape[:-1], self._items(d))
        layout = Layout(shape, items)
        known = observed if self.mask is None else observed & self.mask
        given, d = d, d.to(high).expand(*d.shape[:-1], N)
        precision = layout.vectors(torch.where(known, fixed(given).to(high), d.new_ones(())).reciprocal() * known)
        x = torch.where(observed, value.to(high), value.new_zeros((), dtype=high))
        with without_autocast(self.device):
            shift = self._shift(mean, layout, high)
            calls = [*self._calls(layout, layout.samples(x), shift, self._joined(mean), precision)]

            def joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
                return concatenated([a for a, _ in parts], 0), concatenated([b for _, b in parts], 1)

            def exactly() -> tuple[Tensor, Tensor]:
                made = []
                with torch.no_grad():
                    for *rest, precision in calls:
                        assert precision is not None
                        made.append(op.mahalanobis_and_logdet(*rest, precision.reciprocal(), impl)[2:4])
                return joined(made)

            gram, w = joined([op.normal_equations(*tensors, impl) for tensors in calls])
            L_inv_t, v = posterior(gram, w.permute(1, 2, 0), layout.vectors(given), exactly, high)
            factor = self.mix(L_inv_t.reshape(*items, R, R)).masked(~observed)
            deviation = self.times(layout.restore(v.permute(2, 0, 1)).to(high))
            loc = mean.materialise(high).to(high) + deviation.to(high)
            return (
                torch.where(observed, value.to(high), loc).to(dtype),
                factor,
                torch.where(observed, torch.zeros_like(d), d).to(dtype),
            )

    def whitened(self, root: Root, impl: str) -> Factor:
        """Linear in F̃T, the row of ones too, where T is one map of pixels and of channels for each item; else P is
        made."""
        one_each = broadcasts_to(root.batch_shape, self.features.shape[:1])
        if not (root.shared and one_each and self._stays_linear(impl)):
            return DenseFactor(self.materialise(_not_half(self.dtype))).whitened(root, impl)
        F = self.features.flatten(2)
        ones = F if self.bias is None else torch.cat([F, F.new_ones(1, 1, 1).expand(F.shape[0], 1, F.shape[2])], 1)
        W = self.weight if self.bias is None else self.homogeneous().transpose(-3, -2)
        return LinearFactor(root.rows(ones, impl), root.gathered(W))

    # --- Products -------------------------------------------------------------------------------------------------

    def times(self, omega: Tensor) -> Tensor:
        """Pω [..., N] of `omega` [..., R], which broadcasts with the batch; differentiable: F̃ᵀ(Wᵀω), whatever R is.

        In float32 where the features are of half precision.
        """
        checks.last_size("omega", omega.shape, f"the factor has {self.shape[-1]} columns", self.shape[-1:])
        F, W = self.features.flatten(2), self.weight
        work = _not_half(F.dtype)
        high = torch.promote_types(torch.promote_types(omega.dtype, W.dtype), work)
        with without_autocast(F.device):
            u = torch.matmul(omega.to(high).unsqueeze(-2), W.to(high).flatten(-2)).unflatten(-1, W.shape[-2:])
            u = u.squeeze(-3)  # [..., channels, K]
            batch = broadcast(u.shape[:-2], self.shape[:-2])
            u = u.expand(*batch, *u.shape[-2:]).to(work)
            # Dimensions that the features lack are further rows of one product.
            B = F.shape[0]
            shared = math.prod(batch if B == 1 else batch[:-1])
            rows = u.reshape(shared, B, *u.shape[-2:]).transpose(0, 1).flatten(1, 2)
            parts = (F,) if F.dtype == work else F.split(CONVERTED, 2)
            products = [torch.bmm(rows, part.to(work)) for part in parts]
            y = concatenated(products, 2)
            y = y.unflatten(1, (shared, W.shape[-2]))  # [B, shared, channels, pixels]
            if self.bias is not None:
                bias = (omega.to(high).unsqueeze(-2) @ self.bias.to(high)).squeeze(-2)
                bias = bias.expand(*batch, -1).reshape(shared, B, W.shape[-2]).transpose(0, 1)
                y = y + bias.unsqueeze(-1).to(work)
        return self._masked(y.transpose(0, 1).reshape(*batch, self.shape[-2]))

    def row(self, n: int) -> Tensor:
        """Row n of P, [..., R], from the end if n is negative."""
        if not -self.shape[-2] <= n < self.shape[-2]:
            raise IndexError(f"row {n} is out of range for {self.shape[-2]} rows")
        n = n % self.shape[-2]
        c, pixel = divmod(n, math.prod(self.features.shape[2:]))
        f = self.features.flatten(2)[..., pixel].unsqueeze(-1)  # [B, K, 1]
        row = torch.matmul(self.weight[..., c, :].to(f.dtype), f).squeeze(-1)
        row = (row if self.bias is None else row + self.bias[..., c].to(row.dtype)).expand(*self.shape[:-2], -1)
        return row if self.mask is None else torch.where(self.mask[..., n, None], row, row.new_zeros(()))

    def row_norms(self) -> Tensor:
        """diag PPᵀ [..., N], differentiable, block by block (in forward mode from P)."""
        if decomposed():
            return self.materialise(_not_half(self.dtype)).square().sum(-1).to(self.dtype)
        batch = broadcast(self.features.shape[:1], self.weight.shape[:-3])
        W = self._weights(batch)
        norms = [op.row_norms(F, _of(W, items)) for items, F in self._turns(math.prod(batch))]
        return self._masked(concatenated(norms).reshape(*batch, self.shape[-2]).to(self.dtype))

    def gram(self) -> Tensor:
        """PᵀP [..., R, R] in float64, differentiable, from products of the features (in forward mode from P)."""
        if decomposed():
            P = self.materialise(torch.float64)
            return P.mT @ P
        batch = self.shape[:-2]
        layout = Layout(batch, batch)
        one = self.features.new_ones(1, dtype=_not_half(self.dtype))
        rows = layout.vectors(one if self.mask is None else self.mask.to(one.dtype))
        calls = self._item_calls(layout, rows)
        gram = concatenated([op.gram(*tensors, self.implementation(None)) for tensors in calls])
        return gram.reshape(*batch, *gram.shape[1:])

    def mix(self, A: Tensor) -> "LinearFactor":
        """The factor PA, with `A` [R, Q] or one for each item, [..., R, Q]: only the weight changes."""
        A = checks.mixing(A, self.shape, self.device).to(self.weight.dtype)
        weight = torch.matmul(A.mT, self.weight.flatten(-2)).unflatten(-1, self.weight.shape[-2:])
        bias = None if self.bias is None else torch.matmul(A.mT.to(self.bias.dtype), self.bias)
        return LinearFactor(self.features, weight, bias, mask=self.mask)

    def masked(self, mask: Tensor) -> "LinearFactor":
        """The same with zero rows where `mask` [..., N] is false."""
        mask = mask if self.mask is None else mask & self.mask
        return LinearFactor(self.features, self.weight, self.bias, mask=mask)

    def _masked(self, t: Tensor) -> Tensor:
        """`t` [..., N] with zeros where the mask is false."""
        return t if self.mask is None else torch.where(self.mask, t, t.new_zeros(()))

    # --- Canonical shapes -----------------------------------------------------------------------------------------

    def _stays_linear(self, impl: str) -> bool:
        """Whether the operators for linear factors apply."""
        return impl in self.implementations and self.mask is None and not decomposed()

    def _made(self, d: Tensor) -> DenseFactor:
        return DenseFactor(self.materialise(torch.float64 if decomposed() else result_dtype(self, d)))

    def _items(self, d: Tensor) -> torch.Size:
        return broadcast(self.shape[:-2], d.shape[:-1])

    def _joined(self, mean: Mean) -> LinearMean | None:
        """The mean, if it is a linear map of the same features: both share the passes over them then."""
        return mean.linear_in(self.source)

    def _shift(self, mean: Mean, layout: Layout, dtype: torch.dtype) -> Tensor | None:
        """The mean as a tensor, where it does not join the passes."""
        return None if self._joined(mean) else layout.means(mean.materialise(dtype))

    def _has_kernel(self, d: Tensor) -> bool:
        """Whether samples have a kernel: one item for each of the features', and no batching rule."""
        return self.mask is None and self._items(d) == self.features.shape[:1] and not transformed()

    def _rsample(
        self,
        mean: Mean,
        d: Tensor,
        layout: Layout,
        omega_p: Tensor,
        omega_d: Tensor | None,
        seed: Tensor | None,
        impl: str,
    ) -> Tensor:
        """A sample with coefficients u = Wᵀω_p + m, by the operator; d is [B, N] or [B, 1], ω_d [S, B, N]."""
        F, joined = self.features.flatten(2), self._joined(mean)
        high = torch.promote_types(torch.promote_types(F.dtype, d.dtype), torch.float32)
        with without_autocast(F.device):
            omega = layout.samples(omega_p).transpose(0, 1).to(high)
            u = forms.coefficients(omega, self._weights(F.shape[:1]).to(high))
            u = u if joined is None else u + joined.homogeneous().to(high)
        shift = None if joined else layout.means(mean.materialise())
        loc, omega_d = self._by_channel(shift), self._by_channel(omega_d)
        y = op_sampling.rsample(loc, F, u, self._by_channel(d), omega_d, seed, impl)
        return layout.restore(y.flatten(2))

    def _by_channel(self, t: Tensor | None) -> Tensor | None:
        """[..., N] -> [..., channels, pixels], or [..., 1] -> [..., 1, 1]."""
        if t is None:
            return None
        channels = 1 if t.shape[-1] == 1 else self.weight.shape[-2]
        return t.reshape(*t.shape[:-1], channels, t.shape[-1] // channels)

    def _weights(self, batch: torch.Size) -> Tensor:
        """W [1 or items, channels, R, K+1] for the items of a batch."""
        W = self.homogeneous()
        return W.unsqueeze(0) if W.dim() == 3 else W.expand(*batch, *W.shape[-3:]).flatten(0, -4)

    def _turns(self, items: int) -> Iterator[tuple[slice, Tensor]]:
        """Index and features [b, K, pixels] of the items of one call of an operator.

        Items beyond those of the features share them: as a view if there is one item, which then is one call, or in a
        call for each turn. A call also bounds the memory where features have a gradient.
        """
        F = self.features.flatten(2)
        B = F.shape[0]
        if items in (B, 0):
            yield slice(0, items), F if items else F[:0]
        elif B == 1 and not (F.requires_grad and torch.is_grad_enabled()):
            yield slice(0, items), F.expand(items, -1, -1)
        else:
            for start in range(0, items, B):
                yield slice(start, start + B), F

    def _item_calls(self, layout: Layout, diagonal: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """F, W and the diagonal [B, N] or [B, 1], call by call."""
        W, rows = self._weights(layout.items_shape), self._by_channel(diagonal)
        assert rows is not None
        for items, F in self._turns(layout.B):
            yield F, _of(W, items), rows[items]

    def _calls(
        self, layout: Layout, x: Tensor, loc: Tensor | None, mean: LinearMean | None, diagonal: Tensor
    ) -> Iterator[tuple[Tensor | None, ...]]:
        """The arguments of the operators with samples, call by call."""
        x_, loc_, m = self._by_channel(x), self._by_channel(loc), None if mean is None else mean.homogeneous()
        assert x_ is not None
        start = 0
        for F, W, rows in self._item_calls(layout, diagonal):
            items = slice(start, start := start + F.shape[0])
            yield x_[:, items], None if loc_ is None else loc_[:, items], F, W, m, rows


def _of(W: Tensor, items: slice) -> Tensor:
    """The weights of some items, or the one that all of them share."""
    return W if W.shape[0] == 1 else W[items]


def _not_half(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
