r"""The closed forms for a factor that is a linear map of features, in torch's own operators, block by block.

P = F̃ᵀWᵀ for each channel c of C: pixel n has the row P_c[n] = W_c f̃ₙ, with F̃ [K+1, M] the features and a row of
ones (the bias), M pixels, N = C·M. So C, w, r and every gradient are had from F, and nothing of size N×R exists:

    G_c = F̃D_c⁻¹F̃ᵀ          C = I + Σ_c W_c G_c W_cᵀ        w = Σ_c W_c F̃D_c⁻¹δ_c
    u_c = W_cᵀv              r_c = δ_c − F̃ᵀu_c               z_c = r_c/d_c         M_c = W_cᵀC⁻¹W_c

    grad_F̃  = Σ_c [2b M_cF̃D_c⁻¹ − 2a u_c z_cᵀ]              grad_x = 2az
    grad_W_c = Σ_b [2b C⁻¹W_cG_c − 2a v(F̃z_c)ᵀ]             grad_d as for a full factor, πₙ = 1/d − f̃ₙᵀM_c f̃ₙ/d²

with a = ∂loss/∂q and b = ∂loss/∂log|Σ|. A mean that is linear in the same features, μ_c = F̃ᵀm_c, joins the passes:
u_c + m_c takes the place of u_c in r and in grad_F, and grad_m_c = −2aF̃z_c.

    x    [S, B, C, M]                       F  [B, K, M], any strides      d  [B, C, M] or [B, 1, 1]
    loc  [S or 1, B, C, M], or none         W  [C, R, K+1]                 m  [C, K+1], or none

`linear` registers these functions; `aten` has what both kinds of factor share.
"""

import torch
from torch import Tensor

from .aten import LOG_DET_TOLERANCE, Scratch, empty_gradient, factorise, product_dtype, runs

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


def _precision(d: Tensor, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """1/d of a block, [b, C, n] or [b, 1, 1]."""
    return (d[b, :, n] if d.shape[2] > 1 else d[b]).to(dtype).reciprocal()


def _delta(x: Tensor, loc: Tensor | None, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """x − μ, without the part of μ that is linear in the features, [b, S, C, n]."""
    delta = x[:, b, :, n].to(dtype)
    return (delta if loc is None else delta - loc[:, b, :, n].to(dtype)).transpose(0, 1)


def _gram(x: Tensor, loc: Tensor | None, F: Tensor, d: Tensor, items: slice, dtype: torch.dtype):
    """G [b, C or 1, K+1, K+1] and F̃D⁻¹(x − loc) [b, S, C, K+1] of some items in float64, products in `dtype`.

    One product gives both: of the rows F̃ and δ, for all channels where d is one value, else for each, times D^(−1/2).
    """
    S, K, channels = x.shape[0], F.shape[1], x.shape[2]
    one = d.shape[2] == 1
    groups, rows = (1, S * channels) if one else (channels, S)
    both = F.new_zeros(items.stop - items.start, groups, K + 1 + rows, K + 1 + rows, dtype=torch.float64)
    stacks, scaled = Scratch(dtype, F.device), Scratch(dtype, F.device)
    for b, n in _blocks(F, 1 + rows, items):
        stack, _, y = _stacked(F, b, n, rows, stacks)
        delta, precision = _delta(x, loc, b, n, dtype), _precision(d, b, n, dtype)
        for c in range(groups):
            y.copy_(delta.flatten(1, 2) if one else delta[:, :, c])
            q = stack
            if not one:
                q = torch.mul(stack, precision[:, c].sqrt().unsqueeze(1), out=scaled.shaped(*stack.shape))
            both[b.start - items.start : b.stop - items.start, c] += torch.bmm(q, q.mT)
    if one:
        both /= d[items].double().unsqueeze(-1)
    G, wF = both[..., : K + 1, : K + 1], both[..., K + 1 :, : K + 1]
    return G, wF.unflatten(2, (S, channels)).squeeze(1) if one else wF.transpose(1, 2)


def _capacitance(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, d: Tensor):
    """G, F̃D⁻¹(x − loc), C⁻¹ [B, R, R], log|C| [B] and `wide` [B], decided as in `aten`, but for rounding in G."""
    B, dtype = F.shape[0], product_dtype(x, F, d) if F.device.type == "cpu" else torch.float64
    W = W.double()

    def assemble(G: Tensor) -> Tensor:
        C = torch.einsum("crk,bckl,csl->brs", W, G.expand(-1, W.shape[0], -1, -1), W)
        return C + torch.eye(W.shape[1], dtype=C.dtype, device=C.device)

    G, wF = (t.contiguous() for t in _gram(x, loc, F, d, slice(0, B), dtype))
    C_inv, log_det, _ = factorise(assemble(G))
    if dtype == torch.float64:
        return G, wF, C_inv, log_det, torch.ones(B, dtype=torch.bool, device=F.device)
    # |ΔGₖₗ| ≤ ε√(GₖₖGₗₗ) moves C by at most ε aᵣaₛ with aᵣ² = Σ_c (Σₖ |W_crk|√Gₖₖ)²: aᵣ² takes the place of C_rr.
    a = torch.einsum("crk,bck->bcr", W.abs(), G.diagonal(dim1=-2, dim2=-1).sqrt().expand(-1, W.shape[0], -1))
    spread = (a.square().sum(1) * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square()
    wide = ~(torch.finfo(torch.float32).eps * spread <= LOG_DET_TOLERANCE)
    for items, products in runs(wide, dtype):
        if products == torch.float64:
            G[items], wF[items] = _gram(x, loc, F, d, items, products)
            C_inv[items], log_det[items], _ = factorise(assemble(G[items]))
    return G, wF, C_inv, log_det, wide


def linear_mahalanobis_and_logdet(x: Tensor, loc: Tensor | None, F: Tensor, W: Tensor, m: Tensor | None, d: Tensor):
    """q [S, B], log|Σ| [B], and for the backward pass C⁻¹, v [S, B, R], its last step, G, the residual and `wide`.

    All float64 but the residual r = δ − F̃ᵀ(u + m), made in float64 and rounded once, at v before its last step.
    """
    S, (B, _, M), channels = x.shape[0], F.shape, W.shape[0]
    dtype, W64 = product_dtype(x, F, d), W.double()
    G, wF, C_inv, logdet, wide = _capacitance(x, loc, F, W, d)
    logdet = logdet + (d.double().log().sum((1, 2)) if d.shape[2] > 1 else channels * M * d[:, 0, 0].double().log())
    if m is not None:
        wF = wF - torch.einsum("ck,bckl->bcl", m.double(), G.expand(-1, channels, -1, -1)).unsqueeze(1)
    v = torch.einsum("bsck,crk->bsr", wF, W64) @ C_inv
    q, g = v.square().sum(-1), -v
    u = (torch.einsum("bsr,crk->bsck", v, W64) + (0 if m is None else m.double())).flatten(1, 2)
    residual = x.new_empty(x.shape, dtype=dtype)
    scratch = Scratch(torch.float64, F.device)
    zF = F.new_zeros(B, S * channels, W.shape[2], dtype=torch.float64)
    for b, n in _blocks(F, 1 + S * channels, slice(0, B)) if S else ():
        _, f, _ = _stacked(F, b, n, 0, scratch)
        r = _delta(x, loc, b, n, torch.float64) - torch.bmm(u[b], f).unflatten(1, (S, channels))
        residual[:, b, :, n] = r.transpose(0, 1)
        z = r * _precision(d, b, n, torch.float64).unsqueeze(1)
        q[b] += (r * z).sum((2, 3))
        zF[b] += torch.bmm(z.flatten(1, 2), f.mT)
    g = g + torch.einsum("bsck,crk->bsr", zF.unflatten(1, (S, channels)), W64)
    step = g @ C_inv
    q = q - (g * step).sum(-1)
    return q.T.contiguous(), logdet, C_inv, (v + step).transpose(0, 1), step.transpose(0, 1), G, residual, wide


def linear_mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    residual: Tensor,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    G: Tensor,
    wide: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, C, M] (empty if not needed), grad_F, grad_W, grad_m (empty without m) and grad_d."""
    (S, B, channels, M), R = residual.shape, W.shape[1]
    dtype, W64 = residual.dtype, W.double()
    a, b_ = grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    scalar_d = d.shape[2] == 1
    u = torch.einsum("bsr,crk->bsck", v, W64)
    u_step = torch.einsum("bsr,crk->bsck", step, W64).flatten(1, 2)
    minus_2au = (-2 * a[:, :, None, None] * (u if m is None else u + m.double())).flatten(1, 2)[..., :-1]
    C_inv_W = torch.einsum("brs,csk->bcrk", C_inv, W64)
    Mc = torch.einsum("crk,bcrl->bckl", W64, C_inv_W)
    grad_x = torch.empty_like(residual) if need_x else residual.new_empty(0)
    grad_F = empty_gradient(F)
    zF = F.new_zeros(B, S * channels, W.shape[2], dtype=torch.float64)
    grad_d = d.new_zeros(d.shape, dtype=torch.float64 if scalar_d else d.dtype)
    if scalar_d:
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d += (b_ * (channels * M - R + trace))[:, None, None] / d.double()
        # grad_F = [2b/d Σ_c M_c, −2a(u + m)] [F̃; z]: one product.
        combined = torch.cat([(2 * b_[:, None, None] / d.double() * Mc.sum(1))[:, :-1], minus_2au.mT], -1)
    for items, products in runs(wide, dtype):
        stacks, made, product = (Scratch(products, F.device) for _ in range(3))
        for b, n in _blocks(F, 1 + S * channels, items):
            stack, f, z = _stacked(F, b, n, S * channels, stacks)
            precision = _precision(d, b, n, products)
            r = residual[:, b, :, n].to(products).transpose(0, 1) - torch.bmm(u_step[b].to(products), f).unflatten(
                1, (S, channels)
            )
            z.unflatten(1, (S, channels)).copy_(r * precision.unsqueeze(1))
            zF[b] += torch.bmm(z, f.mT)
            az = (z * a[b].to(products).repeat_interleave(channels, 1).unsqueeze(-1)).unflatten(1, (S, channels))
            if need_x:
                grad_x[:, b, :, n] = (2 * az).transpose(0, 1)
            az2 = (az * z.unflatten(1, (S, channels))).sum(1)
            grad_f = made.shaped(f.shape[0], f.shape[1] - 1, f.shape[2])
            if scalar_d:
                grad_d[b] -= az2.sum((1, 2), dtype=torch.float64)[:, None, None]
                torch.bmm(combined[b].to(products), stack, out=grad_f)
            else:
                torch.bmm(minus_2au[b].to(products).mT, z, out=grad_f)
                for c in range(channels):
                    p = precision[:, c]
                    MF = torch.bmm(Mc[b, c].to(products), f, out=product.shaped(*f.shape))
                    pi = p - (MF * f).sum(1) * p.square()
                    grad_d[b, c, n] = pi * b_[b, None].to(products) - az2[:, c]
                    grad_f.addcmul_(MF[:, :-1], (2 * b_[b, None].to(products) * p).unsqueeze(1))
            grad_F[b, :, n] = grad_f
    zF = zF.unflatten(1, (S, channels))
    grad_W = torch.einsum("b,bcrk,bckl->crl", 2 * b_, C_inv_W, G.expand(-1, channels, -1, -1))
    grad_W = grad_W - torch.einsum("bs,bsr,bsck->crk", 2 * a, v, zF)
    grad_m = F.new_empty(0) if m is None else torch.einsum("bs,bsck->ck", -2 * a, zF).to(m.dtype)
    return grad_x, grad_F, grad_W.to(W.dtype), grad_m, grad_d.to(d.dtype)
