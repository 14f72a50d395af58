r"""The closed forms for a factor that is a linear map of features, in torch's own operators, block by block.

P = F̃ᵀWᵀ for each channel c of C: pixel n has the row P_c[n] = W_c f̃ₙ, with F̃ [K+1, M] the features and a row of
ones (the bias), M pixels, N = C·M. So C, w, r and every gradient are had from F, and nothing of size N×R exists:

    G_c = F̃D_c⁻¹F̃ᵀ          C = I + Σ_c W_c G_c W_cᵀ        w = Σ_c W_c F̃D_c⁻¹δ_c
    u_c = W_cᵀv              r_c = δ_c − F̃ᵀu_c               z_c = r_c/d_c         M_c = W_cᵀC⁻¹W_c

    grad_F̃  = Σ_c [2b M_cF̃D_c⁻¹ − 2a u_c z_cᵀ]              grad_x = 2az
    grad_W_c = Σ_b [2b C⁻¹W_cG_c − 2a v(F̃z_c)ᵀ]             grad_d as for a full factor, πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

with a = ∂loss/∂q and b = ∂loss/∂log|Σ|. A mean that is linear in the same features, μ_c = F̃ᵀm_c, joins the passes:
u_c + m_c takes the place of u_c in r and in grad_F, and grad_m_c = −2aF̃z_c.

There are two ways through a block, and `linear_forms.from_tiles` says which is cheaper. From the features themselves, as
above, K² products a pixel for each G_c and each M_c; or from tiles of P, made of the block and gone after it:

    W_cG_c = Σ (W_cf̃ₙ)f̃ₙᵀ/d        M_c = A_cᵀA_c, A_c = L⁻¹W_c, yₙ = A_c f̃ₙ:  M_c f̃ₙ = A_cᵀyₙ,  f̃ₙᵀM_c f̃ₙ = |yₙ|²

The functions take canonical shapes; item b of F has the weight W[b], or W[0] where all share one:

    x    [S, B, C, M]                       F  [B, K, M], any strides      d  [B, C, M] or [B, 1, 1]
    loc  [S or 1, B, C, M], or none         W  [1 or B, C, R, K+1]         m  [C, K+1], or none

`linear` registers them; `linear_forms` has what follows the passes, `aten` what both kinds of factor share.
"""

import torch
from torch import Tensor

from . import linear_forms
from .aten import Scratch, empty_gradient, factorise, product_dtype, runs

# The residual of the forward pass is an output of it.
KEEPS_RESIDUAL = True

# Values of F in one block: 2 MiB in float32, which keeps what is made of a block small beside grad_F (kernels/LOG.md).
BLOCK_VALUES = 1 << 19


def _blocks(F: Tensor, rows: int, items: slice):
    """Index pairs (items, pixels) that cover F in blocks; `rows` is what is made of a pixel beside its features."""
    B, (K, M) = items.stop - items.start, F.shape[1:]
    step_b = max(1, min(B, BLOCK_VALUES // max(1, min(M, 512) * (K + rows))))
    step_n = max(1, BLOCK_VALUES // (step_b * (K + rows)))
    for b in range(items.start, items.stop, step_b):
        for n in range(0, M, step_n):
            yield slice(b, min(b + step_b, items.stop)), slice(n, min(n + step_n, M))


def _stacked(F: Tensor, b: slice, n: slice, rows: int, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """[F̃; y] [b, K+1+rows, n] of a block, its first part F̃ and its last, y, which is left to be filled."""
    f = F[b, :, n]
    K = f.shape[1]
    stack = scratch.shaped(f.shape[0], K + 1 + rows, f.shape[2])
    stack[:, :K] = f
    stack[:, K] = 1
    return stack, stack[:, : K + 1], stack[:, K + 1 :]


def _precision(d: Tensor, b: slice, n: slice, dtype: torch.dtype, inverted: bool = False) -> Tensor:
    """1/d of a block, [b, C, n] or [b, 1, 1]; `d` itself where it is already `inverted`."""
    block = (d[b, :, n] if d.shape[2] > 1 else d[b]).to(dtype)
    return block if inverted else block.reciprocal()


def _delta(x: Tensor, loc: Tensor | None, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """x − μ, without the part of μ that is linear in the features, [b, S, C, n]."""
    delta = x[:, b, :, n].to(dtype)
    return (delta if loc is None else delta - loc[:, b, :, n].to(dtype)).transpose(0, 1)


def _of(W: Tensor, b: slice) -> Tensor:
    """The weights of some items, [b, ...]: a view where all share one."""
    return W[b] if W.shape[0] > 1 else W.expand(b.stop - b.start, *W.shape[1:])


def _first_pass(x, loc, F: Tensor, W: Tensor, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool):
    """W_cG_c [b, C, R, K+1], F̃D_c⁻¹(x − loc)_c [b, S, C, K+1] and diag G_c [b, C or 1, K+1] of some items, in float64;
    products in `dtype`. `d` is the diagonal of D or, if `inverted`, of D⁻¹, 0 for a pixel that is not observed."""
    (S, _, channels, _), R, K1 = x.shape, W.shape[2], W.shape[3]
    one, tiles = d.shape[2] == 1, linear_forms.from_tiles(*W.shape[1:], d.shape[2] > 1)
    sizes = (items.stop - items.start, 1 if one or tiles else channels)
    rows = (channels * R if tiles else K1) + (S * channels if one or tiles else S)
    sums = F.new_zeros(*sizes, rows, K1, dtype=torch.float64)
    diagonal = F.new_zeros(sizes[0], 1 if one else channels, K1, dtype=torch.float64)
    stacks, made = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in _blocks(F, rows, items):
        at = slice(b.start - items.start, b.stop - items.start)
        delta, precision = _delta(x, loc, b, n, dtype), _precision(d, b, n, dtype, inverted)
        if tiles:
            _, f, _ = _stacked(F, b, n, 0, stacks)
            y = made.shaped(f.shape[0], rows, f.shape[2])
            torch.bmm(_of(W, b).to(dtype).flatten(1, 2), f, out=y[:, : channels * R])
            y[:, channels * R :] = delta.flatten(1, 2)
            if not one:
                y[:, : channels * R].unflatten(1, (channels, R)).mul_(precision.unsqueeze(2))
                y[:, channels * R :].unflatten(1, (S, channels)).mul_(precision.unsqueeze(1))
            sums[at, 0] += torch.bmm(y, f.mT)
            diagonal[at] += torch.matmul(precision.expand(-1, -1, f.shape[2]), f.square().mT)
        elif one:
            stack, f, y = _stacked(F, b, n, S * channels, stacks)
            y.copy_(delta.flatten(1, 2))
            sums[at, 0] += torch.bmm(stack, f.mT)
        else:
            stack, f, y = _stacked(F, b, n, S, stacks)
            for c in range(channels):
                y.copy_(delta[:, :, c])
                scaled = torch.mul(stack, precision[:, c].unsqueeze(1), out=made.shaped(*stack.shape))
                sums[at, c] += torch.bmm(scaled, f.mT)
    if one:
        scale = d[items].double() if inverted else d[items].double().reciprocal()
        sums *= scale.unsqueeze(-1)
    wF = sums[:, :, rows - (S * channels if one or tiles else S) :]
    wF = wF[:, 0].unflatten(1, (S, channels)) if one or tiles else wF.transpose(1, 2)
    if tiles:
        return sums[:, 0, : channels * R].unflatten(1, (channels, R)), wF, diagonal
    G = sums[:, :, :K1]
    return torch.matmul(_of(W, items).double(), G), wF, G.diagonal(dim1=-2, dim2=-1)


def _capacitance(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, d: Tensor, inverted: bool):
    """W_cG_c, F̃D⁻¹(x − loc), C and C⁻¹ [B, R, R], log|C| [B] and `wide` [B], decided as in `aten`."""
    B, dtype = F.shape[0], product_dtype(x, F, W, d) if F.device.type == "cpu" else torch.float64
    W64 = W.double()
    WG, wF, diagonal = _first_pass(x, loc, F, W64, d, slice(0, B), dtype, inverted)
    C = linear_forms.capacitance(WG, W64)
    C_inv, log_det, _ = factorise(C)
    if dtype == torch.float64:
        return WG, wF, C, C_inv, log_det, torch.ones(B, dtype=torch.bool, device=F.device)
    wide = linear_forms.too_rough(diagonal, W64, C_inv)
    for items, products in runs(wide, dtype):
        if products == torch.float64:
            WG[items], wF[items], _ = _first_pass(x, loc, F, W64, d, items, products, inverted)
            C[items] = linear_forms.capacitance(WG[items], _of(W64, items))
            C_inv[items], log_det[items], _ = factorise(C[items])
    return WG, wF, C, C_inv, log_det, wide


def linear_gram(
    x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, precision: Tensor
) -> tuple[Tensor, Tensor]:
    """C = I + Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    WG, wF, C, *_ = _capacitance(x, loc, F, W, precision, inverted=True)
    w = linear_forms.projection(wF, WG, W.double(), None if m is None else m.double())
    return C, w.transpose(0, 1).contiguous()


def linear_mahalanobis_and_logdet(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor):
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, W_cG_c [B, C, R, K+1], the
    residual and `wide` [B].

    All float64 but the residual r = δ − F̃ᵀ(u + m) [S, B, C, M], made in float64 and rounded once, at v before its last
    step.
    """
    S, (B, _, M), channels = x.shape[0], F.shape, W.shape[1]
    dtype, W64, m64 = product_dtype(x, F, W, d), W.double(), None if m is None else m.double()
    WG, wF, _, C_inv, logdet, wide = _capacitance(x, loc, F, W, d, inverted=False)
    logdet = logdet + (d.double().log().sum((1, 2)) if d.shape[2] > 1 else channels * M * d[:, 0, 0].double().log())
    v = linear_forms.projection(wF, WG, W64, m64) @ C_inv
    q, g = v.square().sum(-1), -v
    u = linear_forms.coefficients(v, W64)
    u = (u if m64 is None else u + m64).flatten(1, 2)
    residual = x.new_empty(x.shape, dtype=dtype)
    zF = F.new_zeros(B, S * channels, W.shape[3], dtype=torch.float64)
    exact = Scratch(torch.float64, F.device)
    for items, products in runs(wide, dtype) if S else ():
        for b, n in _blocks(F, 1 + S * channels, items):
            # Where d is small, r is what is left of numbers hundreds of times its size: made in float64, rounded once.
            _, f, _ = _stacked(F, b, n, 0, exact)
            r = _delta(x, loc, b, n, torch.float64) - torch.bmm(u[b], f).unflatten(1, (S, channels))
            r = r.to(products)
            residual[:, b, :, n] = r.transpose(0, 1)
            z = r * _precision(d, b, n, products).unsqueeze(1)
            q[b] += (r * z).sum((2, 3), dtype=torch.float64)
            z = z.flatten(1, 2)
            f = f if products == torch.float64 else F[b, :, n].to(products)
            zF[b, :, : F.shape[1]] += torch.bmm(z, f[:, : F.shape[1]].mT)
            zF[b, :, -1] += z.sum(-1, dtype=torch.float64)
    g = g + linear_forms.projection(zF.unflatten(1, (S, channels)), WG, W64, None)
    step = g @ C_inv
    q = q - (g * step).sum(-1)
    return q.T.contiguous(), logdet, C_inv, (v + step).transpose(0, 1), step.transpose(0, 1), WG, residual, wide


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
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M], grad_F, grad_W, grad_m (empty without m) and grad_d; `needs` is for x, F and d: what is not
    needed is empty. grad_loc is −grad_x."""
    S, B, channels, M = x.shape
    R, K1, K = W.shape[2], W.shape[3], F.shape[1]
    need_x, need_F, need_d = needs
    one, tiles = d.shape[2] == 1, linear_forms.from_tiles(*W.shape[1:], d.shape[2] > 1)
    dtype, W64 = residual.dtype, W.double()
    a, b_ = grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = linear_forms.coefficients(v, W64)
    u_step = linear_forms.coefficients(step, W64).flatten(1, 2)
    minus_2au = (-2 * a[:, :, None, None] * (u if m is None else u + m.double())).flatten(1, 2)[..., :-1]
    two_b = 2 * b_[:, None, None]
    grad_x = torch.empty_like(residual) if need_x else residual.new_empty(0)
    grad_F = empty_gradient(F) if need_F else F.new_empty(0)
    grad_d = d.new_zeros(d.shape, dtype=torch.float64 if one else d.dtype) if need_d else d.new_empty(0)
    zF = F.new_zeros(B, S * channels, K1, dtype=torch.float64)
    if need_d and one:
        # Σₙ πₙ = (N − R + tr C⁻¹)/d, because PᵀD⁻¹P = C − I.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d += (b_ * (channels * M - R + trace))[:, None, None] / d.double()
    # What makes the rows of a block beside z, and grad_F = `combined` · [rows; z]: one product.
    if tiles:
        A = linear_forms.weighted(linear_forms.root(C_inv), W64).flatten(1, 2)
        back = two_b * A[..., :-1].mT
    else:
        Mc = linear_forms.quadratic(C_inv, W64)
        back = two_b * Mc.sum(1)[:, :-1]
    combined = torch.cat([back / d.double() if one else back, minus_2au.mT], -1)
    for items, products in runs(wide, dtype):
        stacks, made, product = (Scratch(products, F.device) for _ in range(3))
        for b, n in _blocks(F, 1 + S * channels + (channels * R if tiles else 0), items):
            stack, f, z = _stacked(F, b, n, 0 if tiles else S * channels, stacks)
            if tiles:
                stack = made.shaped(f.shape[0], (channels * R) + S * channels, f.shape[2])
                y, z = stack[:, : channels * R], stack[:, channels * R :]
            precision = _precision(d, b, n, products)
            r = residual[:, b, :, n].to(products).transpose(0, 1) - torch.bmm(u_step[b].to(products), f).unflatten(
                1, (S, channels)
            )
            z.unflatten(1, (S, channels)).copy_(r * precision.unsqueeze(1))
            zF[b] += torch.bmm(z, f.mT)
            az = (z * a[b].to(products).repeat_interleave(channels, 1).unsqueeze(-1)).unflatten(1, (S, channels))
            if need_x:
                grad_x[:, b, :, n] = (2 * az).transpose(0, 1)
            if need_d:
                az2 = (az * z.unflatten(1, (S, channels))).sum(1)
                if one:
                    grad_d[b] -= az2.sum((1, 2), dtype=torch.float64)[:, None, None]
            if not need_F and (one or not need_d):
                continue
            b_block = b_[b, None, None].to(products)
            if tiles:
                torch.bmm(A[b].to(products), f, out=y)
                y_c = y.unflatten(1, (channels, R))
                if not one and need_d:
                    squares = torch.mul(y_c, y_c, out=product.shaped(*y_c.shape)).sum(2)
                    grad_d[b, :, n] = (precision - squares * precision.square()) * b_block - az2
                if not one:
                    y_c *= precision.unsqueeze(2)
            grad_f = product.shaped(f.shape[0], K if need_F else 0, f.shape[2])
            if tiles or one:
                if need_F:
                    grad_F[b, :, n] = torch.bmm(combined[b].to(products), stack, out=grad_f)
                continue
            if need_F:
                torch.bmm(minus_2au[b].to(products).mT, z, out=grad_f)
            for c in range(channels):
                p = precision[:, c]
                MF = torch.bmm(Mc[b, c].to(products), f, out=made.shaped(*f.shape))
                if need_d:
                    pi = p - (MF * f).sum(1) * p.square()
                    grad_d[b, c, n] = pi * b_block[:, 0] - az2[:, c]
                if need_F:
                    grad_f.addcmul_(MF[:, :-1], 2 * b_block * p.unsqueeze(1))
            if need_F:
                grad_F[b, :, n] = grad_f
    zF = zF.unflatten(1, (S, channels))
    grad_W = linear_forms.grad_weight(a, b_, C_inv, v, WG, zF, shared=W.shape[0] == 1)
    grad_m = F.new_empty(0) if m is None else linear_forms.grad_mean(a, zF).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d.to(d.dtype)
