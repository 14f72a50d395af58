"""The Triton kernels: the same closed forms as `aten`, from two reads of P forward, one read and one write backward.

    capacitance   pass 1: PᵀD⁻¹P, w, log|D|
    residual      pass 2: the quadratic form as a sum of squares, and the correction of v
    backward      every gradient in one pass
    sampling      samples, with their noise drawn in the kernel and drawn again in the backward
    dispatch      which kernel follows which; `device.solve` has the R×R part in between

Nothing waits for the host: items that need float64 are found and made again on the device, by kernels that leave the
others at once, so that a step can be captured in a CUDA graph. The functions have the signatures of `aten`.
"""

from .dispatch import (
    gram,
    logdet,
    logdet_backward,
    mahalanobis_and_logdet,
    mahalanobis_and_logdet_backward,
    normal_equations,
)
from .sampling import noise, rsample, rsample_backward

__all__ = [
    "gram",
    "logdet",
    "logdet_backward",
    "mahalanobis_and_logdet",
    "mahalanobis_and_logdet_backward",
    "noise",
    "normal_equations",
    "rsample",
    "rsample_backward",
]
