"""The operators as torch sees them: schema, shapes, derivatives and batching, once for every implementation.

An implementation is a module with the functions that `aten` has; the last argument of an operator names it. Each
operator is opaque to `torch.compile` and `torch.export` (no graph break), has a rule for `torch.func.vmap`, and
differentiates in closed form. What lies beyond the first derivative goes through the formulas of `reference` in
float64, where they are exact enough.

An operator of `torch.library` and its derivative do not take part in the transforms of `torch.func` outside of
`torch.compile` (torch 2.13); there the same three functions (context, derivative, batching rule) are called as an
`autograd.Function`.
"""

import importlib
import importlib.util
import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, reference


class WhenUsed(ModuleType):
    """A module of this package that is imported when something of it is asked for: no import of ours imports Triton."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


IMPLEMENTATIONS: dict[str, ModuleType] = {"aten": aten}
if importlib.util.find_spec("triton") is not None:
    IMPLEMENTATIONS["triton"] = WhenUsed(f"{__package__}.triton")

library = torch.library.Library("lowrank_mvn", "DEF")


def define(schema: str, kernel, fake) -> None:
    name = schema.split("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank_mvn::{name}", fake, lib=library)


def runs_on(impl: str, device: torch.device) -> bool:
    """Whether an implementation can take tensors of that device; Triton's takes CPU tensors in its interpreter only."""
    return impl != "triton" or device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def forward_mode() -> bool:
    """Whether forward-mode differentiation is under way: the operators do not take part in it."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of `torch.func` is under way (while compiling, the compiler sees to it)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _register(name: str, setup_context, differentiate, batched):
    """Derivative and batching rule of an operator; returns what calls it, transforms of `torch.func` or not."""
    qualname = f"lowrank_mvn::{name}"
    torch.library.register_autograd(qualname, differentiate, setup_context=setup_context, lib=library)
    torch.library.register_vmap(qualname, batched, lib=library)
    operator = getattr(torch.ops.lowrank_mvn, name)
    members = {
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(differentiate),
        "vmap": staticmethod(batched),
    }
    function: Any = type(name, (torch.autograd.Function,), members)
    return lambda *inputs: function.apply(*inputs) if transformed() else operator(*inputs)


def without_autocast(device: torch.device):
    """The operators choose their own precision. Tensors without values have no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def pull_back(function, inputs, cotangents):
    """∂(cotangents · function)/∂inputs, differentiable again."""
    pull: Any = torch.func.vjp(function, *inputs)[1]
    return pull(cotangents)


def in_float64(function):
    """`function` of float64 copies, differentiable with respect to the originals."""
    return lambda *tensors: function(*(t.double() for t in tensors))


# --- q = δᵀΣ⁻¹δ and log|Σ| ------------------------------------------------------------------------------------


def _forward(x, loc, P, d, C_inv, logdet, wide, impl):
    with without_autocast(P.device):
        return IMPLEMENTATIONS[impl].mahalanobis_and_logdet(x, loc, P, d, C_inv, logdet, wide)


def _forward_fake(x, loc, P, d, C_inv, logdet, wide, impl):
    (S, B, N), R = x.shape, P.shape[2]
    keeps = IMPLEMENTATIONS[impl].KEEPS_RESIDUAL
    new = P.new_empty
    return (
        new(S, B, dtype=torch.float64),
        new(B, dtype=torch.float64),
        new(B, R, R, dtype=torch.float64),
        new(S, B, R, dtype=torch.float64),
        new(S, B, R if keeps else 0, dtype=torch.float64),
        new(S, B, N if keeps else 0, dtype=aten.product_dtype(x, loc, P, d) if keeps else torch.float64),
        new(B, dtype=torch.bool),
    )


define(
    "mahalanobis_and_logdet(Tensor x, Tensor loc, Tensor P, Tensor d, Tensor? C_inv, Tensor? logdet, Tensor? wide,"
    " str impl) -> (Tensor mahalanobis, Tensor logdet, Tensor C_inv, Tensor v, Tensor step,"
    " Tensor residual, Tensor wide)",
    _forward,
    _forward_fake,
)


def _backward(grad_mahalanobis, grad_logdet, x, loc, P, d, C_inv, v, step, residual, wide, needs, impl):
    with without_autocast(P.device):
        return IMPLEMENTATIONS[impl].mahalanobis_and_logdet_backward(
            grad_mahalanobis, grad_logdet, x, loc, P, d, C_inv, v, step, residual, wide, needs
        )


def _backward_fake(grad_mahalanobis, grad_logdet, x, loc, P, d, C_inv, v, step, residual, wide, needs, impl):
    contiguous = torch.contiguous_format
    grads = (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(loc, memory_format=contiguous),
        torch.empty_like(P),
        torch.empty_like(d, memory_format=contiguous),
    )
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True))


define(
    "mahalanobis_and_logdet_backward(Tensor grad_mahalanobis, Tensor grad_logdet, Tensor x, Tensor loc, Tensor P,"
    " Tensor d, Tensor C_inv, Tensor v, Tensor step, Tensor residual, Tensor wide, bool[4] needs, str impl)"
    " -> (Tensor grad_x, Tensor grad_loc, Tensor grad_P, Tensor grad_d)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, loc, P, d, _, _, _, ctx.impl = inputs
    _, _, *kept = output
    ctx.save_for_backward(x, loc, P, d, *kept)
    ctx.mark_non_differentiable(*kept)


def _differentiate(ctx, grad_mahalanobis, grad_logdet, *_):
    needs = list(ctx.needs_input_grad[:4])
    grads = mahalanobis_and_logdet_backward(grad_mahalanobis, grad_logdet, *ctx.saved_tensors, needs, ctx.impl)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None


def _setup_context_twice(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.needs = inputs[11]


def _differentiate_twice(ctx, *grads):
    """C⁻¹, v, r and `wide` are functions of the other inputs: what goes through them is in the total derivative."""

    def first(a, b, *inputs):
        pulled = pull_back(in_float64(reference.mahalanobis_and_logdet), inputs, (a, b))
        return tuple(g for g, need in zip(pulled, ctx.needs, strict=True) if need)

    with without_autocast(grads[0].device):
        wanted = tuple(g for g, need in zip(grads, ctx.needs, strict=True) if need)
        return *pull_back(first, ctx.saved_tensors, wanted), *[None] * 7


# --- C and w alone, for conditioning ------------------------------------------------------------------------


def _gram(x, loc, P, precision, impl):
    with without_autocast(P.device):
        return IMPLEMENTATIONS[impl].gram(x, loc, P, precision)


def _gram_fake(x, loc, P, precision, impl):
    (S, B, _), R = x.shape, P.shape[2]
    return P.new_empty(B, R, R, dtype=torch.float64), P.new_empty(S, B, R, dtype=torch.float64)


define(
    "gram(Tensor x, Tensor loc, Tensor P, Tensor precision, str impl) -> (Tensor C, Tensor w)",
    _gram,
    _gram_fake,
)


def _setup_context_gram(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _differentiate_gram(ctx, grad_C, grad_w):
    def gram(x, loc, P, precision):
        weighted = P * precision.unsqueeze(-1)
        return weighted.mT @ P, torch.einsum("sbn,bnr->sbr", x - loc, weighted)

    with without_autocast(grad_C.device):
        return *pull_back(in_float64(gram), ctx.saved_tensors, (grad_C, grad_w)), None


# --- Batching: the mapped dimension V joins the items B or, where P and d are shared, the samples S ------------


def _front(t: Tensor, dim: int | None, V: int) -> Tensor:
    """The mapped dimension in front; a tensor that is not mapped is expanded. A view."""
    return t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _into_items(t: Tensor | None, dim: int | None, V: int, at: int = 0) -> Tensor | None:
    """[..., B, ...] with V mapped -> [..., V·B, ...], B at position `at`. P of one item is not copied."""
    return None if t is None else _front(t, dim, V).movedim(0, at).flatten(at, at + 1)


def _into_samples(t: Tensor, dim: int | None, V: int, S: int) -> Tensor:
    """[S or 1, ...] with V mapped -> [V·S, ...]."""
    front = _front(t, dim, V)
    return front.expand(V, S, *front.shape[2:]).flatten(0, 1)


def _samples(t: Tensor, dim: int | None) -> int:
    """S of a tensor [S, B, N] that may have a mapped dimension beside."""
    return t.shape[0] if dim is None else t.movedim(dim, 0).shape[1]


def _split(t: Tensor, V: int, at: int = 0) -> Tensor:
    """Undoes `_into_items` and `_into_samples`: V in front again."""
    return t.unflatten(at, (V, t.shape[at] // V)).movedim(at, 0)


def _batched_forward(info, in_dims, x, loc, P, d, C_inv, logdet, wide, impl):
    V, op = info.batch_size, mahalanobis_and_logdet
    if all(dim is None for dim in in_dims[2:7]):
        S = _samples(x, in_dims[0])
        x = _into_samples(x, in_dims[0], V, S)
        if in_dims[1] is not None or loc.shape[0] != 1:
            loc = _into_samples(loc, in_dims[1], V, S)
        q, logdet, C_inv, v, step, residual, wide = op(x, loc, P, d, C_inv, logdet, wide, impl)
        q, v, step, residual = (_split(t, V) for t in (q, v, step, residual))
        return (q, logdet, C_inv, v, step, residual, wide), (0, None, None, 0, 0, 0, None)
    samples = [_into_items(t, dim, V, at=1) for t, dim in zip((x, loc), in_dims[:2], strict=True)]
    items = [_into_items(t, dim, V) for t, dim in zip((P, d, C_inv, logdet, wide), in_dims[2:7], strict=True)]
    at = (1, 0, 0, 1, 1, 1, 0)  # where B is in q, log|Σ|, C⁻¹, v, its step, r, `wide`
    return tuple(_split(t, V, i) for t, i in zip(op(*samples, *items, impl), at, strict=True)), (0,) * 7


def _batched_backward(info, in_dims, a, b, x, loc, P, d, C_inv, v, step, residual, wide, needs, impl):
    V, op = info.batch_size, mahalanobis_and_logdet_backward
    dim_a, dim_b, dim_x, dim_loc, dim_P, dim_d, dim_C_inv, dim_v, dim_step, dim_residual, dim_wide = in_dims[:11]
    dims = (dim_a, dim_x, dim_loc, dim_v, dim_step, dim_residual)
    of_samples = zip((a, x, loc, v, step, residual), dims, strict=True)
    need_x, need_loc, need_P, need_d = needs
    if not need_P and not need_d and all(dim is None for dim in (dim_P, dim_d, dim_C_inv, dim_wide)):
        S, one_loc = _samples(x, dim_x), _samples(loc, dim_loc) == 1
        a, x, loc, v, step, residual = (_into_samples(t, dim, V, S) for t, dim in of_samples)
        b = torch.zeros_like(_front(b, dim_b, V)[0])  # without grad_P and grad_d nothing depends on it
        grads = op(a, b, x, loc, P, d, C_inv, v, step, residual, wide, needs, impl)
        grad_x, grad_loc, grad_P, grad_d = grads
        if need_loc:
            grad_loc = _split(grad_loc, V)
            grad_loc = grad_loc.sum(1, keepdim=True) if one_loc else grad_loc
        grad_x = _split(grad_x, V) if need_x else grad_x
        return (grad_x, grad_loc, grad_P, grad_d), (
            0 if need_x else None,
            0 if need_loc else None,
            None,
            None,
        )
    a, x, loc, v, step, residual = (_into_items(t, dim, V, at=1) for t, dim in of_samples)
    b, P, d, C_inv, wide = (
        _into_items(t, dim, V) for t, dim in ((b, dim_b), (P, dim_P), (d, dim_d), (C_inv, dim_C_inv), (wide, dim_wide))
    )
    grads = op(a, b, x, loc, P, d, C_inv, v, step, residual, wide, needs, impl)
    positions = (1, 1, 0, 0)
    split = tuple(_split(g, V, at) if need else g for g, at, need in zip(grads, positions, needs, strict=True))
    return split, tuple(0 if need else None for need in needs)


def _batched_gram(info, in_dims, x, loc, P, precision, impl):
    V = info.batch_size
    x, loc = (_into_items(t, dim, V, at=1) for t, dim in zip((x, loc), in_dims[:2], strict=True))
    P, precision = (_into_items(t, dim, V) for t, dim in zip((P, precision), in_dims[2:4], strict=True))
    C, w = gram(x, loc, P, precision, impl)
    return (_split(C, V), _split(w, V, 1)), (0, 0)


mahalanobis_and_logdet = _register("mahalanobis_and_logdet", _setup_context, _differentiate, _batched_forward)
mahalanobis_and_logdet_backward = _register(
    "mahalanobis_and_logdet_backward", _setup_context_twice, _differentiate_twice, _batched_backward
)
gram = _register("gram", _setup_context_gram, _differentiate_gram, _batched_gram)
