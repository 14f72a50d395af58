"""The closed forms in torch's own operators: the CPU implementation, and one that runs on any device.

Everything is computed block by block over N, so that nothing of the size of P is allocated but its
gradient. With C = I + PᵀD⁻¹P, δ = x − μ, w = PᵀD⁻¹δ (README.md of the package derives all of it):

    capacitance   read P: C, w, log|D|       (products in float32, sums over blocks in float64)
                  R×R, in float64: log|C|, L⁻¹
    residual      v = C⁻¹w; read P: r = δ − Pv,  q(v) = rᵀD⁻¹r + vᵀv,  g = PᵀD⁻¹r − v
                  q = q(v) − gᵀC⁻¹g,  v ← v + C⁻¹g
    backward      read P, write grad_P, and every other gradient
    sampling      samples from given noise
    blocks        how the passes are cut

The functions take canonical shapes and neither check nor record anything: `op` registers them.
"""

from .backward import logdet_backward, mahalanobis_and_logdet_backward
from .capacitance import gram, logdet, normal_equations
from .residual import mahalanobis_and_logdet
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
