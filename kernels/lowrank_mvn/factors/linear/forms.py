r"""What the closed forms for a linear factor need apart from the passes over the features: products of size R×K.

A pass over F leaves, in float64 and for each item b and channel c,

    WG  [B, channels, R, K+1]      W_c F̃D_c⁻¹F̃ᵀ
    wF  [B, S, channels, K+1]      F̃D_c⁻¹(x − loc)_c
    zF  [B, S, channels, K+1]      F̃z_c

and everything that follows from these is here, for every implementation. W [1 or B, channels, R, K+1] and
m [channels, K+1] are in float64; S samples, B items, R columns, K features and a row of ones.
"""

import torch
from torch import Tensor

from ...capacitance import exceeds, inverse, too_rough


def one_d(d: Tensor) -> bool:
    """Whether d, [B, channels, pixels] or [B, 1, 1], is one value for all pixels of an item."""
    return d.shape[1] == 1 and d.shape[2] == 1


def from_tiles(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether tiles of P are cheaper than products of the features with themselves.

    Products a pixel, forward and backward: 2 K² for each G_c, of which a scalar d needs one, against 4 C·R·K for making
    the tiles P_c and P_cL⁻ᵀ and bringing them back to the features.
    """
    return 4 * channels * R < 2 * (channels if per_pixel else 1) * K1


def gram(WG: Tensor, W: Tensor) -> Tensor:
    """C − I = Σ_c W_c G_c W_cᵀ [B, R, R], symmetric to the last bit."""
    C = torch.matmul(WG.transpose(1, 2).flatten(2), W.transpose(1, 2).flatten(2).mT)
    return 0.5 * (C + C.mT)


def projection(wF: Tensor, WG: Tensor | None, W: Tensor, m: Tensor | None) -> Tensor:
    """w = PᵀD⁻¹δ [B, S, R], with δ = x − loc − F̃ᵀm; WG is needed for m alone."""
    w = torch.matmul(wF.flatten(2), W.transpose(2, 3).flatten(1, 2))
    if m is None:
        return w
    assert WG is not None
    return w - torch.matmul(WG.transpose(1, 2).flatten(2), m.flatten()).unsqueeze(1)


def coefficients(v: Tensor, W: Tensor) -> Tensor:
    """u_c = W_cᵀv [B, S, channels, K+1] of v [B, S, R], so that (Pv)_c = F̃ᵀu_c."""
    u: Tensor = torch.matmul(v, W.transpose(1, 2).flatten(2)).unflatten(2, (W.shape[1], W.shape[3]))
    return u


def weighted(A: Tensor, W: Tensor) -> Tensor:
    """AW_c [B, channels, Q, K+1] of A [B, Q, R]: rows that make the tile P_cAᵀ from the features."""
    return torch.matmul(A.unsqueeze(1), W)


def quadratic(L_inv: Tensor, W: Tensor) -> Tensor:
    """M_c = W_cᵀC⁻¹W_c [B, channels, K+1, K+1]."""
    rows = weighted(L_inv, W)
    return torch.matmul(rows.mT, rows)


def quadratic_sum(L_inv: Tensor, W: Tensor) -> Tensor:
    """Σ_c M_c = Σ_c W_cᵀC⁻¹W_c [B, 1, K+1, K+1]: all that one G for all channels needs."""
    rows = weighted(L_inv, W).flatten(1, 2)
    return torch.matmul(rows.mT, rows).unsqueeze(1)


def logdet_D(d: Tensor, N: int) -> Tensor:
    """log|D| [B] of d [B, channels, pixels] or [B, 1, 1], item by item: float64 need not hold all of them at once."""
    if one_d(d):
        return N * d[:, 0, 0].double().log()
    logs = [item.double().log().sum() for item in d]
    return torch.stack(logs) if logs else d.new_zeros(0, dtype=torch.float64)


def rough(diagonal_G: Tensor, W: Tensor, L_inv: Tensor, rounding: float, tiles: bool) -> Tensor:
    """Whether float32 products in a pass may have moved log|C| by more than its tolerance, or failed, [B].

    `diagonal_G` [B, channels or 1, K+1] is that of G_c, and |ΔG_kl| ≤ ε√(G_kk G_ll) with ε = `rounding`. From the
    features, log|C| moves by Σ_c tr M_cΔG_c, at most ε Σ_c Σ_kl |M_c,kl|√(G_kk G_ll); where all channels have one G,
    the sum of M_c takes the place of each. Where tiles of P are made in float32, |ΔP_nr| ≤ ε Σ_k |W_rk||f_kn| moves C
    by at most ε aᵣaₛ with aᵣ² = Σ_c (Σ_k |W_crk|√G_kk)²: `capacitance.too_rough`, which grows faster with R.
    """
    g = diagonal_G.sqrt().unsqueeze(-1)
    if tiles:
        a = torch.matmul(W.abs(), g).squeeze(-1)  # [B, channels, R]
        return too_rough(a.square().sum(1), L_inv, rounding)
    M = (quadratic_sum if g.shape[1] == 1 else quadratic)(L_inv, W)
    return exceeds(rounding * torch.matmul(torch.matmul(M.abs_(), g).mT, g).sum((1, 2, 3)))


def of_scores(zF: Tensor, WG: Tensor, step: Tensor) -> Tensor:
    """F̃z_c [B, S, channels, K+1] of z = D⁻¹(r − F̃ᵀW_cᵀstep), step [B, S, R]: F̃D⁻¹r, less (W_cG_c)ᵀ step."""
    return zF - torch.matmul(step.unsqueeze(1), WG).transpose(1, 2)


def grad_weight(
    grad_q: Tensor, grad_logdet: Tensor, L_inv: Tensor, v: Tensor, WG: Tensor, zF: Tensor, shared: bool
) -> Tensor:
    """grad_W_c = 2 grad_logdet C⁻¹W_cG_c − 2 grad_q v(F̃z_c)ᵀ [1 or B, channels, R, K+1].

    Summed over items that share W; grad_q [B, S], grad_logdet [B].
    """
    grad = weighted(2 * grad_logdet[:, None, None] * inverse(L_inv), WG)
    grad -= torch.matmul((2 * grad_q.unsqueeze(-1) * v).mT, zF.flatten(2)).unflatten(2, zF.shape[2:]).transpose(1, 2)
    return grad.sum(0, keepdim=True) if shared else grad


def grad_mean(grad_q: Tensor, zF: Tensor) -> Tensor:
    """grad_m_c = −2 grad_q F̃z_c [channels, K+1]."""
    grad: Tensor = -2 * torch.tensordot(grad_q, zF, 2)
    return grad
