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

import torch
from torch import Tensor

from . import linear_forms
from .aten import Scratch, empty_gradient, product_dtype, runs


def keeps_products(channels: int, R: int, K1: int, per_pixel: bool) -> bool:
    """Whether W_cG_c and F̃z_c are outputs of the forward pass: here always."""
    return True


# Values of F in one block and of what is made of it: larger ones are faster, but 2 MiB in float32 are to be small
# beside grad_F, in the forward pass too, whose blocks the C library may keep for later (kernels/LOG.md).
BLOCK_VALUES = 1 << 19
# Fewer items share a block rather than that it has fewer pixels.
BLOCK_PIXELS = 256


def _blocks(F: Tensor, rows: int, items: slice):
    """Index pairs (items, pixels) that cover F in blocks; `rows` is what is made of a pixel, its features included."""
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


def _fill(stack: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """[F̃; y] of a block: its first part F̃, filled from the features `f`, and its last, y, which is not."""
    K = f.shape[1]
    stack[:, :K] = f
    stack[:, K] = 1
    return stack[:, : K + 1], stack[:, K + 1 :]


def _precision(d: Tensor, b: slice, n: slice, dtype: torch.dtype, inverted: bool = False) -> Tensor:
    """1/d of a block, [b, C, n] or [b, 1, 1]; `d` itself where it is already `inverted`."""
    block = (d[b, :, n] if d.shape[2] > 1 else d[b]).to(dtype)
    return block if inverted else block.reciprocal()


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
    (S, _, channels, _), R, K1 = x.shape, W.shape[2], W.shape[3]
    count, SC, one = items.stop - items.start, S * channels, linear_forms.one_value(d)
    tiles = linear_forms.from_tiles(channels, R, K1, not one)
    groups = 1 if one or tiles else channels  # products that are made of a block
    rows = channels * R + SC if tiles else K1 + (SC if one else S)
    sums = F.new_zeros(count, groups, rows, K1, dtype=torch.float64)
    diagonal = F.new_zeros(count, 1 if one else channels, K1, dtype=torch.float64)
    # Rows of zeros make place for δ in the tile, because a product is fastest into memory of its own.
    weight = torch.cat([_rows(W), W.new_zeros(W.shape[0], SC, K1)], 1).to(dtype) if tiles else None
    scratch = Scratch(dtype, F.device)
    for b, n in _blocks(F, K1 + rows if tiles or not one else rows, items):
        f, at = F[b, :, n], slice(b.start - items.start, b.stop - items.start)
        delta, precision = _delta(x, loc, b, n, dtype), _precision(d, b, n, dtype, inverted)
        sizes, pixels = (f.shape[0], K1, f.shape[2]), f.shape[2]
        if weight is not None:
            stack, y = _carved(scratch, sizes, (f.shape[0], rows, pixels))
            f, _ = _fill(stack, f)
            torch.bmm(_of(weight, b), f, out=y)
            y[:, channels * R :] = delta
            sums[at, 0] += torch.bmm(y if one else _scale(y, precision), f.mT)
            diagonal[at] += torch.bmm(precision.expand(-1, -1, pixels), f.square_().mT)
        elif one:
            (stack,) = _carved(scratch, (f.shape[0], rows, pixels))
            f, y = _fill(stack, f)
            y.copy_(delta)
            sums[at, 0] += torch.bmm(stack, f.mT)
        else:
            stack, scaled = _carved(scratch, (f.shape[0], rows, pixels), (f.shape[0], rows, pixels))
            f, y = _fill(stack, f)
            for c in range(channels):
                y.copy_(delta[:, c::channels])
                torch.mul(stack, precision[:, c].unsqueeze(1), out=scaled)
                sums[at, c] += torch.bmm(scaled, f.mT)
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
    dtype, W64, m64 = product_dtype(x, F, W, d), W.double(), None if m is None else m.double()
    WG, wF, _, C_inv, logdet, wide = _capacitance(x, loc, F, W, d, inverted=False)
    logdet = logdet + linear_forms.logdet_D(d, channels * M)
    v = linear_forms.projection(wF, WG, W64, m64) @ C_inv
    q, g = v.square().sum(-1), -v
    u = linear_forms.coefficients(v, W64)
    u = (u if m64 is None else u + m64).flatten(1, 2)
    residual = x.new_empty(x.shape, dtype=dtype)
    zF = F.new_zeros(B, S * channels, K + 1, dtype=torch.float64)
    scratch = Scratch(torch.float64, F.device)
    for items, products in runs(wide, dtype) if S else ():
        for b, n in _blocks(F, 2 * (K + 1 + S * channels), items):  # float64 takes twice the memory
            f = F[b, :, n]
            exact = scratch.shaped(f.shape[0], K + 1, f.shape[2])
            _fill(exact, f)
            # Where d is small, r is what is left of numbers hundreds of times its size: made in float64, rounded once.
            r = torch.baddbmm(_delta(x, loc, b, n, torch.float64), u[b], exact, alpha=-1).to(products)
            residual[:, b, :, n] = r.unflatten(1, (S, channels)).transpose(0, 1)
            z = _scale(r.clone(), _precision(d, b, n, products))
            q[b] += (r * z).sum(2, dtype=torch.float64).unflatten(1, (S, channels)).sum(2)
            f = exact[:, :K] if products == torch.float64 else f.to(products)
            zF[b, :, :K] += torch.bmm(z, f.mT)
            zF[b, :, K] += z.sum(2, dtype=torch.float64)
    zF = zF.unflatten(1, (S, channels))
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
    # `rows` make what a block needs from F̃: yₙ or M_cf̃ₙ, and what z is corrected by; grad_F = `back` · [y/d or F̃; z].
    tile = channels * R if tiles and need_rows else 0
    if tile:
        A = _rows(linear_forms.weighted(linear_forms.root(C_inv), W64))
    else:
        A = linear_forms.quadratic(C_inv, W64)
        A = A.sum(1, keepdim=True) if one else A
    back = (A.mT if tile else A.sum(1)) * (2 * b_[:, None, None] / (d.double() if one else 1))
    back = torch.cat([back, minus_2au.mT], -1)[:, :K]
    rows = torch.cat([A, -u_step], 1) if tile else -u_step
    extra = max(K, tile) if tile or one else K + K1  # grad_F of a block, and M_cf̃ₙ or squares
    for items, products in runs(wide, residual.dtype):
        scratch = Scratch(products, F.device)
        A_, rows_, back_, a_, two_b = (t.to(products) for t in (A, rows, back, a, 2 * b_[:, None, None]))
        for b, n in _blocks(F, K1 + tile + SC + extra, items):
            f, precision = F[b, :, n], _precision(d, b, n, products)
            count, pixels = f.shape[0], f.shape[2]
            stack, made, spare = _carved(
                scratch,
                (count, K1 + (0 if tile else SC), pixels),
                (count, tile + SC, pixels),
                (count * extra * pixels,),
            )
            f, z = _fill(stack, f)
            torch.bmm(rows_[b], f, out=made)
            y, z_made = made[:, :tile], made[:, tile:]
            _scale(z_made.add_(residual[:, b, :, n].to(products).transpose(0, 1).flatten(1, 2)), precision)
            if tile:
                stack, z = made, z_made
            else:
                z.copy_(z_made)
            z_c = z_made.unflatten(1, (S, channels))
            if need_x:
                grad_x[:, b, :, n] = (2 * a_[b, :, None, None] * z_c).transpose(0, 1)
            if need_d:
                az2 = (z_c.square() * a_[b, :, None, None]).sum(1)
                if one:
                    grad_d[b] -= az2.sum((1, 2), dtype=torch.float64)[:, None, None]
            if not need_rows:
                continue
            grad_f = spare[: count * K * pixels].view(count, K, pixels)
            if tile and not one:
                if need_d:
                    squares = torch.mul(y, y, out=spare[: y.numel()].view(y.shape))
                    pi = precision - squares.unflatten(1, (R, channels)).sum(1) * precision.square()
                    grad_d[b, :, n] = 0.5 * two_b[b] * pi - az2
                _scale(y, precision)
            if tile or one:
                torch.bmm(back_[b], stack, out=grad_f)
            else:
                torch.bmm(back_[b, :, K1:], z_made, out=grad_f)
                Mf = spare[grad_f.numel() :].view(count, K1, pixels)
                for c in range(channels):
                    p = precision[:, c]
                    torch.bmm(A_[b, c], f, out=Mf)
                    if need_d:
                        pi = p - (Mf * f).sum(1) * p.square()
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
    scratch = Scratch(dtype, F.device)
    for b, n in _blocks(F, K1 + 2 * CR + SC, slice(0, B)):
        f = F[b, :, n]
        count, pixels = f.shape[0], f.shape[2]
        stack, p, made = _carved(scratch, (count, K1, pixels), (count, CR, pixels), (count, CR + SC, pixels))
        f, _ = _fill(stack, f)
        torch.bmm(_of(weight, b), f, out=p)
        delta, pi = _delta(x, loc, b, n, dtype), precision[b, :, n if precision.shape[2] > 1 else slice(None)].to(dtype)
        if mean is not None:
            delta = delta - torch.matmul(mean, f).repeat(1, S, 1)
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
        grad_rows[b] += torch.bmm(made, f.mT)
        if need_F:
            rows = _of(weight, b)
            if mean is not None:
                rows = torch.cat([rows, -mean.repeat(S, 1).expand(count, SC, K1)], 1)
            grad_F[b, :, n] = torch.bmm(rows[..., :K].mT, made if mean is not None else grad_p)
    grad_W = grad_rows[:, :CR].unflatten(1, (R, channels)).transpose(1, 2)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W
    grad_m = F.new_empty(0) if m is None else -grad_rows[:, CR:].unflatten(1, (S, channels)).sum((0, 1)).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype).contiguous(), grad_m, grad_pi.to(precision.dtype)
