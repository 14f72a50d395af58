"""The Triton kernels of a stencil: one read of the weights forward, one read and one write backward.

    product    y = Tᵀ(x − μ), its square and log|Σ|
    backward   every gradient in one pass; Tx
    solve      Tᵀy = x and Ty = x: a program walks over the fronts of an item
    window     a pixel's neighbours

The functions have the signatures of `aten`.
"""

from .backward import product_backward, transpose
from .product import product
from .solve import solve

__all__ = ["product", "product_backward", "solve", "transpose"]
