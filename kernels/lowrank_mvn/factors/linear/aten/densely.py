"""The gradients of a few items by way of P, which is made for them in float64.

Where rows of P outweigh others so far that sums over the features lose what is left, single rows have to be looked at:

    grad_f̃ₙ = Σ_c W_cᵀ grad_P_cn − Σ m_c grad_x_cn      grad_W_c = Σₙ grad_P_cn f̃ₙᵀ      grad_m_c = −Σ grad_x_cn f̃ₙᵀ
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ....leverage import Items
from ...dense import aten as dense


class Given(NamedTuple):
    """Inputs of a backward pass, and what the forward pass kept; without samples x, v, step and residual have none."""

    x: Tensor  # [S, B, channels, pixels]
    loc: Tensor | None  # [S or 1, B, channels, pixels]
    F: Tensor  # [B, K, pixels]
    W: Tensor  # [1 or B, channels, R, K+1], float64
    m: Tensor | None  # [channels, K+1]
    d: Tensor  # [B, channels, pixels] or [B, 1, 1]
    L_inv: Tensor  # [B, R, R]
    v: Tensor  # [B, S, R]
    step: Tensor  # [B, S, R]
    residual: Tensor  # [S, B, channels, pixels]
    wide: Tensor  # [B]

    def some(self, t: Items) -> "Given":
        """Those of some items."""
        loc = None if self.loc is None else self.loc[:, t]
        W = self.W if self.W.shape[0] == 1 else self.W[t]
        kept = self.L_inv[t], self.v[t], self.step[t], self.residual[:, t], self.wide[t]
        return Given(self.x[:, t], loc, self.F[t], W, self.m, self.d[t], *kept)


class Made(NamedTuple):
    """Gradients in float64, those of W for each item; None where nobody needs them."""

    x: Tensor | None  # [S, B, channels, pixels]
    F: Tensor  # [B, K, pixels]
    W: Tensor  # [B, channels, R, K+1]
    m: Tensor | None  # [channels, K+1]
    d: Tensor | None  # as d


def gradients(grad_q: Tensor, grad_logdet: Tensor, given: Given, need_x: bool, need_d: bool) -> Made:
    """grad_q [B, S] and grad_logdet [B] in float64."""
    x, loc, F, W, m, d, L_inv, v, step, residual, wide = given
    ones, shape = torch.cat([F.double(), F.new_ones(F[:, :1].shape, dtype=torch.float64)], 1), d.shape
    P = torch.matmul(W, ones.unsqueeze(1)).mT.flatten(1, 2)  # [B, N, R]
    d = d.double().flatten(1)
    delta = x.double() if loc is None else x.double() - loc.double()
    delta = delta if m is None else delta - torch.matmul(m.double(), ones)
    if len(x):
        mean = delta.new_zeros(()).expand(1, *P.shape[:2])
        needs = [need_x or m is not None, False, True, need_d]
        of_q = grad_q.T, grad_logdet, delta.flatten(2), mean
        kept = v.transpose(0, 1), step.transpose(0, 1), residual.flatten(2), wide
        grad_x, _, rows, grad_d = dense.mahalanobis_and_logdet_backward(*of_q, P, d, L_inv, *kept, needs)
        grad_x = grad_x.view(x.shape) if needs[0] else grad_x
    else:
        grad_x = delta
        rows, grad_d = dense.logdet_backward(grad_logdet, P, d, L_inv, wide, [True, need_d])
    rows = rows.unflatten(1, (W.shape[1], -1))  # [B, channels, pixels, R]
    grad_F = torch.matmul(W[..., :-1].mT, rows.mT).sum(1)
    grad_W, grad_m = torch.matmul(rows.mT, ones.mT.unsqueeze(1)), None
    if m is not None:
        grad_F -= torch.matmul(m[:, :-1].double().T, grad_x.sum(0))
        grad_m = -torch.matmul(grad_x.sum(0), ones.mT).sum(0)
    return Made(grad_x if need_x else None, grad_F, grad_W, grad_m, grad_d.view(shape) if need_d else None)
