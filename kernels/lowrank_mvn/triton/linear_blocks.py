r"""A linear factor of many features, by way of blocks of P: made of a block of pixels, and gone after it.

Where K is much larger than C·R, products of the features with themselves (K² for each G_c and each M_c) cost more than
making P does. A block of P is then a full factor of some of the pixels, and goes through that factor's own kernels:

    C and log|D|    `capacitance` of each block, added up block by block
    r, q and v      from the features, as ever (`linear_residual`): P is rounded, and r is what cancellation leaves
    gradients       `backward` of each block, with the residual in place of x − μ and the last step of v in place of v

so that in it P multiplies that step alone, which is small. What v − step adds to grad_P, −2a(v − step)zᵀ with 2az =
grad_x, follows on the way from P to the features:

    grad_F   = Σ_c W_cᵀ grad_P_c − Σ (W_cᵀ(v − step) + m_c) grad_x_cᵀ
    grad_W_c = grad_P_c F̃ᵀ − (v − step)(F̃ grad_x_c)ᵀ,    grad_m_c = −Σ F̃ grad_x_c

Items that need float64 get their blocks of P in float64, made by a kernel that leaves the others alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import linear_forms
from ..aten import LOG_DET_TOLERANCE
from . import backward, capacitance, common, solve
from .linear_common import one_value
from .product import product, summed

# Up to so many features a tile of most kernels of a linear factor holds them all, and memory is what they wait for, or
# near to it; beyond, G alone reads F once for each tile.
FUSED_FEATURES = common.FUSED_R

# Values in a block of P, of all items: 16 MB in float32, of which an H100's cache (50 MB) may still have most when they
# are read, while starting its kernels costs less than they do. An item has LEAST_PIXELS in it, however many items there
# are: that much of P is little beside F.
BLOCK_VALUES = 1 << 22
LEAST_PIXELS = 256


def chosen(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether blocks of P are the cheaper way: more features than a tile holds, and K² products more than C·R·K."""
    return K1 - 1 > FUSED_FEATURES and linear_forms.from_tiles(channels, R, K1, per_pixel)


def _blocks(F: Tensor, rows: int) -> Iterator[slice]:
    """Pixels of each block, `rows` being made of every one of them."""
    B, _, M = F.shape
    step = max(LEAST_PIXELS, BLOCK_VALUES // max(1, B * rows))
    step = common.ceil_div(M, max(1, common.ceil_div(M, step)))
    step = max(1, common.ceil_div(step, 16)) * 16  # so that blocks begin where 16 bytes do
    ends = [*range(step, M - 1, step), M]  # none of one pixel, whose diagonal would look like one value for all
    for start, end in zip([0, *ends], ends, strict=False):
        yield slice(start, end)


def _weight(W: Tensor, B: int) -> Tensor:
    """[B, R·C, K+1], channels inside; a view where all items share one."""
    return W.transpose(1, 2).flatten(1, 2).expand(B, -1, -1)


def _factor(rows: Tensor, R: int) -> Tensor:
    """R·C rows of a block [B, rows, n], as P [B, C·n, R]."""
    return rows.unflatten(1, (R, -1)).flatten(2).mT


def _of(d: Tensor, n: slice) -> Tensor:
    """The diagonal of a block, [B, C·n] or [B, 1]."""
    return d.flatten(1) if one_value(d) else d[:, :, n].flatten(1)


def factorised(F: Tensor, W: Tensor, d: Tensor, inverted: bool, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C, C⁻¹ [B, R, R], log|Σ| [B] and `wide` [B], as `linear._factorised`."""
    (B, _, M), (channels, R), flat = F.shape, W.shape[1:3], d.flatten(1)
    C, C_inv = (F.new_empty(B, R, R, dtype=torch.float64) for _ in range(2))
    logdet, wide = F.new_empty(B, dtype=torch.float64), torch.ones(B, dtype=torch.bool, device=F.device)
    out = C_inv, F.new_empty(1, B, R, dtype=torch.float64), logdet, wide

    def add_up(kind: str, final: bool, flags: Tensor | None, rounding: float = 0.0) -> None:
        weight = _weight(W.to(torch.float64 if kind == "float64" else torch.float32), B)
        gram, log_D = (F.new_zeros(B, 1, *size, dtype=torch.float64) for size in ((R, R), ()))
        for n in _blocks(F, channels * R):
            P = F.new_empty(B, 1, channels * R, n.stop - n.start, dtype=weight.dtype)
            product(weight, F[:, :, n], P, kind, ones=True, flags=flags)
            d_n = _of(d, n)
            block = d_n.new_empty(0, *d_n.shape), d_n, _factor(P[:, 0], R), d_n  # without x and loc
            C_part, w, log_D_part = capacitance.partial_sums(*block, inverted, kind, flags)
            gram += C_part.sum(1, keepdim=True, dtype=torch.float64)
            log_D += log_D_part.sum(1, keepdim=True)
        flagged, N = flags is not None, channels * M
        solve.solve((gram, w, log_D), flat, N, out, with_w=False, final=final, flagged=flagged, rounding=rounding)
        solve.whole(gram, C, flags)

    if kind != "float64":
        add_up(kind, final=False, flags=None, rounding=common.ROUNDING[kind])
        wide |= _too_rough(F, W, d, C_inv, inverted, common.ROUNDING[kind])
        add_up("float64", final=True, flags=wide.view(torch.uint8))
    else:
        add_up(kind, final=True, flags=None)
    return C, C_inv, logdet, wide


def _too_rough(F: Tensor, W: Tensor, d: Tensor, C_inv: Tensor, inverted: bool, rounding: float) -> Tensor:
    """Whether rounding in P may have moved log|C| by more than its tolerance, [B].

    As `linear_forms.too_rough` of tiles, with |ΔP_nr| ≤ ε|W_cr||f̃ₙ|, so that aᵣ² = Σ_c |W_cr|² Σₙ |f̃ₙ|²/dₙ, which takes
    less of F than the diagonal of G does.
    """
    squares = torch.linalg.vector_norm(F, dim=1, dtype=torch.promote_types(F.dtype, torch.float32)).square() + 1
    precision = d.to(squares.dtype)
    precision = precision if inverted else precision.reciprocal()
    trace = (precision * squares.unsqueeze(1)).sum(2, dtype=torch.float64)  # [B, C or 1]
    a2 = (W.double().square().sum(-1) * trace.unsqueeze(-1)).sum(1)
    moved = (a2 * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square()
    return ~(rounding * moved <= LOG_DET_TOLERANCE)


def gradients(
    a: Tensor,
    b: Tensor,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M], grad_F, grad_W, grad_m (empty without m) and grad_d, as `linear`'s; a [S, B], b [B]."""
    (S, B, channels, M), (R, K1), K, W64 = residual.shape, W.shape[2:], F.shape[1], W.double()
    need_x, need_F, need_d = needs
    CR, SC, scalar_d = channels * R, S * channels, one_value(d)
    work = torch.float64 if kind == "float64" else torch.float32
    grad_x = residual.new_empty(residual.shape if need_x else 0)
    grad_F = torch.empty_like(F) if need_F else F.new_empty(0)
    grad_d = torch.empty_like(d, memory_format=torch.contiguous_format) if need_d else d.new_empty(0)
    rest = (v - step).transpose(0, 1)  # [B, S, R]
    u = linear_forms.coefficients(rest, W64)
    u = (u if m is None else u + m.double()).flatten(1, 2)
    back = torch.cat([_weight(W64, B), -u], 1)[..., :K].mT.to(work)
    weights = {kind: _weight(W.to(work), B)}
    if kind != "float64":
        weights["float64"] = _weight(W64, B)
    sums = F.new_zeros(B, dtype=torch.float64)
    grad_rows = F.new_zeros(B, CR + SC, K1, dtype=torch.float64)
    blocks = [*_blocks(F, CR + SC)]
    zero = residual.new_zeros(1, 1, channels * max(n.stop - n.start for n in blocks)).expand(1, B, -1)
    for n in blocks:
        f, pixels = F[:, :, n], n.stop - n.start
        made = F.new_empty(B, CR + SC, pixels, dtype=work)  # grad_P, and below it grad_x
        r = residual[..., n].flatten(2)
        d_n, contiguous = _of(d, n), torch.contiguous_format
        grad_r = torch.empty_like(r, memory_format=contiguous)
        grad_d_n = torch.empty_like(d_n, memory_format=contiguous) if need_d and not scalar_d else None
        wanted_d = d_n if need_d and grad_d_n is None else grad_d_n
        grads = grad_r, None, _factor(made[:, :CR], R)[None], None if wanted_d is None else wanted_d[None]
        for products, weight in weights.items():
            P = torch.empty_like(made, dtype=weight.dtype)[:, :CR]  # laid out as grad_P is
            flags = wide.view(torch.uint8) if products != kind else None
            product(weight, f, P.unsqueeze(1), products, ones=True, flags=flags)
            block = a, b, r, zero[..., : r.shape[2]], _factor(P, R), d_n
            sums += backward.gradients(*block, C_inv, step, wide, grads, 1, products, flagged=kind != "float64")
        z = grad_r.unflatten(2, (channels, pixels))
        made[:, CR:] = z.transpose(0, 1).flatten(1, 2)
        if need_x:
            grad_x[..., n] = z
        if grad_d_n is not None:
            grad_d[:, :, n] = grad_d_n.unflatten(1, (channels, pixels))
        grad_rows[..., :K] += summed(made, f, kind)
        grad_rows[..., K] += made.sum(2, dtype=torch.float64)
        if need_F:
            product(back, made, grad_F[:, :, n].unsqueeze(1), kind)
    if scalar_d and need_d:
        # Σ π = (N − R + tr C⁻¹)/d.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d.copy_((b * (channels * M - R + trace) / d[:, 0, 0].double() + sums)[:, None, None])
    of_P, of_x = grad_rows.split([CR, SC], 1)
    of_x = of_x.unflatten(1, (S, channels))
    grad_W = of_P.unflatten(1, (R, channels)).transpose(1, 2) - torch.einsum("bsr,bsck->bcrk", rest, of_x)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W.contiguous()
    grad_m = F.new_empty(0) if m is None else -of_x.sum((0, 1)).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d


__all__ = ["chosen", "factorised", "gradients"]
