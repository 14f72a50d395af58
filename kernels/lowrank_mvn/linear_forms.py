r"""What the closed forms for a linear factor need apart from the passes over the features: products of size R×K.

A pass over F leaves, in float64 and for each item b and channel c,

    WG  [B, C, R, K+1]      W_c F̃D_c⁻¹F̃ᵀ
    wF  [B, S, C, K+1]      F̃D_c⁻¹(x − loc)_c
    zF  [B, S, C, K+1]      F̃z_c

and everything that follows from these is here, for every implementation. W [1 or B, C, R, K+1] and m [C, K+1] are in
float64; S samples, B items, C channels, R columns, K features and a row of ones.
"""

import math

import torch
from torch import Tensor

from . import aten

# Up to so many columns a factorisation is a loop over them in torch's operators.
SWEEP = 32


def one_value(d: Tensor) -> bool:
    """Whether d, [B, C, M] or [B, 1, 1], is one value for all pixels of an item."""
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


def capacitance(WG: Tensor, W: Tensor) -> Tensor:
    """C = I + Σ_c W_c G_c W_cᵀ [B, R, R]."""
    C = gram(WG, W)
    C.diagonal(dim1=-2, dim2=-1).add_(1)
    return C


def projection(wF: Tensor, WG: Tensor | None, W: Tensor, m: Tensor | None) -> Tensor:
    """w = PᵀD⁻¹δ [B, S, R], with δ = x − loc − F̃ᵀm; WG is needed for m alone."""
    w = torch.matmul(wF.flatten(2), W.transpose(2, 3).flatten(1, 2))
    if m is None:
        return w
    assert WG is not None
    return w - torch.matmul(WG.transpose(1, 2).flatten(2), m.flatten()).unsqueeze(1)


def coefficients(v: Tensor, W: Tensor) -> Tensor:
    """u_c = W_cᵀv [B, S, C, K+1] of v [B, S, R], so that (Pv)_c = F̃ᵀu_c."""
    return torch.matmul(v, W.transpose(1, 2).flatten(2)).unflatten(2, (W.shape[1], W.shape[3]))


def weighted(A: Tensor, W: Tensor) -> Tensor:
    """AW_c [B, C, Q, K+1] of A [B, Q, R]: rows that make the tile P_cAᵀ from the features."""
    return torch.matmul(A.unsqueeze(1), W)


def quadratic(A: Tensor, W: Tensor) -> Tensor:
    """M_c = W_cᵀAW_c [B, C, K+1, K+1] of A [B, R, R]."""
    return torch.matmul(W.mT, weighted(A, W))


def quadratic_sum(A: Tensor, W: Tensor) -> Tensor:
    """Σ_c M_c = Σ_c W_cᵀAW_c [B, 1, K+1, K+1] of A [B, R, R]: all that one G for all channels needs."""
    return torch.matmul(W.flatten(1, 2).mT, weighted(A, W).flatten(1, 2)).unsqueeze(1)


def factorise(C: Tensor) -> tuple[Tensor, Tensor]:
    """C⁻¹ and log|C| of float64 `C` [B, R, R]; NaN for an item where that fails, which means not finite.

    Small ones are swept (Gauss–Jordan, stable because C is positive definite) in ten small operations a column: the
    code of a library's factorisation alone takes 4 MB at its first use, a sixth of all that a step needs beside grad_F.
    """
    R = C.shape[-1]
    if R > SWEEP or C.device.type != "cpu":
        return aten.factorise(C)[:2]
    A, pivots = C.clone(), C.new_empty(C.shape[:2])
    for k in range(R):
        pivot = pivots[:, k].copy_(A[:, k, k]).unsqueeze(1)
        column = A[:, :, k].clone()
        column[:, k] = 0
        A[:, :, k] = 0
        A[:, k, k] = 1
        row = A[:, k].div_(pivot)
        A.baddbmm_(column.unsqueeze(2), row.unsqueeze(1).clone(), alpha=-1)
    failed = ~((pivots > 0) & (pivots < math.inf)).all(1)
    A = 0.5 * (A + A.mT)
    return A.masked_fill_(failed[:, None, None], math.nan), pivots.log().sum(1).masked_fill_(failed, math.nan)


def root(C_inv: Tensor) -> Tensor:
    """A [B, R, R] with AᵀA = C⁻¹."""
    L, info = torch.linalg.cholesky_ex(C_inv)
    if bool((info > 0).any()):  # not positive definite to the last bit, or not finite
        finite = torch.where((info > 0)[:, None, None] & torch.isfinite(C_inv), C_inv, torch.zeros_like(C_inv))
        values, vectors = torch.linalg.eigh(finite)
        L = torch.where((info > 0)[:, None, None], vectors * values.clamp_min(0).sqrt().unsqueeze(1) + 0 * C_inv, L)
    return L.mT


def logdet_D(d: Tensor, N: int) -> Tensor:
    """log|D| [B] of d [B, C, M] or [B, 1, 1], item by item: in float64, which need not hold all of them at once."""
    if one_value(d):
        return N * d[:, 0, 0].double().log()
    logs = [item.double().log().sum() for item in d]
    return torch.stack(logs) if logs else d.new_zeros(0, dtype=torch.float64)


def too_rough(diagonal_G: Tensor, W: Tensor, C_inv: Tensor, rounding: float, tiles: bool) -> Tensor:
    """Whether float32 products in a pass may have moved log|C| by more than `aten.LOG_DET_TOLERANCE`, or failed, [B].

    `diagonal_G` [B, C or 1, K+1] is that of G_c, and |ΔG_kl| ≤ ε√(G_kk G_ll) with ε = `rounding`. From the features,
    log|C| moves by Σ_c tr M_cΔG_c, at most ε Σ_c Σ_kl |M_c,kl|√(G_kk G_ll); where all channels have one G, the sum of
    M_c takes the place of each. Where tiles of P are made in float32, |ΔP_nr| ≤ ε Σ_k |W_rk||f_kn| moves C by at most
    ε aᵣaₛ with aᵣ² = Σ_c (Σ_k |W_crk|√G_kk)²: aᵣ² takes the place of C_rr in the bound of a full factor
    (`aten.factorise`), which grows faster with R.
    """
    g = diagonal_G.sqrt().unsqueeze(-1)
    if tiles:
        a = torch.matmul(W.abs(), g).squeeze(-1)  # [B, C, R]
        moved = (a.square().sum(1) * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square()
    else:
        M = (quadratic_sum if g.shape[1] == 1 else quadratic)(C_inv, W)
        moved = torch.matmul(torch.matmul(M.abs_(), g).mT, g).sum((1, 2, 3))
    return ~(rounding * moved <= aten.LOG_DET_TOLERANCE)


def of_scores(zF: Tensor, WG: Tensor, step: Tensor) -> Tensor:
    """F̃z_c [B, S, C, K+1] of z = D⁻¹(r − F̃ᵀW_cᵀstep), step [B, S, R]: F̃D⁻¹r, less (W_cG_c)ᵀ step."""
    return zF - torch.matmul(step.unsqueeze(1), WG).transpose(1, 2)


def grad_weight(a: Tensor, b: Tensor, C_inv: Tensor, v: Tensor, WG: Tensor, zF: Tensor, shared: bool) -> Tensor:
    """grad_W_c = 2b C⁻¹W_cG_c − 2a v(F̃z_c)ᵀ [1 or B, C, R, K+1], summed over items that share W; a [B, S], b [B]."""
    grad = weighted(2 * b[:, None, None] * C_inv, WG)
    grad -= torch.matmul((2 * a.unsqueeze(-1) * v).mT, zF.flatten(2)).unflatten(2, zF.shape[2:]).transpose(1, 2)
    return grad.sum(0, keepdim=True) if shared else grad


def grad_mean(a: Tensor, zF: Tensor) -> Tensor:
    """grad_m_c = −2aF̃z_c [C, K+1]."""
    return -2 * torch.tensordot(a, zF, 2)
