"""The stencil in torch's own operators: shifted slices, so that only gradients are larger than an image.

    product    y = Tᵀ(x − μ), its square and log|Σ|; Tx
    backward   every gradient
    solve      Tᵀy = x and Ty = x, front by front

The functions take canonical shapes and neither check nor record anything: `op` registers them.
"""

from .backward import product_backward
from .product import product, transpose
from .solve import solve

__all__ = ["product", "product_backward", "solve", "transpose"]
