r"""The closed forms for a factor that is a linear map of features, in torch's own operators, block by block.

P = F̃ᵀWᵀ for each channel c of C: pixel n has the row P_c[n] = W_c f̃ₙ, with F̃ [K+1, M] the features and a row of
ones (the bias), M pixels, N = C·M. So C, w, r and every gradient are had from F, and nothing of size N×R exists:

    G_c = F̃D_c⁻¹F̃ᵀ          C = I + Σ_c W_c G_c W_cᵀ        w = Σ_c W_c F̃D_c⁻¹δ_c
    u_c = W_cᵀv              r_c = δ_c − F̃ᵀu_c               z_c = r_c/d_c         M_c = W_cᵀC⁻¹W_c

    grad_F̃  = Σ_c [2b M_cF̃D_c⁻¹ − 2a u_c z_cᵀ]              grad_x = 2az
    grad_W_c = Σ_b [2b C⁻¹W_cG_c − 2a v(F̃z_c)ᵀ]             grad_d as for a full factor, πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

with a = ∂loss/∂q and b = ∂loss/∂log|Σ|. A mean that is linear in the same features, μ_c = F̃ᵀm_c, joins the passes:
u_c + m_c takes the place of u_c in r and in grad_F, and grad_m_c = −2aF̃z_c.

There are two ways through a block, and `linear_forms.from_tiles` says which is cheaper. From the features themselves,
as above, K² products a pixel for each G_c and each M_c; or from tiles of P, made of the block and gone after it:

    W_cG_c = Σ (W_cf̃ₙ)f̃ₙᵀ/d        M_c = A_cᵀA_c, A_c = L⁻¹W_c, yₙ = A_c f̃ₙ:  M_c f̃ₙ = A_cᵀyₙ,  f̃ₙᵀM_c f̃ₙ = |yₙ|²

The functions take canonical shapes; item b of F has the weight W[b], or W[0] where all share one:

    x    [S, B, C, M]                       F  [B, K, M], any strides      d  [B, C, M] or [B, 1, 1]
    loc  [S or 1, B, C, M], or none         W  [1 or B, C, R, K+1]         m  [C, K+1], or none

`ops_linear` registers them; `linear_forms` has what follows the passes, `aten` what both kinds of factor share.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import linear_forms
from .aten import product_dtype, runs
from .memory import Scratch, empty_gradient, mapped


def keeps_products(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether W_cG_c and F̃z_c are outputs of the forward pass: here always."""
    return True


# Values that are made of F in one block, beside a copy of those features that have another dtype: larger ones are
# faster, but 2 MiB in float32 are to be small beside grad_F, in the forward pass too, whose blocks the C library may
# keep for later (kernels/LOG.md).
BLOCK_VALUES = 1 << 19
# Fewer items share a block rather than that it has fewer pixels.
BLOCK_PIXELS = 256


def _blocks(F: Tensor, rows: int, items: slice):
    """Index pairs (items, pixels) that cover F in blocks; `rows` is how many values are made of a pixel, or read where
    those are more."""
    B, M = items.stop - items.start, F.shape[2]
    step_b = _even(B, BLOCK_VALUES // max(1, min(M, BLOCK_PIXELS) * rows))
    step_n = _even(M, BLOCK_VALUES // (step_b * rows))
    for b in range(items.start, items.stop, step_b):
        for n in range(0, M, step_n):
            yield slice(b, min(b + step_b, items.stop)), slice(n, min(n + step_n, M))


def _even(size: int, step: int) -> int:
    """The step, `step` or less, that cuts `size` into as many parts of much the same size."""
    parts = -(-size // max(1, step))
    return max(1, -(-size // max(1, parts)))


def _carved(scratch: Scratch, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors side by side in one piece of memory."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(scratch.shaped(sum(sizes)).split(sizes), shapes, strict=True)]


def _features(F: Tensor, b: slice, n: slice, copies: Scratch) -> Tensor:
    """The features of a block in the dtype of `copies`: F itself where it has that, else a copy there."""
    f = F[b, :, n]
    return f if f.dtype == copies.dtype else copies.like(f).copy_(f)


# F̃'s row of ones need not be made: a product with F̃ treats the last column of its other side, or of itself, apart.


def _rows_from(A: Tensor, f: Tensor, out: Tensor | None = None) -> Tensor:
    """AF̃ [b, Q, n] of `A` [b, Q, K+1] and features `f` [b, K, n]."""
    K = f.shape[1]
    return torch.baddbmm(A[..., K:], A[..., :K], f, out=out)


def _add_products(sums: Tensor, y: Tensor, f: Tensor) -> None:
    """Adds yF̃ᵀ to `sums` [b, Q, K+1]; `y` [b, Q, n] and features `f` [b, K, n]."""
    K = f.shape[1]
    sums[..., :K] += torch.bmm(y, f.mT)
    sums[..., K] += y.sum(2, dtype=sums.dtype)


def _precision(d: Tensor, dtype: torch.dtype, inverted: bool = False) -> Callable[[slice, slice], Tensor]:
    """Gives 1/d of a block, [b, C, n] or [b, 1, 1]; `d` itself where it is already `inverted`."""

    def inverse(part: Tensor) -> Tensor:
        return part.to(dtype) if inverted else part.to(dtype).reciprocal()

    if d.shape[2] > 1:
        return lambda b, n: inverse(d[b, :, n])
    once = inverse(d)
    return lambda b, n: once[b]


def _scale(rows: Tensor, precision: Tensor) -> Tensor:
    """Rows [b, Q·C, n] times 1/d, in place; channels are the inner ones."""
    rows.unflatten(1, (-1, precision.shape[1])).mul_(precision.unsqueeze(1))
    return rows


def _delta(x: Tensor, loc: Tensor | None, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """x − μ, without the part of μ that is linear in the features, [b, S·C, n]."""
    delta = x[:, b, :, n].to(dtype)
    return (delta if loc is None else delta - loc[:, b, :, n].to(dtype)).transpose(0, 1).flatten(1, 2)


def _of(W: Tensor, b: slice) -> Tensor:
    """The weights of some items, [b, ...]: a view where all share one."""
    return W[b] if W.shape[0] > 1 else W.expand(b.stop - b.start, *W.shape[1:])


def _rows(W: Tensor) -> Tensor:
    """[., C, R, K+1] -> [., R·C, K+1], channels inside."""
    return W.transpose(1, 2).flatten(1, 2)


def _first_pass(x, loc, F: Tensor, W: Tensor, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool):
    """W_cG_c [b, C, R, K+1], F̃D_c⁻¹(x − loc)_c [b, S, C, K+1] and diag G_c [b, C or 1, K+1] of some items, in float64;
    products in `dtype`. `d` is the diagonal of D or, if `inverted`, of D⁻¹, 0 for a pixel that is not observed."""
    (S, _, channels, _), R, K, K1 = x.shape, W.shape[2], F.shape[1], W.shape[3]
    count, SC, one = items.stop - items.start, S * channels, linear_forms.one_value(d)
    tiles = linear_forms.from_tiles(channels, R, K1, not one)
    groups = 1 if one or tiles else channels  # products that are made of a block
    thin = S if groups > 1 else SC
    sums = F.new_zeros(count, groups, (channels * R if tiles else K1) + thin, K1, dtype=torch.float64)
    diagonal = F.new_zeros(count, 1 if one else channels, K1, dtype=torch.float64)
    # Rows of zeros make place for δ in the tile, because a product is fastest into memory of its own.
    weight = torch.cat([_rows(W), W.new_zeros(W.shape[0], SC, K1)], 1).to(dtype) if tiles else None
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    precision_of = _precision(d, dtype, inverted)
    for b, n in _blocks(F, K1 + sums.shape[2] if tiles or not one else K1 + SC, items):
        at = slice(b.start - items.start, b.stop - items.start)
        delta, precision = _delta(x, loc, b, n, dtype), precision_of(b, n)
        size, pixels = delta.shape[0], delta.shape[2]
        if weight is not None:
            f = _features(F, b, n, copies)
            y = _rows_from(_of(weight, b), f, out=scratch.shaped(size, sums.shape[2], pixels))
            y[:, channels * R :] = delta
            _add_products(sums[at, 0], y if one else _scale(y, precision), f)
            _add_products(diagonal[at], precision.expand(-1, -1, pixels), torch.mul(f, f, out=copies.like(f)))
        elif one:
            f = _features(F, b, n, copies)
            rows = scratch.shaped(size, 1 + SC, pixels)
            rows[:, 0] = 1
            rows[:, 1:] = delta
            sums[at, 0, :K, :K] += torch.bmm(f, f.mT)
            _add_products(sums[at, 0, K:], rows, f)
        else:  # here a row of ones costs less than products of its own for each channel
            stack, scaled = _carved(scratch, (size, K1 + S, pixels), (size, K1 + S, pixels))
            stack[:, :K] = F[b, :, n]
            stack[:, K] = 1
            for c in range(channels):
                stack[:, K1:] = delta[:, c::channels]
                torch.mul(stack, precision[:, c].unsqueeze(1), out=scaled)
                sums[at, c] += torch.bmm(scaled, stack[:, :K1].mT)
    if one and not tiles:
        sums[:, :, :K, K] = sums[:, :, K, :K]
    if one:  # 1/d is in `diagonal` of the tiles already
        scale = d[items].double() if inverted else d[items].double().reciprocal()
        sums *= scale.unsqueeze(-1)
    if tiles:
        parts = sums[:, 0].unflatten(1, (-1, channels))
        return parts[:, :R].transpose(1, 2), parts[:, R:], diagonal
    G, wF = sums[:, :, :K1], sums[:, :, K1:]
    wF = wF[:, 0].unflatten(1, (S, channels)) if one else wF.transpose(1, 2)
    return torch.matmul(_of(W, items), G), wF, G.diagonal(dim1=-2, dim2=-1)


def _capacitance(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, d: Tensor, inverted: bool):
    """W_cG_c, F̃D⁻¹(x − loc), C and C⁻¹ [B, R, R], log|C| [B] and `wide` [B], decided as in `aten`."""
    B, dtype = F.shape[0], product_dtype(x, F, W, d) if F.device.type == "cpu" else torch.float64
    W64 = W.double()
    WG, wF, diagonal = _first_pass(x, loc, F, W64, d, slice(0, B), dtype, inverted)
    C = linear_forms.capacitance(WG, W64)
    C_inv, log_det = linear_forms.factorise(C)
    if dtype == torch.float64:
        return WG, wF, C, C_inv, log_det, torch.ones(B, dtype=torch.bool, device=F.device)
    channels, R, K1 = W.shape[1:]
    tiles = linear_forms.from_tiles(channels, R, K1, not linear_forms.one_value(d))
    wide = linear_forms.too_rough(diagonal, W64, C_inv, torch.finfo(torch.float32).eps, tiles)
    for items, products in runs(wide, dtype):
        if products == torch.float64:
            WG[items], wF[items], _ = _first_pass(x, loc, F, W64, d, items, products, inverted)
            C[items] = linear_forms.capacitance(WG[items], _of(W64, items))
            C_inv[items], log_det[items] = linear_forms.factorise(C[items])
    return WG, wF, C, C_inv, log_det, wide


def linear_gram(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """C = I + Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    WG, wF, C, *_ = _capacitance(x, loc, F, W, precision, inverted=True)
    w = linear_forms.projection(wF, WG, W.double(), None if m is None else m.double())
    return C, w.transpose(0, 1).contiguous()


def linear_mahalanobis_and_logdet(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor):
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, W_cG_c [B, C, R, K+1], F̃z_c
    [B, S, C, K+1], the residual and `wide` [B].

    All float64 but the residual r = δ − F̃ᵀ(u + m) [S, B, C, M], made in float64 and rounded once, at v before its last
    step.
    """
    S, (B, K, M), channels = x.shape[0], F.shape, W.shape[1]
    SC = S * channels
    dtype, W64, m64 = product_dtype(x, F, W, d), W.double(), None if m is None else m.double()
    WG, wF, _, C_inv, logdet, wide = _capacitance(x, loc, F, W, d, inverted=False)
    logdet = logdet + linear_forms.logdet_D(d, channels * M)
    v = linear_forms.projection(wF, WG, W64, m64) @ C_inv
    q, g = v.square().sum(-1), -v
    u = linear_forms.coefficients(v, W64)
    minus_u = -(u if m64 is None else u + m64).flatten(1, 2)
    residual = mapped(x.shape, dtype, x.device)
    zF, rz = F.new_zeros(B, SC, K + 1, dtype=torch.float64), F.new_zeros(B, SC, dtype=torch.float64)
    exact, scratch = Scratch(torch.float64, F.device), Scratch(torch.float64, F.device)
    for items, products in runs(wide, dtype) if S else ():
        copies, precision_of = Scratch(products, F.device), _precision(d, products)
        for b, n in _blocks(F, 2 * (K + SC), items):  # float64 takes twice the memory
            f64 = _features(F, b, n, exact)
            f = f64 if products == torch.float64 else _features(F, b, n, copies)
            # Where d is small, r is what is left of numbers hundreds of times its size: made in float64, rounded once.
            made = scratch.shaped(f.shape[0], SC, f.shape[2])
            torch.add(_delta(x, loc, b, n, torch.float64), minus_u[b, :, K:], out=made)
            r = made.baddbmm_(minus_u[b, :, :K], f64).to(products)
            residual[:, b, :, n] = r.unflatten(1, (S, channels)).transpose(0, 1)
            z = _scale(r.clone(), precision_of(b, n))
            _add_products(zF[b], z, f)
            rz[b] += z.mul_(r).sum(2, dtype=torch.float64)
    q, zF = q + rz.unflatten(1, (S, channels)).sum(2), zF.unflatten(1, (S, channels))
    g = g + linear_forms.projection(zF, WG, W64, None)
    step = g @ C_inv
    q, zF = q - (g * step).sum(-1), linear_forms.of_scores(zF, WG, step)
    return q.T.contiguous(), logdet, C_inv, (v + step).transpose(0, 1), step.transpose(0, 1), WG, zF, residual, wide


def linear_mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    WG: Tensor,
    zF: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M], grad_F, grad_W, grad_m (empty without m) and grad_d; `needs` is for x, F and d: what is not
    needed is empty. grad_loc is −grad_x."""
    (S, _, channels, M), (R, K1), K = x.shape, W.shape[2:], F.shape[1]
    need_x, need_F, need_d = needs
    SC, one = S * channels, linear_forms.one_value(d)
    tiles = linear_forms.from_tiles(channels, R, K1, not one)
    need_rows = need_F or (need_d and not one)
    W64, a, b_ = W.double(), grad_mahalanobis.T.double(), grad_logdet.double()  # a [B, S], b [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = linear_forms.coefficients(v, W64)
    u_step = linear_forms.coefficients(step, W64).flatten(1, 2)
    minus_2au = (-2 * a[:, :, None, None] * (u if m is None else u + m.double())).flatten(1, 2)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=residual.dtype)
    grad_F = empty_gradient(F) if need_F else F.new_empty(0)
    grad_d = d.new_zeros(d.shape if need_d else 0, dtype=torch.float64 if one else d.dtype)
    if need_d and one:
        # Σₙ πₙ = (N − R + tr C⁻¹)/d, because PᵀD⁻¹P = C − I.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d += (b_ * (channels * M - R + trace))[:, None, None] / d.double()
    # `rows` make what a block needs from F̃: yₙ of the tiles, and what z is corrected by. From tiles, grad_F is `back`
    # times [y/d; z]; from the features, the sum of 2b M_cf̃ₙ/d, for a scalar d one product, and `back_z` times z.
    tile = channels * R if tiles and need_rows else 0
    back_z = minus_2au.mT[:, :K]
    if tile:
        A = _rows(linear_forms.weighted(linear_forms.root(C_inv), W64))
        rows = torch.cat([A, -u_step], 1)
        back = torch.cat([A.mT[:, :K] * (2 * b_[:, None, None] / (d.double() if one else 1)), back_z], 2)
    else:
        A = (linear_forms.quadratic_sum if one else linear_forms.quadratic)(C_inv, W64)
        rows = -u_step
        back = A[:, 0, :K] * (2 * b_[:, None, None] / d.double()) if one else A
    spare_rows = max(K, tile) if tile or one else K + K1  # grad_F of a block, and M_cf̃ₙ or squares
    for items, products in runs(wide, residual.dtype):
        copies, scratch = Scratch(products, F.device), Scratch(products, F.device)
        precision_of = _precision(d, products)
        rows_, back_, back_z_, a_, two_b = (t.to(products) for t in (rows, back, back_z, a, 2 * b_[:, None, None]))
        for b, n in _blocks(F, tile + SC + spare_rows, items):
            f, precision = _features(F, b, n, copies), precision_of(b, n)
            count, _, pixels = f.shape
            made, spare = _carved(scratch, (count, tile + SC, pixels), (count * spare_rows * pixels,))
            _rows_from(rows_[b], f, out=made)
            y, z = made[:, :tile], made[:, tile:]
            _scale(z.add_(residual[:, b, :, n].to(products).transpose(0, 1).flatten(1, 2)), precision)
            z_c = z.unflatten(1, (S, channels))
            if need_x:
                grad_x[:, b, :, n] = (2 * a_[b, :, None, None] * z_c).transpose(0, 1)
            if need_d:
                az2 = (z_c.square() * a_[b, :, None, None]).sum(1)
                if one:
                    grad_d[b] -= az2.sum((1, 2), dtype=torch.float64)[:, None, None]
            if not need_rows:
                continue
            grad_f = spare[: count * K * pixels].view(count, K, pixels)
            if tile:
                if need_d and not one:
                    squares = torch.mul(y, y, out=spare[: y.numel()].view(y.shape))
                    pi = precision - squares.unflatten(1, (R, channels)).sum(1) * precision.square()
                    grad_d[b, :, n] = 0.5 * two_b[b] * pi - az2
                if not one:
                    _scale(y, precision)
                torch.bmm(back_[b], made, out=grad_f)
            elif one:
                _rows_from(back_[b], f, out=grad_f).baddbmm_(back_z_[b], z)
            else:
                torch.bmm(back_z_[b], z, out=grad_f)
                Mf = spare[grad_f.numel() :].view(count, K1, pixels)
                for c in range(channels):
                    p = precision[:, c]
                    _rows_from(back_[b, c], f, out=Mf)
                    if need_d:
                        pi = p - ((Mf[:, :K] * f).sum(1) + Mf[:, K]) * p.square()
                        grad_d[b, c, n] = 0.5 * two_b[b, 0] * pi - az2[:, c]
                    grad_f.addcmul_(Mf[:, :K], two_b[b] * p.unsqueeze(1))
            if need_F:
                grad_F[b, :, n] = grad_f
    grad_W = linear_forms.grad_weight(a, b_, C_inv, v, WG, zF, shared=W.shape[0] == 1)
    grad_m = F.new_empty(0) if m is None else linear_forms.grad_mean(a, zF).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d.to(d.dtype)


def linear_gram_backward(
    grad_C: Tensor,
    grad_w: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    precision: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M], grad_F, grad_W, grad_m (empty without m) and grad_π for the precision π; `needs` is for x, F
    and π: what is not needed is empty. From tiles pₙ = W_cf̃ₙ, with A = grad_C + grad_Cᵀ and B = grad_w:

        grad_pₙ = πₙ (Apₙ + Σ_s B_s δₛₙ)      grad_δₛₙ = πₙ B_sᵀpₙ      grad_πₙ = ½ pₙᵀApₙ + Σ_s δₛₙ B_sᵀpₙ
    """
    (S, B, channels), (R, K1), K = x.shape[:3], W.shape[2:], F.shape[1]
    need_x, need_F, need_precision = needs
    SC, CR, dtype = S * channels, channels * R, product_dtype(x, F, W, precision)
    weight, A, back = _rows(W.to(dtype)), (grad_C + grad_C.mT).to(dtype), grad_w.transpose(0, 1).to(dtype)
    mean = None if m is None else m.to(dtype)
    grad_x = x.new_empty(x.shape if need_x else 0, dtype=dtype)
    grad_F = empty_gradient(F) if need_F else F.new_empty(0)
    grad_pi = precision.new_zeros(precision.shape if need_precision else 0, dtype=torch.float64)
    grad_rows = F.new_zeros(B, CR + SC, K1, dtype=torch.float64)
    copies, scratch = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in _blocks(F, K + 2 * CR + SC, slice(0, B)):
        f = _features(F, b, n, copies)
        count, _, pixels = f.shape
        p, made = _carved(scratch, (count, CR, pixels), (count, CR + SC, pixels))
        _rows_from(_of(weight, b), f, out=p)
        delta, pi = _delta(x, loc, b, n, dtype), precision[b, :, n if precision.shape[2] > 1 else slice(None)].to(dtype)
        if mean is not None:
            delta = delta - _rows_from(mean.expand(count, channels, K1), f).repeat(1, S, 1)
        grad_p, grad_delta = made[:, :CR], made[:, CR:]
        as_columns = p.view(count, R, channels * pixels)
        grad_p.copy_(torch.bmm(A[b], as_columns).view(count, CR, pixels))
        grad_delta.copy_(torch.bmm(back[b], as_columns).view(count, SC, pixels))
        if need_precision:
            terms = 0.5 * (p * grad_p).unflatten(1, (R, channels)).sum(1)
            terms += (delta * grad_delta).unflatten(1, (S, channels)).sum(1)
            if not linear_forms.one_value(precision):
                grad_pi[b, :, n] = terms.double()
            else:
                grad_pi[b] += terms.sum((1, 2), dtype=torch.float64)[:, None, None]
        if S:
            grad_p += torch.bmm(back[b].mT, delta.reshape(count, S, channels * pixels)).view(count, CR, pixels)
        _scale(made, pi.expand(-1, channels, -1))
        if need_x:
            grad_x[:, b, :, n] = grad_delta.unflatten(1, (S, channels)).transpose(0, 1)
        _add_products(grad_rows[b], made, f)
        if need_F:
            rows = _of(weight, b)
            if mean is not None:
                rows = torch.cat([rows, -mean.repeat(S, 1).expand(count, SC, K1)], 1)
            grad_F[b, :, n] = torch.bmm(rows[..., :K].mT, made if mean is not None else grad_p)
    grad_W = grad_rows[:, :CR].unflatten(1, (R, channels)).transpose(1, 2)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W
    grad_m = F.new_empty(0) if m is None else -grad_rows[:, CR:].unflatten(1, (S, channels)).sum((0, 1)).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype).contiguous(), grad_m, grad_pi.to(precision.dtype)
