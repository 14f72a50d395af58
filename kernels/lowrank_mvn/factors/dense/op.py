"""The operators for a factor that is a tensor, as torch sees them; `registry` says how.

    x    [S, B, N]                 P  [B, N, R], any strides        ω_p  [S, B, R]
    loc  [S, B, N] or [1, B, N]    d  [B, N] or [B, 1]              ω_d  [S, B, N], or a seed for each item [B]

An implementation is a module with the functions that `aten` has; the last argument of an operator names it. What lies
beyond the first derivative goes through the formulas of `reference` in float64, where they are exact enough.
"""

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...batching import front, into_items, into_samples
from ...capacitance import product_dtype
from ...registry import Operator, implementations, kept, like

IMPLEMENTATIONS = implementations(__package__)

DIMS = {
    **dict.fromkeys(("x", "loc", "residual", "omega_d", "y"), "SBN"),
    **dict.fromkeys(("grad_x", "grad_loc", "grad_y", "grad_omega_d"), "SBN"),
    **dict.fromkeys(("v", "step", "w", "omega_p"), "SBR"),
    **dict.fromkeys(("mahalanobis", "grad_mahalanobis"), "SB"),
    **dict.fromkeys(("P", "grad_P"), "BNR"),
    **dict.fromkeys(("d", "precision", "grad_d"), "BN"),
    **dict.fromkeys(("gram", "L_inv"), "BRR"),
    **dict.fromkeys(("logdet", "grad_logdet", "wide", "seed"), "B"),
}


# --- q = δᵀΣ⁻¹δ and log|Σ| ------------------------------------------------------------------------------------------


def _forward_fake(x, loc, P, d, L_inv, logdet, wide, impl):  # type: ignore[no-untyped-def]
    (S, B, N), R = x.shape, P.shape[2]
    new = P.new_empty
    return (
        new(S, B, dtype=torch.float64),
        new(B, dtype=torch.float64),
        new(B, R, R, dtype=torch.float64),
        new(S, B, R, dtype=torch.float64),
        new(S, B, R, dtype=torch.float64),
        new(S, B, N, dtype=product_dtype(x, loc, P, d)),
        new(B, dtype=torch.bool),
    )


mahalanobis_and_logdet = Operator(
    "mahalanobis_and_logdet(Tensor x, Tensor loc, Tensor P, Tensor d, Tensor? L_inv, Tensor? logdet, Tensor? wide,"
    " str impl) -> (Tensor mahalanobis, Tensor logdet, Tensor L_inv, Tensor v, Tensor step,"
    " Tensor residual, Tensor wide)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].mahalanobis_and_logdet(*inputs[:-1]),
    _forward_fake,
    DIMS,
)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, x, loc, P, d, *_, needs, _ = inputs
    grads = like(x), like(loc), torch.empty_like(P), like(d)
    return tuple(kept(g, need) for g, need in zip(grads, needs, strict=True))


mahalanobis_and_logdet_backward = Operator(
    "mahalanobis_and_logdet_backward(Tensor grad_mahalanobis, Tensor grad_logdet, Tensor x, Tensor loc, Tensor P,"
    " Tensor d, Tensor L_inv, Tensor v, Tensor step, Tensor residual, Tensor wide, bool[4] needs, str impl)"
    " -> (Tensor grad_x, Tensor grad_loc, Tensor grad_P, Tensor grad_d)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].mahalanobis_and_logdet_backward(*inputs[:-1]),
    _backward_fake,
    DIMS,
)
PARAMETERS = "x", "loc", "P", "d"


def _batched(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    if mapped.keys() & {"P", "d", "L_inv", "logdet", "wide"}:
        return into_items(op, V, given, mapped)
    return into_samples(op, V, given, mapped, shared="loc")


def _batched_backward(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    _, need_loc, need_P, need_d = given["needs"]
    if need_P or need_d or mapped.keys() & {"P", "d", "L_inv", "wide"}:
        return into_items(op, V, given, mapped)
    if "grad_logdet" in mapped:  # without grad_P and grad_d nothing depends on it
        given = given | {"grad_logdet": torch.zeros_like(given["grad_logdet"].select(mapped["grad_logdet"], 0))}
    one_loc = front(given["loc"], mapped.get("loc"), V).shape[1] == 1
    (grad_x, grad_loc, *rest), dims = into_samples(op, V, given, mapped)
    return (grad_x, grad_loc.sum(1, keepdim=True) if need_loc and one_loc else grad_loc, *rest), dims


mahalanobis_and_logdet.differentiate_by(mahalanobis_and_logdet_backward, PARAMETERS, _batched)
mahalanobis_and_logdet_backward.differentiate_again(reference.mahalanobis_and_logdet, PARAMETERS, _batched_backward)


# --- log|Σ| alone, for an entropy without a density -------------------------------------------------------------------


def _logdet_fake(P, d, impl):  # type: ignore[no-untyped-def]
    B, _, R = P.shape
    new = P.new_empty
    return new(B, dtype=torch.float64), new(B, R, R, dtype=torch.float64), new(B, dtype=torch.bool)


logdet = Operator(
    "logdet(Tensor P, Tensor d, str impl) -> (Tensor logdet, Tensor L_inv, Tensor wide)",
    lambda P, d, impl: IMPLEMENTATIONS[impl].logdet(P, d),
    _logdet_fake,
    DIMS,
)


def _logdet_backward_fake(grad_logdet, P, d, L_inv, wide, needs, impl):  # type: ignore[no-untyped-def]
    return kept(torch.empty_like(P), needs[0]), kept(like(d), needs[1])


logdet_backward = Operator(
    "logdet_backward(Tensor grad_logdet, Tensor P, Tensor d, Tensor L_inv, Tensor wide, bool[2] needs, str impl)"
    " -> (Tensor grad_P, Tensor grad_d)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].logdet_backward(*inputs[:-1]),
    _logdet_backward_fake,
    DIMS,
)
logdet.differentiate_by(logdet_backward, ("P", "d"))
logdet_backward.differentiate_again(reference.logdet, ("P", "d"))


# --- PᵀDP, and with it the projection of δ: for conditionals and principal components -----------------------------


def _textbook_gram(P: Tensor, precision: Tensor) -> Tensor:
    return (P * precision.unsqueeze(-1)).mT @ P


def _textbook_normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    weighted = P * precision.unsqueeze(-1)
    return weighted.mT @ P, torch.einsum("sbn,bnr->sbr", x - loc, weighted)


gram = Operator(
    "gram(Tensor P, Tensor precision, str impl) -> Tensor gram",
    lambda P, precision, impl: IMPLEMENTATIONS[impl].gram(P, precision),
    lambda P, precision, impl: P.new_empty(P.shape[0], P.shape[2], P.shape[2], dtype=torch.float64),
    DIMS,
)
gram.differentiate(_textbook_gram)


def _normal_equations_fake(x, loc, P, precision, impl):  # type: ignore[no-untyped-def]
    (S, B, _), R = x.shape, P.shape[2]
    return P.new_empty(B, R, R, dtype=torch.float64), P.new_empty(S, B, R, dtype=torch.float64)


normal_equations = Operator(
    "normal_equations(Tensor x, Tensor loc, Tensor P, Tensor precision, str impl) -> (Tensor gram, Tensor w)",
    lambda x, loc, P, precision, impl: IMPLEMENTATIONS[impl].normal_equations(x, loc, P, precision),
    _normal_equations_fake,
    DIMS,
)
normal_equations.differentiate(_textbook_normal_equations)
