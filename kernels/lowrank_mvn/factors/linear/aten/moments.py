"""Pass 1: the features' moments as W_cG_c, and F̃D⁻¹(x − loc); then L⁻¹ and log|C|, in float64."""

import torch
from torch import Tensor

from ....capacitance import factorise_lean, improve, product_dtype, runs, with_identity
from ....device.pages import Scratch
from .. import forms
from . import blocks

EPS = torch.finfo(torch.float32).eps
Samples = tuple[Tensor, Tensor | None]  # x [S, B, channels, pixels] and loc [S or 1, B, channels, pixels] or none
Sums = tuple[Tensor, Tensor, Tensor]


def sums(
    samples: Samples | None, F: Tensor, W: Tensor, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool
) -> Sums:
    """W_cG_c [b, channels, R, K+1], F̃D_c⁻¹(x − loc)_c [b, S, channels, K+1] and diag G_c [b, channels or 1, K+1].

    Of some items, in float64, products in `dtype`; S = 0 without samples. `d` is the diagonal of D or, if `inverted`,
    of D⁻¹, 0 for a pixel that is not observed.
    """
    channels, R, K1 = W.shape[1:]
    one = forms.one_d(d)
    if forms.from_tiles(channels, R, K1, not one):
        return _from_tiles(samples, F, W, d, items, dtype, inverted)
    made = (_one_moment if one else _moment_per_channel)(samples, F, channels, d, items, dtype, inverted)
    S = samples[0].shape[0] if samples else 0
    G, wF = made[:, :, :K1], made[:, :, K1:]
    wF = wF[:, 0].unflatten(1, (S, channels)) if one else wF.transpose(1, 2)
    return torch.matmul(blocks.of_items(W, items), G), wF, G.diagonal(dim1=-2, dim2=-1)


def _deltas(samples: Samples | None, b: slice, n: slice, like: Tensor, dtype: torch.dtype) -> Tensor:
    """x − loc of a block, [b, S·channels, n]; no rows without samples."""
    if samples:
        return blocks.delta(*samples, b, n, dtype)
    return like.new_empty(b.stop - b.start, 0, min(n.stop, like.shape[2]) - n.start, dtype=dtype)


def _at(b: slice, items: slice) -> slice:
    return slice(b.start - items.start, b.stop - items.start)


def _from_tiles(
    samples: Samples | None, F: Tensor, W: Tensor, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool
) -> Sums:
    """From tiles of P, made of the block and gone after it."""
    (channels, R, K1), S = W.shape[1:], samples[0].shape[0] if samples else 0
    count, thin, one = items.stop - items.start, S * channels, forms.one_d(d)
    sums = F.new_zeros(count, channels * R + thin, K1, dtype=torch.float64)
    diagonal = F.new_zeros(count, 1 if one else channels, K1, dtype=torch.float64)
    # Rows of zeros make place for δ in the tile, because a product is fastest into memory of its own.
    weight = torch.cat([blocks.rows(W), W.new_zeros(W.shape[0], thin, K1)], 1).to(dtype)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    precision_of = blocks.precision_of(d, dtype, inverted)
    for b, n in blocks.blocks(F, K1 + sums.shape[1], items):
        at, f, precision = _at(b, items), blocks.features(F, b, n, copies), precision_of(b, n)
        size, _, pixels = f.shape
        y = blocks.rows_from(blocks.of_items(weight, b), f, out=scratch.shaped(size, sums.shape[1], pixels))
        y[:, channels * R :] = _deltas(samples, b, n, F, dtype)
        blocks.add_products(sums[at], y if one else blocks.scale(y, precision), f)
        squares = torch.mul(f, f, out=copies.like(f))
        blocks.add_products(diagonal[at], precision.expand(-1, -1, pixels), squares)
    if one:  # 1/d is in `diagonal` already
        sums *= _precision(d, items, inverted).squeeze(1)
    parts = sums.unflatten(1, (-1, channels))
    return parts[:, :R].transpose(1, 2), parts[:, R:], diagonal


def _one_moment(
    samples: Samples | None, F: Tensor, channels: int, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool
) -> Tensor:
    """G and F̃D⁻¹(x − loc) below it, [b, 1, K+1 + S·channels, K+1], with one d."""
    K, thin = F.shape[1], samples[0].shape[0] * channels if samples else 0
    sums = F.new_zeros(items.stop - items.start, 1, K + 1 + thin, K + 1, dtype=torch.float64)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in blocks.blocks(F, K + 1 + thin, items):
        at, f = _at(b, items), blocks.features(F, b, n, copies)
        rows = scratch.shaped(f.shape[0], 1 + thin, f.shape[2])
        rows[:, 0] = 1
        rows[:, 1:] = _deltas(samples, b, n, F, dtype)
        sums[at, 0, :K, :K] += torch.bmm(f, f.mT)
        blocks.add_products(sums[at, 0, K:], rows, f)
    sums[:, :, :K, K] = sums[:, :, K, :K]
    sums *= _precision(d, items, inverted)
    return sums


def _moment_per_channel(
    samples: Samples | None, F: Tensor, channels: int, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool
) -> Tensor:
    """G_c and F̃D_c⁻¹(x − loc)_c below it, [b, channels, K+1 + S, K+1], with a d per pixel."""
    K, S = F.shape[1], samples[0].shape[0] if samples else 0
    sums = F.new_zeros(items.stop - items.start, channels, K + 1 + S, K + 1, dtype=torch.float64)
    scratch, precision_of = Scratch(dtype, F.device), blocks.precision_of(d, dtype, inverted)
    for b, n in blocks.blocks(F, 2 * (K + 1) + S, items):
        at, delta, precision = _at(b, items), _deltas(samples, b, n, F, dtype), precision_of(b, n)
        shape = delta.shape[0], K + 1 + S, delta.shape[2]
        # Here a row of ones costs less than products of its own for each channel.
        stack, scaled = blocks.carved(scratch, shape, shape)
        stack[:, :K] = F[b, :, n]
        stack[:, K] = 1
        for c in range(channels):
            stack[:, K + 1 :] = delta[:, c::channels]
            torch.mul(stack, precision[:, c].unsqueeze(1), out=scaled)
            sums[at, c] += torch.bmm(scaled, stack[:, : K + 1].mT)
    return sums


def _precision(d: Tensor, items: slice, inverted: bool) -> Tensor:
    """1/d of one d, [b, 1, 1, 1] in float64."""
    return (d[items].double() if inverted else d[items].double().reciprocal()).unsqueeze(-1)


def factorised(
    samples: Samples | None, F: Tensor, W: Tensor, d: Tensor, inverted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W_cG_c, F̃D⁻¹(x − loc), PᵀD⁻¹P and L⁻¹ [B, R, R], log|C| [B] and `wide` [B], decided as for a dense factor; W in
    float64 out of any dtype."""
    B, given = F.shape[0], [] if samples is None else [samples[0]]
    wanted = product_dtype(*given, F, W, d)
    few = W.shape[1] * F.shape[2] <= 2 * W.shape[2]  # float64 costs no more, and any of them may be all that P says
    dtype = wanted if F.device.type == "cpu" and not few else torch.float64
    W = W.double()
    WG, wF, diagonal = sums(samples, F, W, d, slice(0, B), dtype, inverted)
    gram = forms.gram(WG, W)
    C = with_identity(gram)
    L_inv, log_det = factorise_lean(C)
    wide = torch.ones(B, dtype=torch.bool, device=F.device)
    if dtype == torch.float32:
        channels, R, K1 = W.shape[1:]
        wide = forms.rough(diagonal, W, L_inv, EPS, forms.from_tiles(channels, R, K1, not forms.one_d(d)))
        for items, products in runs(wide, dtype):
            if products == torch.float64:
                WG[items], wF[items], _ = sums(samples, F, W, d, items, products, inverted)
                gram[items] = forms.gram(WG[items], blocks.of_items(W, items))
                C[items] = with_identity(gram[items])
                L_inv[items], log_det[items] = factorise_lean(C[items])
    improve(L_inv, log_det, C, wide, wanted, lambda items: mixed_gram(F, W, d, items, inverted, L_inv))
    return WG, wF, gram, L_inv, log_det, wide


def mixed_gram(F: Tensor, W: Tensor, d: Tensor, items: slice, inverted: bool, A: Tensor) -> Tensor:
    """APᵀD⁻¹PAᵀ [b, R, R] of some items, from products of rows of PAᵀ in float64; A [B, R, R], W in float64."""
    rows = forms.weighted(A, W)
    return forms.gram(_from_tiles(None, F, rows, d, items, torch.float64, inverted)[0], rows[items])


def logdet(F: Tensor, W: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log|Σ| [B], L⁻¹ [B, R, R], W_cG_c [B, channels, R, K+1] and `wide` [B]."""
    WG, _, _, L_inv, log_det, wide = factorised(None, F, W, d, inverted=False)
    return log_det + forms.logdet_D(d, W.shape[1] * F.shape[2]), L_inv, WG, wide


def gram(F: Tensor, W: Tensor, precision: Tensor) -> Tensor:
    """Pᵀ diag(precision) P [B, R, R], from products in float64."""
    W = W.double()
    return forms.gram(sums(None, F, W, precision, slice(0, F.shape[0]), torch.float64, inverted=True)[0], W)


def normal_equations(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    WG, wF, gram, *_ = factorised((x, loc), F, W, precision, inverted=True)
    w = forms.projection(wF, WG, W.double(), None if m is None else m.double())
    return gram, w.transpose(0, 1).contiguous()
