"""`LinearFactor`: a low-rank factor that is a linear map of features, and is never materialised.

Where P is the output of a 1×1 convolution, P_c = F̃ᵀW_cᵀ for each channel c, log-density, entropy and every gradient
can be had from the features F, which exist anyway (`aten_linear` has the formulas, `ops_linear` the operators).
Forward mode, derivatives beyond the first and the reference implementation make P.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops, ops_linear
from .ops_linear import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "LinearFactor", "LinearMean"]

# Pixels of features in half precision that are converted to float32 at once where there is no kernel that reads them;
# with gradients, autograd keeps what was converted.
CONVERTED = 1 << 12


class _Linear:
    """What a linear map of features has in common with the tensor it stands for."""

    features: Tensor
    source: Tensor  # the features as they were given
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def is_cuda(self) -> bool:
        return self.features.is_cuda

    def dim(self) -> int:
        return len(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        parts = {name: getattr(self, name) for name in ("features", "weight", "bias")}
        return {name: t for name, t in parts.items() if t is not None}

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self.tensors().values())


@dataclass(frozen=True, eq=False)
class LinearMean(_Linear):
    """A mean that is a 1×1 convolution of features, μ_c = Σ_k weight_ck F_k + bias_c.

    Given as `loc` beside a `LinearFactor` of the same features it joins the passes over them, and the gradient of the
    features is written once for both.

    Args:
        features: F, [B, K, *spatial].
        weight: [C, K], or the convolution's own, [C, K, 1, 1].
        bias: [C], or none.

    Raises:
        ValueError: a shape does not fit.
        TypeError: an argument that is not a tensor.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _check_tensors(self, optional=("bias",))
        _keep_grad_mode(self)
        object.__setattr__(self, "weight", _squeeze_kernel(self.weight))
        K = _check_features(self.features)
        if self.weight.dim() != 2 or self.weight.shape[1] != K:
            raise ValueError(f"weight has shape {list(self.weight.shape)}, expected [C, {K}]")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias has shape {list(self.bias.shape)}, expected [{self.weight.shape[0]}]")

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of μ: [B, N]."""
        return torch.Size((self.features.shape[0], self.weight.shape[0] * math.prod(self.features.shape[2:])))

    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        """μ [B, N], differentiable; N = C · pixels, channel by channel. In `dtype`, or that of the features."""
        F = self.features.flatten(2).to(dtype or self.dtype)
        with ops.without_autocast(F.device):
            mu = self.weight.to(F.dtype) @ F
        return (mu if self.bias is None else mu + self.bias.to(mu.dtype).unsqueeze(-1)).flatten(1)

    def homogeneous(self) -> Tensor:
        """[C, K+1]: weight and bias."""
        bias = self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], -1)


@dataclass(frozen=True, eq=False)
class LinearFactor(_Linear):
    """A factor P that is a 1×1 convolution of features, P_(c,n),r = Σ_k weight_rck F_kn + bias_rc; never materialised.

    Stands where `cov_factor` is expected. The structured likelihood then needs the memory of a pixel-wise one: the
    only large tensor that is written is the gradient of the features. Its batch shape is [B], or what [B] and the
    leading dimensions of the weight broadcast to: several factors may share an item's features.

    Args:
        features: F, [B, K, *spatial], channels first or last, read as they lie (a crop, whose pixels are not one
            dimension, is copied). Half precision is converted block by block; only samples and conditionals on the
            CPU, where they have gradients, keep it in float32.
        weight: [R, C, K], or one for each item, [..., R, C, K]; or, with `channels`, the convolution's own
            [R·C, K, 1, 1], with row r·C + c for column r and channel c.
        bias: [R, C] or [R·C], or for each item as the weight, [..., R, C]; or none.
        channels: C; needed where the weight is the convolution's own.
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

    def __post_init__(self) -> None:
        _check_tensors(self, optional=("bias", "mask"))
        _keep_grad_mode(self)
        K = _check_features(self.features)
        weight, C = self.weight, self.channels
        # With K = 1 it might be one for each item.
        if weight.dim() == 4 and weight.shape[2:] == (1, 1) and (K > 1 or (C is not None and weight.shape[1] == K)):
            if C is None or C < 1 or weight.shape[0] % C:
                raise ValueError(
                    f"weight has shape {list(weight.shape)}, the convolution's own; expected `channels` to divide its "
                    f"first dimension, got {C}"
                )
            weight = weight.flatten(1).unflatten(0, (-1, C))
        if weight.dim() < 3 or weight.shape[-1] != K or 0 in weight.shape[-3:]:
            raise ValueError(
                f"weight has shape {list(weight.shape)}, expected [R, C, {K}] or [..., R, C, {K}] with R and C of at "
                f"least 1"
            )
        if C not in (None, weight.shape[-2]):
            raise ValueError(f"weight has shape {list(weight.shape)}, [..., R, C, {K}], where `channels` says C = {C}")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "channels", weight.shape[-2])
        if self.bias is not None:
            R, C = weight.shape[-3:-1]
            if self.bias.shape != weight.shape[:-1] and (weight.dim() > 3 or self.bias.shape != (R * C,)):
                either = "" if weight.dim() > 3 else f" or [{R * C}]"
                raise ValueError(f"bias has shape {list(self.bias.shape)}, expected {list(weight.shape[:-1])}{either}")
            object.__setattr__(self, "bias", self.bias.reshape(weight.shape[:-1]))
        N = weight.shape[-2] * math.prod(self.features.shape[2:])
        if self.mask is not None:
            if self.mask.dtype != torch.bool:
                raise TypeError(f"mask must be a tensor of dtype bool, got one of dtype {self.mask.dtype}")
            if self.mask.device != self.device:
                raise ValueError(f"mask is on {self.mask.device}, features on {self.device}")
            if self.mask.shape[-1:] != (N,):
                raise ValueError(f"mask has shape {list(self.mask.shape)}, expected [..., {N}]")
        batch = broadcast(
            self.features.shape[:1],
            weight.shape[:-3],
            torch.Size() if self.mask is None else self.mask.shape[:-1],
            names="features, weight and mask",
        )
        object.__setattr__(self, "_shape", torch.Size((*batch, N, weight.shape[-3])))

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of P: [..., N, R], [B, N, R] where all items share a weight."""
        return self._shape  # type: ignore[attr-defined]

    def materialise(self, dtype: torch.dtype | None = None) -> Tensor:
        """P [..., N, R], differentiable: the transposed view of [..., R, N]. In `dtype`, or that of the features."""
        R, C = self.weight.shape[-3:-1]
        F = self.features.flatten(2).to(dtype or self.dtype)
        with ops.without_autocast(F.device):
            P = torch.matmul(self.weight.to(F.dtype).flatten(-3, -2), F)  # [..., R·C, pixels]
        if self.bias is not None:
            P = P + self.bias.to(P.dtype).flatten(-2).unsqueeze(-1)
        P = P.unflatten(-2, (R, C)).flatten(-2)  # [..., R, N]
        return (P if self.mask is None else torch.where(self.mask.unsqueeze(-2), P, P.new_zeros(()))).mT

    def homogeneous(self) -> Tensor:
        """W [..., C, R, K+1]: weight and bias."""
        bias = self.weight.new_zeros(self.weight.shape[:-1]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], -1).transpose(-3, -2)

    def times(self, omega: Tensor) -> Tensor:
        """Pω [..., N] of `omega` [..., R], which broadcasts with the batch; differentiable: F̃ᵀ(Wᵀω), whatever R is.

        In float32 where the features are of half precision.
        """
        F, W = self.features.flatten(2), self.weight
        work = _not_half(F.dtype)
        high = torch.promote_types(torch.promote_types(omega.dtype, W.dtype), work)
        with ops.without_autocast(F.device):
            u = torch.matmul(omega.to(high).unsqueeze(-2), W.to(high).flatten(-2)).unflatten(-1, W.shape[-2:])
            u = u.squeeze(-3)  # [..., C, K]
            batch = broadcast(u.shape[:-2], self.shape[:-2])
            u = u.expand(*batch, *u.shape[-2:]).to(work)
            # Dimensions that the features lack are further rows of one product.
            B = F.shape[0]
            shared = math.prod(batch if B == 1 else batch[:-1])
            rows = u.reshape(shared, B, *u.shape[-2:]).transpose(0, 1).flatten(1, 2)
            parts = (F,) if F.dtype == work else F.split(CONVERTED, 2)
            products = [torch.bmm(rows, part.to(work)) for part in parts]
            y = products[0] if len(products) == 1 else torch.cat(products, 2)
            y = y.unflatten(1, (shared, W.shape[-2]))  # [B, shared, C, pixels]
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
        """diag PPᵀ [..., N], differentiable, block by block (in forward mode of P)."""
        if ops.forward_mode():
            return self.materialise(_not_half(self.dtype)).square().sum(-1).to(self.dtype)
        batch = broadcast(self.features.shape[:1], self.weight.shape[:-3])
        W = self._weights(batch)
        norms = [ops_linear.row_norms(F, _of(W, items)) for items, F in self._calls(math.prod(batch))]
        return self._masked(torch.cat(norms).reshape(*batch, self.shape[-2]).to(self.dtype))

    def gram(self) -> Tensor:
        """PᵀP [..., R, R] in float64, differentiable, from products of the features (in forward mode of P)."""
        if ops.forward_mode():
            P = self.materialise(torch.float64)
            return P.mT @ P
        batch = self.shape[:-2]
        N, B = self.shape[-2], math.prod(batch)
        # So large a precision (a power of two, which rounds nothing) that the identity in C is lost beside PᵀP.
        scale = 2.0**40
        if self.mask is None:
            precision = torch.full((B, 1), scale, dtype=_not_half(self.dtype), device=self.device)
        else:
            precision = (self.mask * scale).to(_not_half(self.dtype)).expand(*batch, N).reshape(B, N)
        nothing = precision.new_empty(0, B, N)
        impl = "triton" if self.is_cuda and "triton" in IMPLEMENTATIONS else "aten"
        C, _ = gram(nothing, None, self, batch, None, precision, impl)
        return (C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)).reshape(*batch, *C.shape[-2:]) / scale

    def mix(self, A: Tensor) -> "LinearFactor":
        """The factor PA, with `A` [R, Q] or one for each item, [..., R, Q]: only the weight changes."""
        A = A.to(self.weight.dtype)
        weight = torch.matmul(A.mT, self.weight.flatten(-2)).unflatten(-1, self.weight.shape[-2:])
        bias = None if self.bias is None else torch.matmul(A.mT, self.bias)
        return LinearFactor(self.features, weight, bias, mask=self.mask)

    def masked(self, mask: Tensor) -> "LinearFactor":
        """The same with zero rows where `mask` [..., N] is false."""
        mask = mask if self.mask is None else mask & self.mask
        return LinearFactor(self.features, self.weight, self.bias, mask=mask)

    def _masked(self, t: Tensor) -> Tensor:
        """`t` [..., N] with zeros where the mask is false."""
        return t if self.mask is None else torch.where(self.mask, t, t.new_zeros(()))

    def _weights(self, batch: torch.Size) -> Tensor:
        """W [1 or items, C, R, K+1] for the items of a batch."""
        W = self.homogeneous()
        return W.unsqueeze(0) if W.dim() == 3 else W.expand(*batch, *W.shape[-3:]).flatten(0, -4)

    def _calls(self, items: int):
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


def joined(loc: Tensor | LinearMean, P: Tensor | LinearFactor) -> LinearMean | None:
    """The mean, if it is a linear map of the features that P is one of: both share the passes over them then."""
    if isinstance(loc, LinearMean) and isinstance(P, LinearFactor) and loc.source is P.source:
        return loc
    return None


def _check_tensors(linear: _Linear, optional: tuple[str, ...]) -> None:
    for name in ("features", "weight", *optional):
        t = getattr(linear, name)
        if not isinstance(t, Tensor) and not (t is None and name in optional):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _check_features(features: Tensor) -> int:
    if features.dim() < 3:
        raise ValueError(f"features has shape {list(features.shape)}, expected [B, K, *spatial]")
    return features.shape[1]


def _keep_grad_mode(linear: _Linear) -> None:
    """Made without gradients, it stays so, as the output of a convolution would, whenever it is made a tensor."""
    object.__setattr__(linear, "source", linear.features)
    if not torch.is_grad_enabled():
        for name, t in linear.tensors().items():
            if t.requires_grad:
                object.__setattr__(linear, name, t.detach())


def _squeeze_kernel(weight: Tensor) -> Tensor:
    return weight.flatten(1) if weight.dim() == 4 and weight.shape[2:] == (1, 1) else weight


def _of(W: Tensor, items: slice) -> Tensor:
    """The weights of some items, or the one that all of them share."""
    return W if W.shape[0] == 1 else W[items]


def broadcast(*shapes: torch.Size, names: str = "the arguments") -> torch.Size:
    # Not torch.broadcast_shapes, whose first call imports sympy: 35 MB and a second.
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for i, size in enumerate(shape, len(result) - len(shape)):
            if result[i] == 1:
                result[i] = size
            elif size not in (1, result[i]):
                given = ", ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"Incompatible batch shapes of {names}: {given}")
    return torch.Size(result)


def _not_half(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _canonical(x: Tensor, loc: Tensor | None, factor: LinearFactor, batch: torch.Size, mean, d: Tensor):
    """The arguments of the operators, call by call."""
    C = factor.weight.shape[-2]
    x, loc = x.unflatten(2, (C, -1)), None if loc is None else loc.unflatten(2, (C, -1))
    d = d.unsqueeze(-1) if d.shape[1] == 1 else d.unflatten(1, (C, -1))
    W, m = factor._weights(batch), None if mean is None else mean.homogeneous()
    for items, F in factor._calls(math.prod(batch)):
        yield x[:, items], None if loc is None else loc[:, items], F, _of(W, items), m, d[items]


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor | None,
    factor: LinearFactor,
    batch: torch.Size,
    mean: LinearMean | None,
    d: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """q [S, B] and log|Σ| [B], float64, of x [S, B, N], loc [S or 1, B, N] and d [B, N] or [B, 1], for the B items of
    `batch`."""
    calls = _canonical(x, loc, factor, batch, mean, d)
    q, logdet = zip(*(ops_linear.mahalanobis_and_logdet(*tensors, impl)[:2] for tensors in calls), strict=True)
    return torch.cat(q, 1), torch.cat(logdet)


def gram(
    x: Tensor,
    loc: Tensor | None,
    factor: LinearFactor,
    batch: torch.Size,
    mean: LinearMean | None,
    precision: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """C = I + Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], shapes as above."""
    calls = _canonical(x, loc, factor, batch, mean, precision)
    C, w = zip(*(ops_linear.gram(*tensors, impl) for tensors in calls), strict=True)
    return torch.cat(C), torch.cat(w, 1)
