r"""The Triton implementation of a linear factor: the functions of `aten`, from three reads of F and one write.

    moments    pass 1: G, F̃D⁻¹(x − loc), log|D|
    residual   pass 2: the residual, the quadratic form as a sum of squares, and F̃D⁻¹r
    backward   every gradient in one pass; `tile` has its parts
    sampling   samples
    blocks     pass 1 and the gradients where K is much larger than R · channels: blocks of P, through a dense factor's
               kernels; `product` makes them
    columns    sums over columns in either layout, and how work is cut
    dispatch   which kernel follows which

What is of the size of G or smaller is made in float64 between the passes (`forms`); C is factorised by `device.solve`.
As for a dense factor nothing waits for the host: items that need float64 are found and made again on the device.
"""

from .dispatch import (
    gram,
    keeps_products,
    logdet,
    logdet_backward,
    mahalanobis_and_logdet,
    mahalanobis_and_logdet_backward,
    normal_equations,
)
from .sampling import rsample

__all__ = [
    "gram",
    "keeps_products",
    "logdet",
    "logdet_backward",
    "mahalanobis_and_logdet",
    "mahalanobis_and_logdet_backward",
    "normal_equations",
    "rsample",
]
