"""Pass 1: PᵀD⁻¹P, w = PᵀD⁻¹δ and log|D|; then L⁻¹ and log|C|, in float64."""

import torch
from torch import Tensor

from .... import capacitance as algebra
from ....capacitance import product_dtype, runs
from ....device.pages import Scratch
from . import blocks

EPS = torch.finfo(torch.float32).eps
Samples = tuple[Tensor, Tensor]  # x [S, B, N] and loc [S or 1, B, N]


def sums(
    samples: Samples | None,
    P: Tensor,
    d: Tensor,
    items: slice,
    dtype: torch.dtype,
    inverted: bool,
    mix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PᵀD⁻¹P [b, R, R] and w = PᵀD⁻¹δ [b, S, R] of some items, products in `dtype`, float64 out; S = 0 without samples.

    With `mix` [B, R, R] each row pₙ is mix·pₙ. `d` is the diagonal of D or, if `inverted`, of D⁻¹, where 0 stands
    for a pixel that is not observed. One value of it for all pixels of an item scales the sums; many scale P, pixel
    by pixel. The library's tiles are 8 columns wide: one or two columns beyond a multiple of 8 cost as much as 8,
    so they go beside δ. Two rectangles cover the lower triangle of the rest, with three quarters of the operations
    of a square.
    """
    S, R = samples[0].shape[0] if samples else 0, P.shape[2]
    gram = P.new_zeros(P.shape[0], R, R, dtype=torch.float64)
    w = P.new_zeros(P.shape[0], S, R, dtype=torch.float64)
    scratch, mixed = Scratch(dtype, P.device), Scratch(dtype, P.device)
    whole = R - R % 8 if R % 8 <= 2 else R
    half = (whole + 15) // 16 * 8
    one_d = d.shape[1] == 1
    for b, n, part in blocks.vector_blocks(P, S, items, dtype):
        scale = None
        if not one_d:
            scale = blocks.diagonal(d, b, n, dtype)
            scale = scale.sqrt() if inverted else scale.rsqrt()
        delta = None
        if samples:
            delta = blocks.delta(*samples, b, n, dtype)
            delta = delta if scale is None else delta.mul_(scale.unsqueeze(1))
        gram_part, w_part = gram[b], w[b]
        for i, j, p in blocks.factor_blocks(part, S, dtype):
            Q = blocks.scaled(p, None if scale is None else scale[i, j], scratch)
            Q = Q if mix is None else blocks.times(Q, mix[b][i].mT, mixed.like(p))
            gram_part[i, :half, :half].add_(torch.bmm(Q[..., :half].mT, Q[..., :half]))
            gram_part[i, half:whole, :whole].add_(torch.bmm(Q[..., half:whole].mT, Q[..., :whole]))
            thin = Q[..., whole:].mT
            rows = blocks.projection(thin if delta is None else torch.cat([thin, delta[i, :, j]], 1), Q)
            gram_part[i, whole:].add_(rows[:, : R - whole])
            w_part[i].add_(rows[:, R - whole :])
    gram[:, :half, half:] = gram[:, half:, :half].mT
    gram[:, half:whole, whole:] = gram[:, whole:, half:whole].mT
    if one_d:
        weight = d.double() if inverted else d.double().reciprocal()
        gram, w = gram.mul_(weight.unsqueeze(-1)), w.mul_(weight.unsqueeze(-1))
    return gram[items], w[items]


def factorised(
    samples: Samples | None, P: Tensor, d: Tensor, inverted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PᵀD⁻¹P and L⁻¹ [B, R, R], log|C| [B], w [B, S, R] (float64) and `wide` [B].

    `wide` marks the items that were made with float64 products: a decision taken on the CPU only; elsewhere it would
    wait for the device, so there every item is.
    """
    B, given = P.shape[0], product_dtype(*(samples or ()), P, d)
    dtype = given if P.device.type == "cpu" else torch.float64
    gram, w = sums(samples, P, d, slice(0, B), dtype, inverted)
    C = algebra.with_identity(gram)
    L_inv, log_det = algebra.factorise(C)
    wide = torch.ones(B, dtype=torch.bool, device=P.device)
    if dtype == torch.float32:
        wide = algebra.too_rough(C.diagonal(dim1=-2, dim2=-1), L_inv, EPS)
        for items, products in runs(wide, dtype):
            if products == torch.float64:
                gram[items], w[items] = sums(samples, P, d, items, products, inverted)
                C[items] = algebra.with_identity(gram[items])
                L_inv[items], log_det[items] = algebra.factorise(C[items])

    def again(items: slice) -> Tensor:
        return sums(None, P, d, items, torch.float64, inverted, mix=L_inv)[0]

    algebra.improve(L_inv, log_det, C, wide, given, again)
    return gram, L_inv, log_det, w, wide


def logdet_D(d: Tensor, N: int) -> Tensor:
    """log|D| [B]. In float64: the same error at each of N pixels would add up to N errors."""
    if d.shape[1] == 1:
        return N * d[:, 0].double().log()
    parts = d.split(max(1, blocks.BLOCK_VALUES // (8 * max(1, d.shape[0]))), 1)
    logs = [part.double().log().sum(-1) for part in parts]
    return torch.stack(logs).sum(0) if logs else d.new_zeros(d.shape[0], dtype=torch.float64)


def logdet(P: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log|Σ| [B], L⁻¹ [B, R, R] and `wide` [B]."""
    _, L_inv, log_det, _, wide = factorised(None, P, d, inverted=False)
    return log_det + logdet_D(d, P.shape[1]), L_inv, wide


def gram(P: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], from products in float64."""
    return sums(None, P, precision, slice(0, P.shape[0]), torch.float64, inverted=True)[0]


def normal_equations(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    gram, _, _, w, _ = factorised((x, loc), P, precision, inverted=True)
    return gram, w.transpose(0, 1).contiguous()
