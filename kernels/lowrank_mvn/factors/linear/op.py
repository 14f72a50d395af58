"""The operators for a linear factor as torch sees them; `registry` says how.

Canonical shapes are those of `aten`. Nothing here makes P but derivatives beyond the first.
"""

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...batching import front, joined, one_by_one, outputs_of, parted
from ...capacitance import product_dtype
from ...registry import Operator, implementations, kept, like
from . import aten, forms

IMPLEMENTATIONS = implementations(__package__)

# Channels are c, pixels n, and rows of F, with or without the ones, k.
DIMS = {
    **dict.fromkeys(("x", "loc", "grad_x", "residual"), "SBcn"),
    **dict.fromkeys(("F", "grad_F"), "Bkn"),
    **dict.fromkeys(("W", "grad_W"), "BcRk"),
    **dict.fromkeys(("m", "grad_m"), "ck"),
    **dict.fromkeys(("d", "precision", "grad_d", "grad_precision", "norms", "grad_norms"), "Bcn"),
    **dict.fromkeys(("gram", "grad_gram", "L_inv"), "BRR"),
    **dict.fromkeys(("v", "step", "w", "grad_w"), "SBR"),
    **dict.fromkeys(("mahalanobis", "grad_mahalanobis"), "SB"),
    **dict.fromkeys(("logdet", "grad_logdet", "wide"), "B"),
    "WG": "BcRk",
    "zF": "BSck",
}


def _batched(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    """The mapped dimension joins the items, with a weight for each, where the features are mapped and no mean is
    learned from them; else the operator is called for one after the other.

    A gradient of W is summed over items that share it.
    """
    if "F" not in mapped or given.get("m") is not None:
        return one_by_one(op, V, given, mapped)
    B = front(given["F"], mapped["F"], V).shape[1]
    shared = front(given["W"], mapped.get("W"), V).shape[1] == 1

    def join(n: str, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if n == "W":
            t = front(t, mapped.get(n), V)
            return t.expand(V, B, *t.shape[2:]).flatten(0, 1)
        return joined(t, mapped.get(n), V, op.dims[n].index("B"))

    def part(n: str, t: Tensor) -> tuple[Tensor, int]:
        t = parted(t, V, op.dims[n].index("B"))
        return (t.sum(1, keepdim=True) if n == "grad_W" and shared else t), 0

    return outputs_of(op, op(*(join(n, t) for n, t in given.items())), part)


def _of_loc(grad_x: Tensor, x: Tensor, loc: Tensor) -> Tensor:
    return -(grad_x if loc.shape[0] == x.shape[0] else grad_x.sum(0, keepdim=True)).to(loc.dtype)


def _of_parameters(found: dict[str, Tensor], saved: Any, needs: Any) -> dict[str, Tensor]:
    """With the gradient of loc, which follows from that of x."""
    if needs.loc:
        found["loc"] = _of_loc(found["x"], saved.x, saved.loc)
    return found | {"x": found["x"].to(saved.x.dtype)}


# --- q = δᵀΣ⁻¹δ and log|Σ| ----------------------------------------------------------------------------------------


def _products(x: Tensor, W: Tensor, d: Tensor, impl: str) -> int:
    """K+1 where W_cG_c and F̃z_c are kept, else 0."""
    channels, R, K1 = W.shape[1:]
    return K1 if IMPLEMENTATIONS[impl].keeps_products(channels, R, K1, not forms.one_d(d)) else 0


def _forward_fake(x, loc, F, W, m, d, impl):  # type: ignore[no-untyped-def]
    (S, B, channels, pixels), R, kept_ = x.shape, W.shape[2], _products(x, W, d, impl)

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return (
        new(S, B),
        new(B),
        new(B, R, R),
        new(S, B, R),
        new(S, B, R),
        new(B, channels, R, kept_),
        new(B, S, channels, kept_),
        new(S, B, channels, pixels, dtype=product_dtype(x, F, W, d)),
        new(B, dtype=torch.bool),
    )


def _forward(x, loc, F, W, m, d, impl):  # type: ignore[no-untyped-def]
    return tuple(t.contiguous() for t in IMPLEMENTATIONS[impl].mahalanobis_and_logdet(x, loc, F, W, m, d))


mahalanobis_and_logdet = Operator(
    "linear_mahalanobis_and_logdet(Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m, Tensor d, str impl)"
    " -> (Tensor mahalanobis, Tensor logdet, Tensor L_inv, Tensor v, Tensor step, Tensor WG, Tensor zF,"
    " Tensor residual, Tensor wide)",
    _forward,
    _forward_fake,
    DIMS,
)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, x, _, F, W, m, d, *_, (need_x, need_F, need_d), _ = inputs
    return (
        x.new_empty(x.shape if need_x else (0,), dtype=product_dtype(x, F, W, d)),
        kept(torch.empty_like(F), need_F),
        like(W),
        F.new_empty(0) if m is None else like(m),
        kept(like(d), need_d),
    )


mahalanobis_and_logdet_backward = Operator(
    "linear_mahalanobis_and_logdet_backward(Tensor grad_mahalanobis, Tensor grad_logdet, Tensor x, Tensor? loc,"
    " Tensor F, Tensor W, Tensor? m, Tensor d, Tensor L_inv, Tensor v, Tensor step, Tensor WG, Tensor zF,"
    " Tensor residual, Tensor wide, bool[3] needs, str impl)"
    " -> (Tensor grad_x, Tensor grad_F, Tensor grad_W, Tensor grad_m, Tensor grad_d)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].mahalanobis_and_logdet_backward(*inputs[:-1]),
    _backward_fake,
    DIMS,
)
PARAMETERS = "x", "loc", "F", "W", "m", "d"


def _full(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
    """δ [S, B, N] and P [B, N, R] of the canonical shapes: for derivatives beyond the first."""
    ones = torch.cat([F, torch.ones_like(F[:, :1])], 1)
    delta = x if loc is None else x - loc
    delta = delta if m is None else delta - torch.einsum("ck,bkn->bcn", m, ones)
    return delta.flatten(2), _full_factor(F, W)


def _full_factor(F: Tensor, W: Tensor) -> Tensor:
    ones = torch.cat([F, torch.ones_like(F[:, :1])], 1)
    return torch.einsum("bcrk,bkn->bcnr", W.expand(F.shape[0], -1, -1, -1), ones).flatten(1, 2)


def _textbook(x: Any, loc: Any, F: Any, W: Any, m: Any, d: Any) -> tuple[Tensor, Tensor]:
    delta, P = _full(x, loc, F, W, m)
    return reference.mahalanobis_and_logdet(delta, delta.new_zeros(()), P, d.flatten(1))


def _textbook_logdet(F: Tensor, W: Tensor, d: Tensor) -> Tensor:
    return reference.logdet(_full_factor(F, W), d.flatten(1))


def _weighted(F: Tensor, W: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    P = _full_factor(F, W)
    return P, P * precision.expand(-1, W.shape[1], F.shape[2]).flatten(1).unsqueeze(-1)


def _textbook_gram(F: Tensor, W: Tensor, precision: Tensor) -> Tensor:
    P, scaled = _weighted(F, W, precision)
    return scaled.mT @ P


def _textbook_equations(x: Any, loc: Any, F: Any, W: Any, m: Any, precision: Any) -> tuple[Tensor, Tensor]:
    P, scaled = _weighted(F, W, precision)
    return scaled.mT @ P, torch.einsum("sbn,bnr->sbr", _full(x, loc, F, W, m)[0], scaled)


mahalanobis_and_logdet.differentiate_by(
    mahalanobis_and_logdet_backward, ("x|loc", "F", "d"), _batched, finish=_of_parameters
)
mahalanobis_and_logdet_backward.differentiate_again(_textbook, PARAMETERS, _batched)


# --- log|Σ| alone, for an entropy without a density -------------------------------------------------------------------


def _logdet_fake(F, W, d, impl):  # type: ignore[no-untyped-def]
    B, (channels, R) = F.shape[0], W.shape[1:3]

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=F.device)

    return new(B), new(B, R, R), new(B, channels, R, _products(F, W, d, impl)), new(B, dtype=torch.bool)


logdet = Operator(
    "linear_logdet(Tensor F, Tensor W, Tensor d, str impl) -> (Tensor logdet, Tensor L_inv, Tensor WG, Tensor wide)",
    lambda F, W, d, impl: IMPLEMENTATIONS[impl].logdet(F, W, d),
    _logdet_fake,
    DIMS,
)


def _logdet_backward_fake(grad_logdet, F, W, d, L_inv, WG, wide, needs, impl):  # type: ignore[no-untyped-def]
    return kept(torch.empty_like(F), needs[0]), like(W), kept(like(d), needs[1])


logdet_backward = Operator(
    "linear_logdet_backward(Tensor grad_logdet, Tensor F, Tensor W, Tensor d, Tensor L_inv, Tensor WG, Tensor wide,"
    " bool[2] needs, str impl) -> (Tensor grad_F, Tensor grad_W, Tensor grad_d)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].logdet_backward(*inputs[:-1]),
    _logdet_backward_fake,
    DIMS,
)
logdet.differentiate_by(logdet_backward, ("F", "d"), _batched)
logdet_backward.differentiate_again(_textbook_logdet, ("F", "W", "d"), _batched)


# --- PᵀDP, and with it the projection of δ: for conditionals and principal components -----------------------------


gram = Operator(
    "linear_gram(Tensor F, Tensor W, Tensor precision, str impl) -> Tensor gram",
    lambda F, W, precision, impl: IMPLEMENTATIONS[impl].gram(F, W, precision),
    lambda F, W, precision, impl: F.new_empty(F.shape[0], W.shape[2], W.shape[2], dtype=torch.float64),
    DIMS,
)


def _gram_backward_fake(grad_gram, F, W, precision, needs):  # type: ignore[no-untyped-def]
    return kept(torch.empty_like(F), needs[0]), like(W), kept(like(precision), needs[1])


gram_backward = Operator(
    "linear_gram_backward(Tensor grad_gram, Tensor F, Tensor W, Tensor precision, bool[2] needs)"
    " -> (Tensor grad_F, Tensor grad_W, Tensor grad_precision)",
    aten.gram_backward,
    _gram_backward_fake,
    DIMS,
)
gram.differentiate_by(gram_backward, ("F", "precision"), _batched)
gram_backward.differentiate_again(_textbook_gram, ("F", "W", "precision"), _batched)


def _equations_fake(x, loc, F, W, m, precision, impl):  # type: ignore[no-untyped-def]
    (S, B), R = x.shape[:2], W.shape[2]
    return x.new_empty(B, R, R, dtype=torch.float64), x.new_empty(S, B, R, dtype=torch.float64)


normal_equations = Operator(
    "linear_normal_equations(Tensor x, Tensor? loc, Tensor F, Tensor W, Tensor? m, Tensor precision, str impl)"
    " -> (Tensor gram, Tensor w)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].normal_equations(*inputs[:-1]),
    _equations_fake,
    DIMS,
)
normal_equations_backward = Operator(
    "linear_normal_equations_backward(Tensor grad_gram, Tensor grad_w, Tensor x, Tensor? loc, Tensor F, Tensor W,"
    " Tensor? m, Tensor precision, bool[3] needs) -> (Tensor grad_x, Tensor grad_F, Tensor grad_W, Tensor grad_m,"
    " Tensor grad_precision)",
    aten.normal_equations_backward,
    lambda *inputs: _backward_fake(*inputs, ""),
    DIMS,
)
normal_equations.differentiate_by(
    normal_equations_backward, ("x|loc", "F", "precision"), _batched, finish=_of_parameters
)
normal_equations_backward.differentiate_again(_textbook_equations, (*PARAMETERS[:-1], "precision"), _batched)


# --- diag PPᵀ, for variances --------------------------------------------------------------------------------------


row_norms = Operator(
    "linear_row_norms(Tensor F, Tensor W) -> Tensor norms",
    aten.row_norms,
    lambda F, W: F.new_empty(F.shape[0], W.shape[1], F.shape[2], dtype=product_dtype(F, W)),
    DIMS,
)
row_norms_backward = Operator(
    "linear_row_norms_backward(Tensor grad_norms, Tensor F, Tensor W, bool need_F) -> (Tensor grad_F, Tensor grad_W)",
    aten.row_norms_backward,
    lambda grad_norms, F, W, need_F: (kept(torch.empty_like(F), need_F), like(W)),
    DIMS,
)


def _textbook_norms(F: Tensor, W: Tensor) -> Tensor:
    return _full_factor(F, W).square().sum(-1).view(F.shape[0], W.shape[1], F.shape[2])


row_norms.differentiate_by(row_norms_backward, batched=_batched)
row_norms_backward.differentiate_again(_textbook_norms, ("F", "W"), _batched)
