"""The operators of a stencil, as torch sees them; `registry` says how.

    x, y  [S, B, channels, pixels]        log_diagonal  [B, 1 or channels, pixels]
    loc   [S or 1, B, channels, pixels]   neighbours    [B, 1 or channels, neighbours, pixels]
                                          ties          [B, pairs of channels, 1 or pixels]

`spatial` are the sizes of an image without its channels, whose product is the number of pixels, and `neighbourhood`
those of the stencil. An implementation is a module with the functions that `aten` has. The derivatives of `transpose`
and `solve` are operators again; those of the product beyond the first go through `reference.stencil` in float64.
"""

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...batching import into_items, into_samples
from ...capacitance import product_dtype
from ...registry import Operator, implementations, second_derivative

IMPLEMENTATIONS = implementations(__package__)

DIMS = {
    **dict.fromkeys(("x", "loc", "y", "grad_x", "grad_loc", "grad_y"), "SBcn"),
    **dict.fromkeys(("mahalanobis", "grad_mahalanobis"), "SB"),
    **dict.fromkeys(("logdet", "grad_logdet"), "B"),
    **dict.fromkeys(("log_diagonal", "grad_log_diagonal"), "Bcn"),
    **dict.fromkeys(("neighbours", "grad_neighbours"), "Bckn"),
    **dict.fromkeys(("ties", "grad_ties"), "Bcn"),
}
WEIGHTS = "log_diagonal", "neighbours", "ties"
WHERE = "spatial", "neighbourhood", "impl"


def _named(saved: Any, *names: str) -> list[Any]:
    return [getattr(saved, n) for n in names]


def _batched(op: Operator, V: int, given: dict[str, Any], mapped: dict[str, int]) -> Any:
    """If the stencil is shared, the mapped dimension joins the samples."""
    if mapped.keys() & set(WEIGHTS):
        return into_items(op, V, given, mapped)
    return into_samples(op, V, given, mapped, shared="loc")


# --- y = Tᵀ(x − μ), ‖y‖² and log|Σ| -----------------------------------------------------------------------------------


def _product_fake(x, loc, log_diagonal, neighbours, ties, *where):  # type: ignore[no-untyped-def]
    dtype = product_dtype(x, log_diagonal, neighbours, *(() if loc is None else (loc,)))
    (S, B), new = x.shape[:2], x.new_empty
    return new(x.shape, dtype=dtype), new(S, B, dtype=torch.float64), new(B, dtype=torch.float64)


product = Operator(
    "stencil(Tensor x, Tensor? loc, Tensor log_diagonal, Tensor neighbours, Tensor? ties, int[] spatial,"
    " int[] neighbourhood, str impl) -> (Tensor y, Tensor mahalanobis, Tensor logdet)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].product(*inputs[:-1]),
    _product_fake,
    DIMS,
)


def _backward_fake(x, loc, log_diagonal, neighbours, ties, *rest):  # type: ignore[no-untyped-def]
    def like(t: Tensor | None, need: bool) -> Tensor:
        grad: Tensor = x.new_empty(0)
        return grad if t is None or not need else torch.empty_like(t, memory_format=torch.contiguous_format)

    return tuple(like(*pair) for pair in zip((x, loc, log_diagonal, neighbours, ties), rest[-2], strict=True))


product_backward = Operator(
    "stencil_backward(Tensor x, Tensor? loc, Tensor log_diagonal, Tensor neighbours, Tensor? ties, Tensor y,"
    " Tensor? grad_y, Tensor? grad_mahalanobis, Tensor? grad_logdet, int[] spatial, int[] neighbourhood,"
    " bool[5] needs, str impl) -> (Tensor grad_x, Tensor grad_loc, Tensor grad_log_diagonal, Tensor grad_neighbours,"
    " Tensor grad_ties)",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].product_backward(*inputs[:-1]),
    _backward_fake,
    DIMS,
)
PARAMETERS = "x", "loc", *WEIGHTS
COTANGENTS = "grad_y", "grad_mahalanobis", "grad_logdet"


def _derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    wanted = _named(needs, *PARAMETERS)
    given = _named(saved, *PARAMETERS, "y", "spatial", "neighbourhood")
    found = product_backward(*given[:6], grads.y, grads.mahalanobis, grads.logdet, *given[6:], wanted, saved.impl)
    return dict(zip(PARAMETERS, found, strict=True))


def _second_derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor | None]:
    cotangents = [n for n in COTANGENTS if getattr(saved, n) is not None]

    def textbook(*parameters: Any) -> Any:
        everything: Any = (*parameters, saved.spatial, saved.neighbourhood)
        outputs = reference.stencil(*everything)
        chosen = [t for n, t in zip(COTANGENTS, outputs, strict=True) if n in cotangents]
        return tuple(chosen) if len(chosen) > 1 else chosen[0]

    return dict(second_derivative(textbook, cotangents, PARAMETERS)(saved, needs, grads))


product.register(_derivative, (*PARAMETERS, "y", *WHERE), _batched)
product_backward.register(_second_derivative, (*COTANGENTS, *PARAMETERS, "spatial", "neighbourhood"))


# --- Tx, Tᵀy = x and Ty = x: differentiable any number of times by themselves -----------------------------------------


def _image_fake(x, log_diagonal, neighbours, ties, *where):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=product_dtype(x, log_diagonal, neighbours))


transpose = Operator(
    "stencil_transpose(Tensor x, Tensor log_diagonal, Tensor neighbours, Tensor? ties, int[] spatial,"
    " int[] neighbourhood, str impl) -> Tensor y",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].transpose(*inputs[:-1]),
    _image_fake,
    DIMS,
)
solve = Operator(
    "stencil_solve(Tensor x, Tensor log_diagonal, Tensor neighbours, Tensor? ties, int[] spatial,"
    " int[] neighbourhood, bool transposed, str impl) -> Tensor y",
    lambda *inputs: IMPLEMENTATIONS[inputs[-1]].solve(*inputs[:-1]),
    _image_fake,
    DIMS,
)


def _of_weights(saved: Any, needs: Any, h: Tensor, y: Tensor, product: Tensor) -> dict[str, Tensor]:
    """The gradients of hᵀ(Tᵀy) with respect to the weights of T; `product` is Tᵀy."""
    wanted = [False, False, *_named(needs, *WEIGHTS)]
    if not any(wanted):
        return {}
    where = saved.spatial, saved.neighbourhood, wanted, saved.impl
    grads = product_backward(y, None, *_named(saved, *WEIGHTS), product, h, None, None, *where)
    return dict(zip(WEIGHTS, grads[2:], strict=True))


def _derivative_of_transpose(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor]:
    """gᵀ(Tx) = xᵀ(Tᵀg)."""
    pulled = product(grads.y, None, *_named(saved, *WEIGHTS, *WHERE))[0]
    return {"x": pulled.to(saved.x.dtype), **_of_weights(saved, needs, saved.x.to(pulled.dtype), grads.y, pulled)}


def _derivative_of_solve(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor]:
    """Of Tᵀy = x: h = T⁻¹g is grad_x, and dy = T⁻ᵀ(dx − dTᵀy). The two solves change places for the other one."""
    pulled = solve(grads.y, *_named(saved, *WEIGHTS, "spatial", "neighbourhood"), not saved.transposed, saved.impl)
    h, y, right = (saved.y, pulled, grads.y) if saved.transposed else (pulled, saved.y, saved.x.to(pulled.dtype))
    return {"x": pulled.to(saved.x.dtype), **_of_weights(saved, needs, -h, y, right)}


transpose.register(_derivative_of_transpose, ("x", *WEIGHTS, *WHERE), _batched)
solve.register(_derivative_of_solve, ("x", "y", *WEIGHTS, *WHERE, "transposed"), _batched)
