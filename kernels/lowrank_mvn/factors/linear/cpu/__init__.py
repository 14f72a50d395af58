"""The closed forms for a linear factor on the CPU: the residual as compiled C++, everything else as `aten`.

residual    read F: r = δ − F̃ᵀ(u + m) in float64, F̃D⁻¹r, rᵀD⁻¹r
"""

import torch
from torch import Tensor

from ....capacitance import product_dtype
from ....device.native import NOTHING, function, view_of
from ....device.pages import mapped
from ..aten import (
    gram,
    gram_backward,
    keeps_products,
    logdet,
    logdet_backward,
    mahalanobis_and_logdet_backward,
    normal_equations,
    normal_equations_backward,
    residual,
    row_norms,
    row_norms_backward,
)

_residual = function("lowrank_linear_residual", 36)


def mahalanobis_and_logdet(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `aten` has it."""
    return residual.mahalanobis_and_logdet(x, loc, F, W, m, d, residuals)


def residuals(
    x: Tensor, loc: Tensor | None, F: Tensor, minus_u: Tensor, d: Tensor, wide: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `aten.residual` has it."""
    (S, B, channels, pixels), K = x.shape, F.shape[1]
    dtype, one_d = product_dtype(x, F, d), d.shape[1:] == (1, 1)
    made = mapped(x.shape, dtype, x.device)
    zF, rz = F.new_empty(B, S * channels, K + 1, dtype=torch.float64), F.new_empty(B, S * channels, dtype=torch.float64)
    u, wide = minus_u.neg().contiguous(), wide.contiguous()

    def of_samples(t: Tensor) -> tuple[int, ...]:
        s, b, _, n = t.stride()
        return view_of(t, 0 if t.shape[0] < S else s, b, n)

    views = (
        *of_samples(x),
        *(NOTHING if loc is None else of_samples(loc)),
        *view_of(F, F.stride(0), F.stride(2), F.stride(1)),
        *view_of(d, 0, d.stride(0), d.stride(2)),
    )
    strides = x.stride(2), 0 if loc is None else loc.stride(2), 0 if one_d else d.stride(1)
    outputs = (t.data_ptr() for t in (u, wide, made, zF, rz))
    sizes = S, B, channels, pixels, K, torch.get_num_threads()
    _residual(*sizes, *views, *strides, one_d, dtype == torch.float64, *outputs)
    return made, zF, rz


__all__ = [
    "gram",
    "gram_backward",
    "keeps_products",
    "logdet",
    "logdet_backward",
    "mahalanobis_and_logdet",
    "mahalanobis_and_logdet_backward",
    "normal_equations",
    "normal_equations_backward",
    "row_norms",
    "row_norms_backward",
]
