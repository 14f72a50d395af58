"""`LinearFactor`: a low-rank factor that is a linear map of features, and is never materialised.

Where P is the output of a 1×1 convolution, P_c = F̃ᵀW_cᵀ for each channel c, log-density, entropy and every gradient
can be had from the features F, which exist anyway (`aten_linear` has the formulas). The operators are registered here
as `ops` does it for a full factor; transforms of `torch.func`, forward mode and the reference implementation make P.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import aten_linear, ops, reference

__all__ = ["LinearFactor", "LinearMean"]


class _Linear:
    """What a linear map of features has in common with the tensor it stands for."""

    features: Tensor
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
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
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

    def materialise(self) -> Tensor:
        """μ [B, N], differentiable; N = C · pixels, channel by channel."""
        F = self.features.flatten(2)
        mu = self.weight @ F
        return (mu if self.bias is None else mu + self.bias.unsqueeze(-1)).flatten(1)

    def homogeneous(self) -> Tensor:
        """[C, K+1]: weight and bias."""
        bias = self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], -1)


@dataclass(frozen=True, eq=False)
class LinearFactor(_Linear):
    """A factor P that is a 1×1 convolution of features, P_(c,n),r = Σ_k weight_rck F_kn + bias_rc; never materialised.

    Stands where `cov_factor` is expected. The structured likelihood then needs the memory of a pixel-wise one: the
    only large tensor that is written is the gradient of the features.

    Args:
        features: F, [B, K, *spatial], any strides.
        weight: [R, C, K], or the convolution's own [R·C, K, 1, 1], with row r·C + c for column r and channel c.
        bias: [R, C] or [R·C], or none.
        channels: C, where the weight is the convolution's own.

    Raises:
        ValueError: a shape does not fit.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        _keep_grad_mode(self)
        K = _check_features(self.features)
        weight, C = self.weight, self.channels
        if weight.dim() == 4 and weight.shape[2:] == (1, 1):
            if C is None or C < 1 or weight.shape[0] % C:
                raise ValueError(
                    f"weight has shape {list(weight.shape)}, the convolution's own; expected `channels` to divide its "
                    f"first dimension, got {C}"
                )
            weight = weight.flatten(1).unflatten(0, (-1, C))
        if weight.dim() != 3 or weight.shape[2] != K or 0 in weight.shape:
            raise ValueError(f"weight has shape {list(weight.shape)}, expected [R, C, {K}] with R and C of at least 1")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "channels", weight.shape[1])
        if self.bias is not None:
            if self.bias.numel() != math.prod(weight.shape[:2]):
                raise ValueError(f"bias has shape {list(self.bias.shape)}, expected {list(weight.shape[:2])}")
            object.__setattr__(self, "bias", self.bias.reshape(weight.shape[:2]))

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Of P: [B, N, R]."""
        pixels = math.prod(self.features.shape[2:])
        return torch.Size((self.features.shape[0], self.weight.shape[1] * pixels, self.weight.shape[0]))

    def materialise(self) -> Tensor:
        """P [B, N, R], differentiable: the transposed view of [B, R, N]."""
        F = self.features.flatten(2)
        P = self.weight.flatten(0, 1) @ F  # [B, R·C, pixels]
        if self.bias is not None:
            P = P + self.bias.reshape(-1, 1)
        return P.unflatten(1, self.weight.shape[:2]).flatten(2).mT

    def homogeneous(self) -> Tensor:
        """W [C, R, K+1]: weight and bias."""
        bias = self.weight.new_zeros(self.weight.shape[:2]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias.unsqueeze(-1)], -1).transpose(0, 1)

    def times(self, omega: Tensor) -> Tensor:
        """Pω [S, B, N] of `omega` [S, B, R], differentiable: F̃ᵀ(Wᵀω), whatever the rank is."""
        S, B, _ = omega.shape
        u = torch.einsum("sbr,rck->bsck", omega, self.weight).flatten(1, 2)
        y = torch.bmm(u, self.features.flatten(2))
        if self.bias is not None:
            y = y + torch.einsum("sbr,rc->bsc", omega, self.bias).reshape(B, -1, 1)
        return y.reshape(B, S, self.shape[1]).transpose(0, 1)

    def row(self, n: int) -> Tensor:
        """Row n of P, [B, R]."""
        c, pixel = divmod(n % self.shape[1], math.prod(self.features.shape[2:]))
        row = self.features.flatten(2)[..., pixel] @ self.weight[:, c].T
        return row if self.bias is None else row + self.bias[:, c]

    def row_norms(self) -> Tensor:
        """diag PPᵀ [B, N]: f̃ᵀ(W_cᵀW_c)f̃ for every pixel."""
        W, F = self.homogeneous(), self.features.flatten(2)
        M = W.mT @ W  # [C, K+1, K+1]
        MF = torch.einsum("ckl,bln->bckn", M[..., :-1], F) + M[..., -1].unsqueeze(-1)
        return ((MF[:, :, :-1] * F.unsqueeze(1)).sum(2) + MF[:, :, -1]).flatten(1)

    def mix(self, A: Tensor) -> "LinearFactor":
        """The factor PA, with `A` [R, Q] the same for all items: only the weight changes."""
        bias = None if self.bias is None else torch.einsum("rq,rc->qc", A, self.bias)
        return LinearFactor(self.features, torch.einsum("rq,rck->qck", A, self.weight), bias)


def _check_features(features: Tensor) -> int:
    if features.dim() < 3:
        raise ValueError(f"features has shape {list(features.shape)}, expected [B, K, *spatial]")
    return features.shape[1]


def _keep_grad_mode(linear: _Linear) -> None:
    """Made without gradients, it stays so, as the output of a convolution would, whenever it is made a tensor."""
    if not torch.is_grad_enabled():
        for name, t in linear.tensors().items():
            if t.requires_grad:
                object.__setattr__(linear, name, t.detach())


def _squeeze_kernel(weight: Tensor) -> Tensor:
    return weight.flatten(1) if weight.dim() == 4 and weight.shape[2:] == (1, 1) else weight


def mahalanobis_and_logdet(
    x: Tensor, loc: Tensor | None, factor: LinearFactor, mean: LinearMean | None, d: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """q [S, B] and log|Σ| [B], float64, of x [S, B, N], loc [S or 1, B, N] and d [B, N] or [B, 1]."""
    C = factor.weight.shape[1]
    x, loc = x.unflatten(2, (C, -1)), None if loc is None else loc.unflatten(2, (C, -1))
    d = d.unsqueeze(-1) if d.shape[1] == 1 else d.unflatten(1, (C, -1))
    m = None if mean is None else mean.homogeneous()
    F, W = factor.features.flatten(2), factor.homogeneous()
    return torch.ops.lowrank_mvn.linear_mahalanobis_and_logdet(x, loc, F, W, m, d, impl)[:2]


# --- Registration -------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, Any] = {"aten": aten_linear}
if "triton" in ops.IMPLEMENTATIONS:
    IMPLEMENTATIONS["triton"] = ops._WhenUsed(f"{__package__}.triton.linear")


def _forward(x, loc, F, W, m, d, impl):
    with ops.without_autocast(F.device):
        return tuple(t.contiguous() for t in IMPLEMENTATIONS[impl].linear_mahalanobis_and_logdet(x, loc, F, W, m, d))


def _forward_fake(x, loc, F, W, m, d, impl):
    (S, B, C, _), R, K = x.shape, W.shape[1], W.shape[2]

    def new(*shape, dtype=torch.float64):
        return x.new_empty(shape, dtype=dtype)

    return (
        new(S, B),
        new(B),
        new(B, R, R),
        new(S, B, R),
        new(S, B, R),
        new(B, C if d.shape[2] > 1 else 1, K, K),
        new(*x.shape, dtype=aten_linear.product_dtype(x, F, d)),
        new(B, dtype=torch.bool),
    )


ops.define(
    "linear_mahalanobis_and_logdet(Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m, Tensor d, str impl)"
    " -> (Tensor mahalanobis, Tensor logdet, Tensor C_inv, Tensor v, Tensor step, Tensor G, Tensor residual,"
    " Tensor wide)",
    _forward,
    _forward_fake,
)


def _backward(a, b, x, loc, F, W, m, d, residual, C_inv, v, step, G, wide, need_x, impl):
    with ops.without_autocast(F.device):
        return IMPLEMENTATIONS[impl].linear_mahalanobis_and_logdet_backward(
            a, b, residual, F, W, m, d, C_inv, v, step, G, wide, need_x
        )


def _backward_fake(a, b, x, loc, F, W, m, d, residual, C_inv, v, step, G, wide, need_x, impl):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(residual, memory_format=contiguous) if need_x else residual.new_empty(0),
        torch.empty_like(F),
        torch.empty_like(W, memory_format=contiguous),
        F.new_empty(0) if m is None else torch.empty_like(m, memory_format=contiguous),
        torch.empty_like(d, memory_format=contiguous),
    )


ops.define(
    "linear_mahalanobis_and_logdet_backward(Tensor a, Tensor b, Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m,"
    " Tensor d, Tensor residual, Tensor C_inv, Tensor v, Tensor step, Tensor G, Tensor wide,"
    " bool need_x, str impl) -> (Tensor grad_x, Tensor grad_F, Tensor grad_W, Tensor grad_m, Tensor grad_d)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    _, _, C_inv, v, step, G, residual, wide = output
    ctx.save_for_backward(*tensors, residual, C_inv, v, step, G, wide)
    ctx.mark_non_differentiable(C_inv, v, step, G, residual, wide)


def _differentiate(ctx, grad_mahalanobis, grad_logdet, *_):
    x, loc, _, _, m, _, *_ = saved = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    grad_x, grad_F, grad_W, grad_m, grad_d = torch.ops.lowrank_mvn.linear_mahalanobis_and_logdet_backward(
        grad_mahalanobis, grad_logdet, *saved, need_x, ctx.impl
    )
    grad_loc = None
    if loc is not None and ctx.needs_input_grad[1]:
        grad_loc = -(grad_x if loc.shape[0] == x.shape[0] else grad_x.sum(0, keepdim=True)).to(loc.dtype)
    grad_x = grad_x.to(x.dtype) if ctx.needs_input_grad[0] else None
    return grad_x, grad_loc, grad_F, grad_W, None if m is None else grad_m, grad_d, None


torch.library.register_autograd(
    "lowrank_mvn::linear_mahalanobis_and_logdet", _differentiate, setup_context=_setup_context, lib=ops.library
)


def _setup_context_twice(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.need_x = inputs[14]


def _differentiate_twice(ctx, gg_x, gg_F, gg_W, gg_m, gg_d):
    a, b, x, loc, F, W, m, d = ctx.saved_tensors
    given = [t for t in (x, loc, F, W, m, d) if t is not None]

    def textbook(*tensors):
        """The same two numbers from P itself."""
        remaining = iter(tensors)
        full: Any = [None if t is None else next(remaining) for t in ctx.saved_tensors[2:]]
        x, loc, F, W, m, d = full
        ones = torch.cat([F, torch.ones_like(F[:, :1])], 1)
        P = torch.einsum("crk,bkn->bcnr", W, ones).flatten(1, 2)
        delta = x if loc is None else x - loc
        delta = delta if m is None else delta - torch.einsum("ck,bkn->bcn", m, ones)
        return reference.mahalanobis_and_logdet(delta.flatten(2), delta.new_zeros(()), P, d.flatten(1))

    def first(a, b, *tensors):
        pulled = iter(ops.pull_back(ops.in_float64(textbook), tensors, (a, b)))
        grads = [None if t is None else next(pulled) for t in ctx.saved_tensors[2:]]
        return tuple(g for g in (grads[0] if ctx.need_x else None, *grads[2:]) if g is not None)

    with ops.without_autocast(F.device):
        cotangents = tuple(
            g
            for g, t in zip((gg_x, gg_F, gg_W, gg_m, gg_d), (x if ctx.need_x else None, F, W, m, d), strict=True)
            if t is not None
        )
        pulled = iter(ops.pull_back(first, (a, b, *given), cotangents))
        return *(None if t is None else next(pulled) for t in ctx.saved_tensors), *[None] * 8


torch.library.register_autograd(
    "lowrank_mvn::linear_mahalanobis_and_logdet_backward",
    _differentiate_twice,
    setup_context=_setup_context_twice,
    lib=ops.library,
)
