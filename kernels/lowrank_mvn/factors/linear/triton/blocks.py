r"""A linear factor of many features, by way of blocks of P: made of a block of pixels, and gone after it.

Where K is much larger than R · channels, products of the features with themselves (K² for each G_c and each M_c) cost
more than making P does. A block of P is then a dense factor of some of the pixels, and goes through its kernels:

    C and log|D|    `capacitance` of each block, added up block by block
    r, q and v      from the features, as ever (`residual`): P is rounded, and r is what cancellation leaves
    gradients       `backward` of each block, with the last step of v in place of v

so that in it P multiplies that step alone, which is small. What v − step adds to grad_P, −2a(v − step)zᵀ with 2az =
grad_x, follows on the way from P to the features:

    grad_F   = Σ_c W_cᵀ grad_P_c − Σ (W_cᵀ(v − step) + m_c) grad_x_cᵀ
    grad_W_c = grad_P_c F̃ᵀ − (v − step)(F̃ grad_x_c)ᵀ,    grad_m_c = −Σ F̃ grad_x_c

Items that need float64 get their blocks of P in float64, made by a kernel that leaves the others alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ....capacitance import inverse, sum_of_pi, too_rough
from ....device import again, heaviest, launch, solve
from ...dense.triton import backward, capacitance
from ...dense.triton.backward import Gradients, Samples
from .. import forms
from ..forms import one_d
from .heaviest import add_pi
from .product import product, summed

# Up to so many features a tile of most kernels of a linear factor holds them all, and memory is what they wait for, or
# near to it; beyond, G alone reads F once for each tile.
FUSED_FEATURES = launch.FUSED_R

# Values in a block of P, of all items: 16 MB in float32, of which an H100's cache (50 MB) may still have most when they
# are read, while starting its kernels costs less than they do. An item has LEAST_PIXELS in it, however many items there
# are: that much of P is little beside F.
BLOCK_VALUES = 1 << 22
LEAST_PIXELS = 256


def chosen(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether blocks of P are the cheaper way: more features than a tile holds, and K² products more than those that
    make P."""
    return K1 - 1 > FUSED_FEATURES and forms.from_tiles(channels, R, K1, per_pixel)


def _blocks(F: Tensor, rows: int) -> Iterator[slice]:
    """Pixels of each block, `rows` being made of every one of them."""
    B, _, pixels = F.shape
    step = max(LEAST_PIXELS, BLOCK_VALUES // max(1, B * rows))
    step = launch.ceil_div(pixels, max(1, launch.ceil_div(pixels, step)))
    step = max(1, launch.ceil_div(step, 16)) * 16  # so that blocks begin where 16 bytes do
    ends = [*range(step, pixels - 1, step), pixels]  # none of one pixel, whose d would look like one value for all
    for start, end in zip([0, *ends], ends, strict=False):
        yield slice(start, end)


def _weight(W: Tensor, B: int) -> Tensor:
    """[B, R · channels, K+1], channels inside; a view where all items share one."""
    return W.transpose(1, 2).flatten(1, 2).expand(B, -1, -1)


def _factor(rows: Tensor, R: int) -> Tensor:
    """R · channels rows of a block [B, rows, n], as P [B, channels · n, R]."""
    P: Tensor = rows.unflatten(1, (R, -1)).flatten(2).mT
    return P


def _of(d: Tensor, n: slice) -> Tensor:
    """The diagonal of a block, [B, channels · n] or [B, 1]."""
    return d.flatten(1) if one_d(d) else d[:, :, n].flatten(1)


def factorised(
    F: Tensor, W: Tensor, d: Tensor, kind: str, inverted: bool = False, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """L⁻¹ [B, R, R], log|Σ| [B] and `wide` [B]; `gram` [B, R, R] is filled with PᵀD⁻¹P, if given."""
    (B, _, pixels), (channels, R) = F.shape, W.shape[1:3]
    L_inv, logdet = F.new_empty(B, R, R, dtype=torch.float64), F.new_empty(B, dtype=torch.float64)

    def add_up(kind: str, flags: Tensor | None, mix: Tensor | None = None) -> tuple[Tensor, None, Tensor]:
        weight = _weight(W.to(torch.float64 if kind == "float64" else torch.float32), B)
        total, log_D = (F.new_zeros(B, 1, *size, dtype=torch.float64) for size in ((R, R), ()))
        for n in _blocks(F, channels * R):
            P = F.new_empty(B, 1, channels * R, n.stop - n.start, dtype=weight.dtype)
            product(weight, F[:, :, n], P, kind, ones=True, flags=flags)
            part = capacitance.partial_sums(None, _factor(P[:, 0], R), _of(d, n), kind, inverted, flags, mix)
            total += part[0].sum(1, keepdim=True, dtype=torch.float64)
            log_D += part[2].sum(1, keepdim=True)
        if gram is not None:
            solve.whole(total, gram, flags)
        return total, None, log_D

    wide = torch.empty(B, dtype=torch.bool, device=F.device)
    size, limit = (d.flatten(1), channels * pixels), launch.tolerance(kind, R)
    solve.solve(add_up(kind, None), *size, (L_inv, None, logdet, wide), launch.ROUNDING[kind], limit)
    if kind != "float64":
        wide |= _too_rough(F, W, d, L_inv, inverted, launch.ROUNDING[kind])
    flags = wide.view(torch.uint8)
    if gram is None:
        again.again(add_up("float64", flags, L_inv), *size, (L_inv, None, logdet), flags)
    elif kind != "float64":
        add_up("float64", flags)
    return L_inv, logdet, torch.ones_like(wide) if kind == "float64" else wide


def _too_rough(F: Tensor, W: Tensor, d: Tensor, L_inv: Tensor, inverted: bool, rounding: float) -> Tensor:
    """Whether rounding in P may have moved log|C| by more than its tolerance, [B].

    |ΔP_nr| ≤ ε|W_cr||f̃ₙ|, so that aᵣ² = Σ_c |W_cr|² Σₙ |f̃ₙ|²/dₙ, which takes less of F than the diagonal of G does.
    """
    squares = torch.linalg.vector_norm(F, dim=1, dtype=torch.promote_types(F.dtype, torch.float32)).square() + 1
    precision = d.to(squares.dtype)
    precision = precision if inverted else precision.reciprocal()
    trace = (precision * squares.unsqueeze(1)).sum(2, dtype=torch.float64)  # [B, channels or 1]
    return too_rough((W.double().square().sum(-1) * trace.unsqueeze(-1)).sum(1), L_inv, rounding)


class Kept(NamedTuple):
    """What the gradients of q need of the forward pass; a = ∂loss/∂q."""

    a: Tensor  # [S, B]
    v: Tensor  # [S, B, R]
    step: Tensor  # [S, B, R]
    residual: Tensor  # [S, B, channels, pixels]
    m: Tensor | None  # [channels, K+1]


def gradients(
    kept: Kept | None,
    b: Tensor,
    F: Tensor,
    W: Tensor,
    d: Tensor,
    L_inv: Tensor,
    wide: Tensor,
    needs: list[bool],
    kind: str,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor]:
    """grad_x [S, B, channels, pixels] (none without samples), grad_F, grad_W, grad_m (likewise) and grad_d, b [B] being
    ∂loss/∂log|Σ|; `needs` is for x, F and d: what is not needed is empty."""
    (B, K, _), (channels, R), W64 = F.shape, W.shape[1:3], W.double()
    S = 0 if kept is None else kept.residual.shape[0]
    need_x, need_F, need_d = needs
    CR, SC, one = channels * R, S * channels, one_d(d)
    work = torch.float64 if kind == "float64" else torch.float32
    grad_x = None if kept is None else kept.residual.new_empty(kept.residual.shape if need_x else 0)
    grad_F = torch.empty_like(F) if need_F else F.new_empty(0)
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if need_d else d.new_empty(0)
    back = _weight(W64, B)
    if kept is not None:
        u = forms.coefficients((kept.v - kept.step).transpose(0, 1), W64)
        u = u if kept.m is None else u + kept.m.double()
        back = torch.cat([back, -u.flatten(1, 2)], 1)
    back = back[..., :K].mT.to(work)
    weights = {k: _weight(W64 if k == "float64" else W.to(work), B) for k in (kind, "float64")}
    sums = F.new_zeros(B, dtype=torch.float64)
    grad_rows = F.new_zeros(B, CR + SC, K + 1, dtype=torch.float64)
    inverses = inverse(L_inv), L_inv
    listed = heaviest.empty(F, B, R) if need_d and not one else None
    for n in _blocks(F, CR + SC):
        f, pixels, d_n, samples, grad_r = F[:, :, n], n.stop - n.start, _of(d, n), None, None
        made = F.new_empty(B, CR + SC, pixels, dtype=work)  # grad_P, and below it grad_x
        if kept is not None:
            r = kept.residual[..., n].flatten(2)
            samples, grad_r = Samples(kept.a, r, kept.step, kept.step), r.new_empty(r.shape)
        grad_d_n = d_n.new_empty(d_n.shape) if need_d else None
        of_d = None if grad_d_n is None else grad_d_n.unsqueeze(0)
        before = None if listed is None else listed[:, :1].clone()
        grads = Gradients(grad_r, None, _factor(made[:, :CR], R)[None], of_d, listed)
        for products, weight in weights.items():
            P = torch.empty_like(made, dtype=weight.dtype)[:, :CR]  # laid out as grad_P is
            flags = wide.view(torch.uint8) if products != kind else None
            product(weight, f, P.unsqueeze(1), products, ones=True, flags=flags)
            flagged = None if kind == "float64" else wide
            sums += backward.gradients(samples, b, _factor(P, R), d_n, inverses, flagged, grads, products)
        if grad_r is not None:
            z = grad_r.unflatten(2, (channels, pixels))
            made[:, CR:] = z.transpose(0, 1).flatten(1, 2)
            if grad_x is not None and need_x:
                grad_x[..., n] = z
        if listed is not None and before is not None and grad_d_n is not None:
            grad_d[:, :, n] = grad_d_n.unflatten(1, (channels, pixels))
            _renumber(listed, before, n, F.shape[2])
        grad_rows[..., :K] += summed(made, f, kind)
        grad_rows[..., K] += made.sum(2, dtype=torch.float64)
        if need_F:
            product(back, made, grad_F[:, :, n].unsqueeze(1), kind)
    if listed is not None:
        add_pi(grad_d, listed, F, W64, d, L_inv, b)
    elif need_d:
        grad_d.copy_((b * sum_of_pi(d[:, 0, 0], channels * F.shape[2], L_inv) + sums)[:, None, None])
    of_P, of_x = grad_rows.split([CR, SC], 1)
    grad_W, grad_m = of_P.unflatten(1, (R, channels)).transpose(1, 2), None
    if kept is not None:
        of_x = of_x.unflatten(1, (S, channels))
        grad_W = grad_W - torch.einsum("sbr,bsck->bcrk", kept.v - kept.step, of_x)
        grad_m = None if kept.m is None else -of_x.sum((0, 1)).to(kept.m.dtype)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W.contiguous()
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d


def _renumber(listed: Tensor, before: Tensor, n: slice, pixels: int) -> None:
    """Pixels of a block that have joined the lists since there were so many get their numbers in the image."""
    H, width = listed[:, 1:], n.stop - n.start
    place = torch.arange(H.shape[1], device=H.device)
    new = (place >= before) & (place < listed[:, :1])
    H.copy_(torch.where(new, H // width * pixels + n.start + H % width, H))


__all__ = ["Kept", "chosen", "factorised", "gradients"]
