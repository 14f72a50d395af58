r"""The closed forms in torch's own operators: the CPU implementation, and one that runs on any device.

Everything is computed block by block over N, so that nothing of the size of P is allocated but its
gradient. With C = I + PᵀD⁻¹P, δ = x − μ, w = PᵀD⁻¹δ (README.md in this folder derives all of it):

    forward    read P: C, w, log|D|       (products in float32, sums over blocks in float64)
               R×R, in float64: log|C|, C⁻¹, v = C⁻¹w
               read P: r = δ − Pv,  q(v) = rᵀD⁻¹r + vᵀv,  g = PᵀD⁻¹r − v
               q = q(v) − gᵀC⁻¹g,  v ← v + C⁻¹g
    backward   read P, write grad_P, given a = ∂loss/∂q, b = ∂loss/∂log|Σ|; r ← r − PC⁻¹g, z = D⁻¹r:
               grad_x = 2az = −grad_loc        grad_P = 2b D⁻¹PC⁻¹ − 2a z vᵀ
               grad_d = bπ − az²               π = diag Σ⁻¹ = 1/d − diag(PC⁻¹Pᵀ)/d²

The functions here take canonical shapes and neither check nor record anything: `ops` registers them.

    x    [S, B, N]                 P  [B, N, R], any strides
    loc  [S, B, N] or [1, B, N]    d  [B, N] or [B, 1] (one value per item, never expanded)
"""

import math

import torch
from torch import Tensor

from .memory import Scratch, empty_gradient

# Values of P in one block (4 MiB in float32): smaller ones pay for the calls, larger ones leave the caches
# (kernels/LOG.md). Vectors over the pixels are made for several blocks at once: a call costs as much as many thousand
# values; but memory of more than a few hundred thousand is given back and touched anew each time.
BLOCK_VALUES = 1 << 20
VECTOR_VALUES = 1 << 18

# A factor of up to so many values is no work to speak of: what costs is the number of calls, and float64 nothing more.
AT_ONCE_VALUES = 1 << 14

# The residual of the forward pass is an output of it.
KEEPS_RESIDUAL = True

# An item's C is made again with float64 products where rounding in float32 could move log|C| by more than this.
LOG_DET_TOLERANCE = 0.01  # nats


def _blocks(items: slice, N: int, row: int, values: int):
    """Index pairs (items, pixels) that cover `items` in blocks of about that many values, `row` of them a pixel."""
    B = items.stop - items.start
    step_b = max(1, min(B, values // max(1, min(N, 1024) * row)))
    step_n = max(1, values // (step_b * row))
    for b in range(items.start, items.stop, step_b):
        for n in range(0, N, step_n):
            yield slice(b, min(b + step_b, items.stop)), slice(n, min(n + step_n, N))


def _vector_blocks(P: Tensor, S: int, items: slice, dtype: torch.dtype):
    """Blocks for vectors of S samples, with the part of P that goes with each. For float64, which takes twice the
    memory, of half as many values."""
    for b, n in _blocks(items, P.shape[1], max(1, S), VECTOR_VALUES * 4 // dtype.itemsize):
        yield b, n, P[b, n]


def _factor_blocks(P: Tensor, S: int, dtype: torch.dtype):
    """Blocks of a part of P for products in `dtype`: a row of it, and δ, r, z of every sample."""
    B, N, R = P.shape
    for b, n in _blocks(slice(0, B), N, R + 3 * S, BLOCK_VALUES * 4 // dtype.itemsize):
        yield b, n, P[b, n]


def _delta(x: Tensor, loc: Tensor, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """δ = x − μ of a block, [b, S, n]."""
    return (x[:, b, n].to(dtype) - loc[:, b, n].to(dtype)).transpose(0, 1)


def _diagonal(d: Tensor, b: slice, n: slice, dtype: torch.dtype) -> Tensor:
    """The block of a diagonal, [b, n or 1]."""
    return _columns(d, b, n).to(dtype)


def _columns(t: Tensor, b: slice, n: slice) -> Tensor:
    """The block of a [B, N] or [B, 1] tensor, [b, n or 1]."""
    return t[b, n if t.shape[1] > 1 else slice(None)]


# A product with P is written in the order in which the library streams P and keeps the thin operand, several times
# faster than the other one (kernels/LOG.md), and so that the result lies as its users read it.


def _rows(a: Tensor, p: Tensor) -> Tensor:
    """(Pa)ᵀ = aᵀPᵀ [b, S, n] of `a` [b, S, R]."""
    return torch.bmm(a, p.mT)


def _projection(z: Tensor, p: Tensor) -> Tensor:
    """zᵀP [b, S, R] of `z` [b, S, n]."""
    return torch.bmm(z, p)


def _times(p: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """PA [b, n, R] of `A` [b, R, R], in `out`, which has the layout of P."""
    if p.stride(-1) <= p.stride(-2):
        return torch.bmm(p, A, out=out)
    torch.bmm(A.mT, p.mT, out=out.mT)
    return out


def _scaled(p: Tensor, scale: Tensor | None, scratch: Scratch) -> Tensor:
    """A block of P in the dtype of `scratch`, its pixels times `scale` [b, n], which may be none."""
    if scale is not None:
        return torch.mul(p, scale.unsqueeze(-1), out=scratch.like(p))
    return p if p.dtype == scratch.dtype else scratch.like(p).copy_(p)


def _gram(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, items: slice, dtype: torch.dtype, inverted: bool):
    """C = I + PᵀD⁻¹P and w = PᵀD⁻¹δ of some items, products in `dtype`, float64 out.

    `d` is the diagonal of D or, if `inverted`, of D⁻¹, where 0 stands for a pixel that is not observed. One value of it
    for all pixels of an item scales the sums; many scale P, pixel by pixel. Products are made in tiles of 8 columns;
    one or two columns beyond a multiple of 8 cost as much as 8, and less beside δ. Of the rest two rectangles cover
    the lower triangle, with three quarters of the operations of a square.
    """
    S, R = x.shape[0], P.shape[2]
    C = P.new_zeros(P.shape[0], R, R, dtype=torch.float64)
    w = P.new_zeros(P.shape[0], S, R, dtype=torch.float64)
    scratch = Scratch(dtype, P.device)
    whole = R - R % 8 if R % 8 <= 2 else R
    half = (whole + 15) // 16 * 8
    one_d = d.shape[1] == 1
    for b, n, part in _vector_blocks(P, S, items, dtype):
        delta, scale = _delta(x, loc, b, n, dtype), None
        if not one_d:
            scale = _diagonal(d, b, n, dtype)
            scale = scale.sqrt() if inverted else scale.rsqrt()
            delta = delta.mul_(scale.unsqueeze(1))
        C_part, w_part = C[b], w[b]
        for i, j, p in _factor_blocks(part, S, dtype):
            Q = _scaled(p, None if scale is None else scale[i, j], scratch)
            C_part[i, :half, :half].add_(torch.bmm(Q[..., :half].mT, Q[..., :half]))
            C_part[i, half:whole, :whole].add_(torch.bmm(Q[..., half:whole].mT, Q[..., :whole]))
            rows = _projection(torch.cat([Q[..., whole:].mT, delta[i, :, j]], 1), Q)
            C_part[i, whole:].add_(rows[:, : R - whole])
            w_part[i].add_(rows[:, R - whole :])
    C[:, :half, half:] = C[:, half:, :half].mT
    C[:, half:whole, whole:] = C[:, whole:, half:whole].mT
    if one_d:
        weight = d.double() if inverted else d.double().reciprocal()
        C, w = C.mul_(weight.unsqueeze(-1)), w.mul_(weight.unsqueeze(-1))
    C.diagonal(dim1=-2, dim2=-1).add_(1)
    return C[items], w[items]


def factorise(C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C⁻¹, log|C| and how far rounding may have moved log|C| (inf: not positive definite) of float64 `C` [B, R, R].

    With |ΔCᵢⱼ| ≤ ε √(Cᵢᵢ Cⱼⱼ), |tr C⁻¹ΔC| ≤ ε (Σⱼ √(Cⱼⱼ C⁻¹ⱼⱼ))²: the root is of the variance inflation factor of
    column j, 1 where it is orthogonal to the others and large where it is nearly a combination of them.
    """
    L, info = torch.linalg.cholesky_ex(C)
    C_inv = torch.cholesky_inverse(L).contiguous()
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    inflation = (C.diagonal(dim1=-2, dim2=-1) * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square()
    failed = (info != 0) | ~torch.isfinite(log_det)
    moved = (torch.finfo(torch.float32).eps * inflation).masked_fill_(failed, math.inf)
    return C_inv.masked_fill_(failed[:, None, None], math.nan), log_det.masked_fill_(failed, math.nan), moved


def runs(wide: Tensor, dtype: torch.dtype):
    """Runs of neighbouring items with the dtype of their products: float64 where `wide`, else `dtype`."""
    flags = wide.tolist() if wide.device.type == "cpu" else [True] * len(wide)
    start = 0
    for i in range(1, len(flags) + 1):
        if i == len(flags) or flags[i] != flags[start]:
            yield slice(start, i), torch.float64 if flags[start] else dtype
            start = i


def _capacitance(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, inverted: bool):
    """The R×R part: C and C⁻¹ [B, R, R], log|C| [B], w [B, S, R] (float64) and `wide` [B].

    `wide` marks the items whose C and w were made with float64 products: a decision taken on the CPU only; elsewhere
    it would wait for the device, so there every item is.
    """
    B, dtype = P.shape[0], product_dtype(x, loc, P, d)
    if P.device.type != "cpu":
        dtype = torch.float64
    C, w = _gram(x, loc, P, d, slice(0, B), dtype, inverted)
    C_inv, log_det, moved = factorise(C)
    if dtype == torch.float64:
        return C, C_inv, log_det, w, torch.ones(B, dtype=torch.bool, device=P.device)
    wide = moved > LOG_DET_TOLERANCE
    for items, products in runs(wide, dtype):
        if products == torch.float64:
            C[items], w[items] = _gram(x, loc, P, d, items, products, inverted)
            C_inv[items], log_det[items], _ = factorise(C[items])
    return C, C_inv, log_det, w, wide


def _logdet_D(d: Tensor, N: int) -> Tensor:
    """log|D| [B]. In float64: the same error at each of N pixels would add up to N errors."""
    if d.shape[1] == 1:
        return N * d[:, 0].double().log()
    parts = [part.double().log().sum(-1) for part in d.split(max(1, BLOCK_VALUES // (8 * max(1, d.shape[0]))), 1)]
    return torch.stack(parts).sum(0) if parts else d.new_zeros(d.shape[0], dtype=torch.float64)


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is, float32 otherwise: half precision is an input format, not one to compute in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def gram(x: Tensor, loc: Tensor, P: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """C = I + Pᵀ diag(precision) P [B, R, R] and w = Pᵀ diag(precision) δ [S, B, R], float64."""
    C, _, _, w, _ = _capacitance(x, loc, P, precision, inverted=True)
    return C, w.transpose(0, 1).contiguous()


def mahalanobis_and_logdet(
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor | None = None,
    logdet: Tensor | None = None,
    wide: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q = δᵀΣ⁻¹δ [S, B], log|Σ| [B], C⁻¹ [B, R, R], v and its last step C⁻¹g [S, B, R] (float64), r and `wide` [B].

    r = δ − Pv [S, B, N] is the residual before the last step of v, kept so that the backward pass need not make it in
    float64 again. C⁻¹, log|Σ| and `wide` of an earlier call for the same P and d may be given: C is not made again.
    """
    S, (B, N, R) = x.shape[0], P.shape
    if P.numel() <= AT_ONCE_VALUES and P.device.type == "cpu":
        return _at_once(x, loc, P, d, C_inv, logdet)
    dtype = product_dtype(x, loc, P, d)
    if C_inv is None or logdet is None or wide is None:
        _, C_inv, logdet, w, wide = _capacitance(x, loc, P, d, inverted=False)
        logdet = logdet + _logdet_D(d, N)
    else:
        C_inv, logdet, wide = C_inv.clone(), logdet.clone(), wide.clone()
        w = P.new_zeros(B, S, R, dtype=torch.float64)
        for items, products in runs(wide, dtype):
            for b, n in _blocks(items, N, R + 3 * S, BLOCK_VALUES):
                z = _delta(x, loc, b, n, products) / _diagonal(d, b, n, products).unsqueeze(1)
                w[b] += _projection(z, P[b, n].to(products))
    v = w @ C_inv
    q = v.square().sum(-1)
    g = -v
    residual = x.new_empty(x.shape, dtype=dtype)
    scratch = Scratch(torch.float64, P.device)
    for items, products in runs(wide, dtype) if S else ():
        for b, n, part in _vector_blocks(P, S, items, products):
            delta = _delta(x, loc, b, n, torch.float64)
            d_inv = _diagonal(d, b, n, products).reciprocal()
            r, g_part = residual.transpose(0, 1)[b, :, n], g[b]
            for i, j, p in _factor_blocks(part, S, products):
                # Where d is small, r is what is left of numbers hundreds of times its size: in float64, rounded once.
                exact = torch.baddbmm(delta[i, :, j], v[b][i], scratch.like(p).copy_(p).mT, alpha=-1)
                rounded = r[i, :, j].copy_(exact)
                z = (rounded if products == dtype else exact) * _columns(d_inv, i, j).unsqueeze(1)
                g_part[i].add_(_projection(z, p.to(products)))
            q[b] += (r.square() * d_inv.unsqueeze(1)).sum(-1, dtype=torch.float64)
    return *_last_step(q, g, v, C_inv, logdet), residual, wide


def _last_step(q: Tensor, g: Tensor, v: Tensor, C_inv: Tensor, logdet: Tensor):
    """From q(v), g, v [B, S, ...] to the first five results, q and v after one more step."""
    step = g @ C_inv
    q = q - (g * step).sum(-1)
    v, step = ((t.transpose(0, 1).contiguous()) for t in (v + step, step))
    return q.T.contiguous(), logdet, C_inv, v, step


def _at_once(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, C_inv: Tensor | None, logdet: Tensor | None):
    """`mahalanobis_and_logdet` in float64, without blocks and with as few calls as can be."""
    dtype, (B, N, _) = product_dtype(x, loc, P, d), P.shape
    P, d = P.double(), d.double().unsqueeze(1)
    delta = (x.double() - loc).transpose(0, 1)
    Q = P / d.mT
    if C_inv is None or logdet is None:
        C = Q.mT @ P
        C.diagonal(dim1=-2, dim2=-1).add_(1)
        C_inv, logdet, _ = factorise(C)
        logdet = logdet + d.log().sum((1, 2)) * (N // d.shape[2])
    else:
        C_inv, logdet = C_inv.clone(), logdet.clone()
    v = delta @ Q @ C_inv
    r = torch.baddbmm(delta, v, P.mT, alpha=-1)
    z = r / d
    q = (r * z).sum(-1) + v.square().sum(-1)
    residual = r.transpose(0, 1).to(dtype).contiguous()
    wide = torch.ones(B, dtype=torch.bool)
    return *_last_step(q, z @ P - v, v, C_inv, logdet), residual, wide


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    C_inv: Tensor,
    v: Tensor,
    step: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_loc, grad_P, grad_d, each in its input's shape and dtype; empty where `needs` says no."""
    S, (N, R) = x.shape[0], P.shape[1:]
    need_x, need_loc, need_P, need_d = needs
    dtype = product_dtype(x, loc, P, d)
    scalar_d = d.shape[1] == 1
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_loc = torch.empty_like(loc, memory_format=torch.contiguous_format) if need_loc else x.new_empty(0)
    grad_P = empty_gradient(P) if need_P else x.new_empty(0)
    grad_d = d.new_zeros(d.shape, dtype=torch.float64 if scalar_d else d.dtype) if need_d else d.new_empty(0)
    a, b_ = grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    minus_2av = -2 * a.unsqueeze(-1) * v
    if need_d and scalar_d:
        # Σₙ πₙ = (N − R + tr C⁻¹)/d, because PᵀD⁻¹P = C − I.
        trace = C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)
        grad_d += (b_ * (N - R + trace)).unsqueeze(1) / d.double()
    for items, products in runs(wide, dtype):
        T_scratch, Q_scratch = Scratch(products, P.device), Scratch(products, P.device)
        W, minus_step, coefficients = 2 * b_[:, None, None] * C_inv, -step, minus_2av.to(products)
        if scalar_d:  # D⁻¹ is in the R×R part, and Q is P
            W, minus_step = (t / d.double().unsqueeze(-1) for t in (W, minus_step))
        W, minus_step = W.to(products), minus_step.to(products)
        for b, n, part in _vector_blocks(P, S, items, products):
            d_inv = _diagonal(d, b, n, products).reciprocal()
            r = residual[:, b, n].to(products).transpose(0, 1)
            z = torch.empty_like(r)
            row_sums = d_inv.new_empty(part.shape[:2]) if need_d and not scalar_d else None
            for i, j, p in _factor_blocks(part, S, products):
                # With Q = D⁻¹P: z = D⁻¹r − QC⁻¹g and T = 2bQC⁻¹.
                Q = _scaled(p, None if scalar_d else d_inv[i, j], Q_scratch)
                zj = torch.addcmul(
                    _rows(minus_step[b][i], Q), r[i, :, j], _columns(d_inv, i, j).unsqueeze(1), out=z[i, :, j]
                )
                if not need_P and row_sums is None:
                    continue
                T = _times(Q, W[b][i], T_scratch.like(p))
                if row_sums is not None:
                    torch.sum(Q.mul_(T), -1, out=row_sums[i, j])
                if need_P and S == 1 and products == P.dtype:  # straight into the gradient: a step less
                    torch.addcmul(T, zj.mT, coefficients[b][i], out=grad_P[b, n][i, j])
                elif need_P:
                    grad_P[b, n][i, j] = T.baddbmm_(zj.mT, coefficients[b][i]) if S else T
            az = z * a[b].to(products).unsqueeze(-1)
            if need_d:
                az2 = z.mul_(az).sum(1)
                if row_sums is None:
                    grad_d[b] -= az2.sum(-1, keepdim=True, dtype=torch.float64)
                else:
                    pi = torch.add(b_[b].to(products).unsqueeze(-1) * d_inv, row_sums, alpha=-0.5)
                    grad_d[b, n] = pi - az2
            if need_x:
                grad_x[:, b, n] = 2 * az.transpose(0, 1)
            if need_loc:
                az = az if loc.shape[0] == S else az.sum(1, keepdim=True)
                grad_loc[:, b, n] = az.mul_(-2).transpose(0, 1)
    return grad_x, grad_loc, grad_P, grad_d.to(d.dtype)


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y = μ + Pω_p + √d ω_d [S, B, N] in loc's dtype, of the shapes of `ops_rsample`, with the noise given."""
    if omega_d is None:
        raise ValueError("drawing ω_d from a seed is for the kernels: aten takes the noise")
    S, (B, N, _) = omega_p.shape[0], P.shape
    dtype = product_dtype(loc, P, d)
    y, omega = loc.new_empty(S, B, N), omega_p.transpose(0, 1).to(dtype)
    for b, n, part in _vector_blocks(P, S, slice(0, B), dtype) if S else ():
        root = _diagonal(d, b, n, dtype).sqrt()
        shift = loc[:, b, n].to(dtype).addcmul(omega_d[:, b, n].to(dtype), root).transpose(0, 1)
        out = y.transpose(0, 1)[b, :, n]
        for i, j, p in _factor_blocks(part, S, dtype):
            out[i, :, j] = torch.baddbmm(shift[i, :, j], omega[b][i], p.to(dtype).mT)
    return y


def rsample_backward(
    grad_y: Tensor,
    P: Tensor,
    d: Tensor,
    omega_p: Tensor,
    omega_d: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_P, grad_d and grad_ω_d, each in its input's shape and dtype; empty where `needs` says no."""
    assert omega_d is not None, "the forward pass has asked for it"
    need_P, need_d, need_omega_d = needs
    S, B, _ = grad_y.shape
    dtype = product_dtype(grad_y, P, d)
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    grad_d = d.new_zeros(d.shape, dtype=torch.float64 if d.shape[1] == 1 else dtype) if need_d else d.new_empty(0)
    grad_omega_d = omega_d.new_empty(omega_d.shape if need_omega_d else 0)
    omega = omega_p.transpose(0, 1).to(dtype)
    for b, n, part in _vector_blocks(P, S, slice(0, B), dtype):
        g = grad_y[:, b, n].to(dtype).transpose(0, 1)
        root = _diagonal(d, b, n, dtype).sqrt()
        if need_d:
            product = (g * omega_d[:, b, n].to(dtype).transpose(0, 1)).sum(1)
            if d.shape[1] == 1:
                grad_d[b] += product.sum(1, keepdim=True, dtype=torch.float64) / (2 * root)
            else:
                grad_d[b, n] = product / (2 * root)
        if need_omega_d:
            grad_omega_d[:, b, n] = (g * root.unsqueeze(1)).transpose(0, 1)
        for i, j, p in _factor_blocks(part, S, dtype) if need_P else ():
            z, out = g[i, :, j].mT, grad_P[b, n][i, j]
            if S == 1 and p.dtype == dtype:  # straight into the gradient: a step less
                torch.mul(z, omega[b][i], out=out)
            else:
                out.copy_(torch.bmm(z, omega[b][i]))
    return grad_P, grad_d.to(d.dtype), grad_omega_d
