r"""The closed forms for a factor that is a linear map of features, in torch's own operators, block by block.

P = F̃ᵀWᵀ for each channel: pixel n has the row P_c[n] = W_c f̃ₙ, with F̃ [K+1, pixels] the features and a row of
ones (the bias), N = channels · pixels. So C, w, r and every gradient follow from F, and nothing of size N×R exists:

    G_c = F̃D_c⁻¹F̃ᵀ          C = I + Σ_c W_c G_c W_cᵀ        w = Σ_c W_c F̃D_c⁻¹δ_c
    u_c = W_cᵀv              r_c = δ_c − F̃ᵀu_c               z_c = r_c/d_c         M_c = W_cᵀC⁻¹W_c

    grad_F̃  = Σ_c [2b M_cF̃D_c⁻¹ − 2a u_c z_cᵀ]              grad_x = 2az
    grad_W_c = Σ_b [2b C⁻¹W_cG_c − 2a v(F̃z_c)ᵀ]             grad_d as for a dense factor, πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

with a = ∂loss/∂q and b = ∂loss/∂log|Σ|. A mean that is linear in the same features, μ_c = F̃ᵀm_c, joins the passes:
u_c + m_c takes the place of u_c in r and in grad_F, and grad_m_c = −2aF̃z_c.

There are two ways through a block, and `forms.from_tiles` says which is cheaper. From the features themselves,
as above, K² products a pixel for each G_c and each M_c; or from tiles of P, made of the block and gone after it:

    W_cG_c = Σ (W_cf̃ₙ)f̃ₙᵀ/d        M_c = A_cᵀA_c, A_c = L⁻¹W_c, yₙ = A_c f̃ₙ:  M_c f̃ₙ = A_cᵀyₙ,  f̃ₙᵀM_c f̃ₙ = |yₙ|²

    moments     pass 1: W_cG_c and F̃D_c⁻¹(x − loc); then C⁻¹ and log|C|
    residual    pass 2: the residual, q, and the correction of v
    backward    every gradient in one pass
    equations   the gradients of PᵀDP and PᵀDδ
    norms       diag PPᵀ
    blocks      how the passes are cut

The functions take canonical shapes; item b of F has the weight W[b], or W[0] where all share one:

    x    [S, B, channels, pixels]                F  [B, K, pixels], any strides
    loc  [S or 1, B, channels, pixels], or none  W  [1 or B, channels, R, K+1]
    d    [B, channels, pixels] or [B, 1, 1]      m  [channels, K+1], or none
"""

from .backward import logdet_backward, mahalanobis_and_logdet_backward
from .equations import gram_backward, normal_equations_backward
from .moments import gram, logdet, normal_equations
from .norms import row_norms, row_norms_backward
from .residual import mahalanobis_and_logdet


def keeps_products(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether W_cG_c and F̃z_c are outputs of the forward pass: here always."""
    return True


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
