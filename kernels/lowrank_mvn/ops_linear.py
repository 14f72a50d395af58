"""The operators for linear factors as torch sees them: schema, shapes, derivatives and batching, as in `ops`.

Canonical shapes are those of `aten_linear`. An implementation is a module with four of its functions: `linear_gram`,
`linear_mahalanobis_and_logdet` and its backward, and `keeps_products`, which says of what shape their outputs are.
Nothing here makes P but derivatives beyond the first.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import aten, aten_linear, linear_forms, ops, reference

IMPLEMENTATIONS: dict[str, ModuleType] = {"aten": aten_linear}
if "triton" in ops.IMPLEMENTATIONS:
    IMPLEMENTATIONS["triton"] = ops.WhenUsed(f"{__package__}.triton.linear")


# --- q = δᵀΣ⁻¹δ and log|Σ| ----------------------------------------------------------------------------------------


def _forward(x, loc, F, W, m, d, impl):
    with ops.without_autocast(F.device):
        return tuple(t.contiguous() for t in IMPLEMENTATIONS[impl].linear_mahalanobis_and_logdet(x, loc, F, W, m, d))


def _forward_fake(x, loc, F, W, m, d, impl):
    (S, B, C, M), (R, K1) = x.shape, W.shape[2:]
    kept = K1 if IMPLEMENTATIONS[impl].keeps_products(C, R, K1, not linear_forms.one_value(d)) else 0

    def new(*shape, dtype=torch.float64):
        return x.new_empty(shape, dtype=dtype)

    return (
        new(S, B),
        new(B),
        new(B, R, R),
        new(S, B, R),
        new(S, B, R),
        new(B, C, R, kept),
        new(B, S, C, kept),
        new(S, B, C, M, dtype=aten.product_dtype(x, F, W, d)),
        new(B, dtype=torch.bool),
    )


ops.define(
    "linear_mahalanobis_and_logdet(Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m, Tensor d, str impl)"
    " -> (Tensor mahalanobis, Tensor logdet, Tensor C_inv, Tensor v, Tensor step, Tensor WG, Tensor zF,"
    " Tensor residual, Tensor wide)",
    _forward,
    _forward_fake,
)


def _backward(a, b, x, loc, F, W, m, d, C_inv, v, step, WG, zF, residual, wide, needs, impl):
    with ops.without_autocast(F.device):
        return IMPLEMENTATIONS[impl].linear_mahalanobis_and_logdet_backward(
            a, b, x, loc, F, W, m, d, C_inv, v, step, WG, zF, residual, wide, needs
        )


def _backward_fake(a, b, x, loc, F, W, m, d, C_inv, v, step, WG, zF, residual, wide, needs, impl):
    contiguous, (need_x, need_F, need_d) = torch.contiguous_format, needs
    return (
        x.new_empty(x.shape if need_x else (0,), dtype=aten.product_dtype(x, F, W, d)),
        torch.empty_like(F) if need_F else F.new_empty(0),
        torch.empty_like(W, memory_format=contiguous),
        F.new_empty(0) if m is None else torch.empty_like(m, memory_format=contiguous),
        torch.empty_like(d, memory_format=contiguous) if need_d else d.new_empty(0),
    )


ops.define(
    "linear_mahalanobis_and_logdet_backward(Tensor a, Tensor b, Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m,"
    " Tensor d, Tensor C_inv, Tensor v, Tensor step, Tensor WG, Tensor zF, Tensor residual, Tensor wide, bool[3] needs,"
    " str impl)"
    " -> (Tensor grad_x, Tensor grad_F, Tensor grad_W, Tensor grad_m, Tensor grad_d)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    _, _, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else a gradient of zeros is made for each output, the residual among them


def _differentiate(ctx, grad_mahalanobis, grad_logdet, *_):
    if grad_mahalanobis is None and grad_logdet is None:
        return (None,) * 7
    x, loc, *_ = saved = ctx.saved_tensors
    need_x, need_loc, need_F, need_W, need_m, need_d, _ = ctx.needs_input_grad
    C_inv, v = saved[6:8]
    if grad_mahalanobis is None:
        grad_mahalanobis = v.new_zeros(v.shape[:2])
    if grad_logdet is None:
        grad_logdet = C_inv.new_zeros(C_inv.shape[:1])
    grad_x, grad_F, grad_W, grad_m, grad_d = mahalanobis_and_logdet_backward(
        grad_mahalanobis, grad_logdet, *saved, [need_x or need_loc, need_F, need_d], ctx.impl
    )
    return (
        grad_x.to(x.dtype) if need_x else None,
        _grad_loc(grad_x, x, loc) if need_loc else None,
        grad_F if need_F else None,
        grad_W if need_W else None,
        grad_m if need_m else None,
        grad_d if need_d else None,
        None,
    )


def _grad_loc(grad_x, x, loc):
    return -(grad_x if loc.shape[0] == x.shape[0] else grad_x.sum(0, keepdim=True)).to(loc.dtype)


def _setup_context_twice(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.needs = inputs[15]


def _ones(F: Tensor) -> Tensor:
    return torch.cat([F, torch.ones_like(F[:, :1])], 1)


def _full(x, loc, F, W, m):
    """δ [S, B, N] and P [B, N, R] of the canonical shapes: for derivatives beyond the first."""
    delta = x if loc is None else x - loc
    delta = delta if m is None else delta - torch.einsum("ck,bkn->bcn", m, _ones(F))
    P = torch.einsum("bcrk,bkn->bcnr", W.expand(F.shape[0], -1, -1, -1), _ones(F))
    return delta.flatten(2), P.flatten(1, 2)


def _differentiate_twice(ctx, *grads):
    a, b, *saved = ctx.saved_tensors

    def textbook(x, loc, F, W, m, d):
        """The same two numbers from P itself."""
        delta, P = _full(x, loc, F, W, m)
        return reference.mahalanobis_and_logdet(delta, delta.new_zeros(()), P, d.flatten(1))

    return *_twice(textbook, (a, b), saved, ctx.needs, grads), *[None] * 9


def _twice(textbook, cotangents, saved, needs, grads):
    """Derivatives of the first ones of `textbook`(x, loc, F, W, m, d) with respect to `cotangents` and `saved`; `grads`
    are those of grad_x, grad_F, grad_W, grad_m and grad_d."""
    need_x, need_F, need_d = needs
    given = [t for t in saved if t is not None]
    outputs = (need_x, False, need_F, True, saved[4] is not None, need_d)

    def everything(*tensors):
        remaining = iter(tensors)
        return textbook(*(None if t is None else next(remaining) for t in saved))

    def first(a, b, *tensors):
        pulled = iter(ops.pull_back(ops.in_float64(everything), tensors, (a, b)))
        named = [None if t is None else next(pulled) for t in saved]
        return tuple(g for g, has in zip(named, outputs, strict=True) if has)

    with ops.without_autocast(saved[2].device):
        wanted = tuple(g for g, has in zip(grads, outputs[:1] + outputs[2:], strict=True) if has)
        pulled = iter(ops.pull_back(first, (*cotangents, *given), wanted))
        return *(next(pulled) for _ in cotangents), *(None if t is None else next(pulled) for t in saved)


# --- C and w alone, for conditioning ------------------------------------------------------------------------------


def _gram(x, loc, F, W, m, precision, impl):
    with ops.without_autocast(F.device):
        return IMPLEMENTATIONS[impl].linear_gram(x, loc, F, W, m, precision)


def _gram_fake(x, loc, F, W, m, precision, impl):
    (S, B), R = x.shape[:2], W.shape[2]
    return x.new_empty(B, R, R, dtype=torch.float64), x.new_empty(S, B, R, dtype=torch.float64)


ops.define(
    "linear_gram(Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m, Tensor precision, str impl)"
    " -> (Tensor C, Tensor w)",
    _gram,
    _gram_fake,
)


def _gram_backward(grad_C, grad_w, x, loc, F, W, m, precision, needs):
    with ops.without_autocast(F.device):
        return aten_linear.linear_gram_backward(grad_C, grad_w, x, loc, F, W, m, precision, needs)


def _gram_backward_fake(grad_C, grad_w, x, loc, F, W, m, precision, needs):
    contiguous, (need_x, need_F, need_precision) = torch.contiguous_format, needs
    return (
        x.new_empty(x.shape if need_x else (0,), dtype=aten.product_dtype(x, F, W, precision)),
        torch.empty_like(F) if need_F else F.new_empty(0),
        torch.empty_like(W, memory_format=contiguous),
        F.new_empty(0) if m is None else torch.empty_like(m, memory_format=contiguous),
        torch.empty_like(precision, memory_format=contiguous) if need_precision else precision.new_empty(0),
    )


ops.define(
    "linear_gram_backward(Tensor grad_C, Tensor grad_w, Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m,"
    " Tensor precision, bool[3] needs) -> (Tensor grad_x, Tensor grad_F, Tensor grad_W, Tensor grad_m,"
    " Tensor grad_precision)",
    _gram_backward,
    _gram_backward_fake,
)


def _setup_context_gram(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])


def _differentiate_gram(ctx, grad_C, grad_w):
    x, loc, *_ = ctx.saved_tensors
    need_x, need_loc, need_F, need_W, need_m, need_precision, _ = ctx.needs_input_grad
    grad_x, grad_F, grad_W, grad_m, grad_precision = gram_backward(
        grad_C, grad_w, *ctx.saved_tensors, [need_x or need_loc, need_F, need_precision]
    )
    return (
        grad_x.to(x.dtype) if need_x else None,
        _grad_loc(grad_x, x, loc) if need_loc else None,
        grad_F if need_F else None,
        grad_W if need_W else None,
        grad_m if need_m else None,
        grad_precision if need_precision else None,
        None,
    )


def _setup_context_gram_twice(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.needs = inputs[8]


def _differentiate_gram_twice(ctx, *grads):
    a, b, *saved = ctx.saved_tensors

    def textbook(x, loc, F, W, m, precision):
        delta, P = _full(x, loc, F, W, m)
        scaled = P * precision.expand(-1, W.shape[1], F.shape[2]).flatten(1).unsqueeze(-1)
        return scaled.mT @ P, torch.einsum("sbn,bnr->sbr", delta, scaled)

    return *_twice(textbook, (a, b), saved, ctx.needs, grads), None


# --- diag PPᵀ, for variances: what C's trace says about the precision ----------------------------------------------


def _trace_gradient(F: Tensor, W: Tensor, precision: Tensor, needs: list[bool]):
    """Of tr C = R + Σ_n πₙ|pₙ|²: with respect to the precision π it is what is wanted, whatever π is."""
    B, R = F.shape[0], W.shape[2]
    identity = torch.eye(R, dtype=torch.float64, device=F.device).expand(B, R, R)
    nothing = precision.new_empty(0, *precision.shape)
    return gram_backward(identity, identity.new_empty(0, B, R), nothing, None, F, W, None, precision, needs)


def _row_norms(F, W):
    ones = F.new_ones((), dtype=aten.product_dtype(F, W)).expand(F.shape[0], W.shape[1], F.shape[2])
    return _trace_gradient(F, W, ones, [False, False, True])[4]


def _row_norms_fake(F, W):
    return F.new_empty(F.shape[0], W.shape[1], F.shape[2], dtype=aten.product_dtype(F, W))


ops.define("linear_row_norms(Tensor F, Tensor W) -> Tensor", _row_norms, _row_norms_fake)


def _setup_context_norms(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_norms(ctx, grad):
    F, W = ctx.saved_tensors
    _, grad_F, grad_W, _, _ = _trace_gradient(F, W, grad, [False, True, False])
    return grad_F, grad_W


# --- Batching -------------------------------------------------------------------------------------------------------
# The mapped dimension V joins the items, with a weight for each, where the features are mapped and no mean is learned
# from them; else the operator is called V times, on views.


def _batched(
    operator, tensors: int, at_B: tuple[int, ...], outputs_at_B: tuple[int, ...], F: int, W: int, m: int | None
):
    """A batching rule. `at_B` says where B is in each tensor, `outputs_at_B` in each output; F, W and m, which inputs
    these are. An output of W's shape comes where `outputs_at_B` has −1: summed over items that share a weight."""

    def rule(info, in_dims, *inputs):
        V, given, rest = info.batch_size, inputs[:tensors], inputs[tensors:]
        if in_dims[F] is None or (m is not None and given[m] is not None):
            calls = [
                operator(
                    *(t if dim is None else t.select(dim, v) for t, dim in zip(given, in_dims, strict=False)), *rest
                )
                for v in range(V)
            ]
            if len(outputs_at_B) == 1:
                return torch.stack(calls), 0
            return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(outputs_at_B)
        joined: list[Any] = []
        B = given[F].movedim(in_dims[F], 0).shape[1]
        for i, (t, dim, at) in enumerate(zip(given, in_dims, at_B, strict=False)):
            if t is None:
                joined.append(None)
                continue
            front = ops._front(t, dim, V)
            if i == W:
                front = front.expand(V, B, *front.shape[2:])
            joined.append(front.movedim(0, at).flatten(at, at + 1))
        shared = given[W].movedim(in_dims[W], 0).shape[1] == 1 if in_dims[W] is not None else given[W].shape[0] == 1
        outputs = []
        made = operator(*joined, *rest)
        for t, at in zip((made,) if isinstance(made, Tensor) else made, outputs_at_B, strict=True):
            if t.numel() == 0 and t.dim() == 1:  # not needed
                outputs.append(t.expand(V, 0))
                continue
            t = t.unflatten(max(at, 0), (V, B)).movedim(max(at, 0), 0)
            outputs.append(t.sum(1, keepdim=True) if at < 0 and shared else t)
        return (outputs[0], 0) if len(outputs) == 1 else (tuple(outputs), (0,) * len(outputs))

    return rule


mahalanobis_and_logdet: Any = ops._register(
    "linear_mahalanobis_and_logdet",
    _setup_context,
    _differentiate,
    _batched(
        lambda *inputs: mahalanobis_and_logdet(*inputs),
        6,
        (1, 1, 0, 0, 0, 0),
        (1, 0, 0, 1, 1, 0, 0, 1, 0),
        F=2,
        W=3,
        m=4,
    ),
)
mahalanobis_and_logdet_backward: Any = ops._register(
    "linear_mahalanobis_and_logdet_backward",
    _setup_context_twice,
    _differentiate_twice,
    _batched(
        lambda *inputs: mahalanobis_and_logdet_backward(*inputs),
        15,
        (1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0),
        (1, 0, -1, 0, 0),
        F=4,
        W=5,
        m=6,
    ),
)
gram: Any = ops._register(
    "linear_gram",
    _setup_context_gram,
    _differentiate_gram,
    _batched(lambda *inputs: gram(*inputs), 6, (1, 1, 0, 0, 0, 0), (0, 1), F=2, W=3, m=4),
)
gram_backward: Any = ops._register(
    "linear_gram_backward",
    _setup_context_gram_twice,
    _differentiate_gram_twice,
    _batched(lambda *inputs: gram_backward(*inputs), 8, (0, 1, 1, 1, 0, 0, 0, 0), (1, 0, -1, 0, 0), F=4, W=5, m=6),
)
row_norms: Any = ops._register(
    "linear_row_norms",
    _setup_context_norms,
    _differentiate_norms,
    _batched(lambda *inputs: row_norms(*inputs), 2, (0, 0), (0,), F=0, W=1, m=None),
)
