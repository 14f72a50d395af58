"""The backward pass: read P, write grad_P, and grad_x, grad_loc, grad_d on the way; only what is asked for.

    grad_x = 2 grad_q z = −grad_loc        grad_P = 2 grad_logdet D⁻¹PC⁻¹ − 2 grad_q z vᵀ
    grad_d = grad_logdet π − grad_q z²     π = diag Σ⁻¹ = 1/d − diag(PC⁻¹Pᵀ)/d²

with r ← r − PC⁻¹g and z = D⁻¹r. Where one pixel's row of P outweighs others, `leverage` makes all of them again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ....capacitance import inverse, product_dtype, runs, spans, sum_of_pi
from ....device.pages import Scratch, empty_gradient
from ....leverage import Gradients, Items, Remainders, doubtful_rows, mend
from ....registry import kept
from . import blocks
from .pixels import Pixels


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor,
    P: Tensor,
    d: Tensor,
    L_inv: Tensor,
    v: Tensor,
    step: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_x, grad_loc, grad_P, grad_d, each in its input's shape and dtype; empty where `needs` says no."""
    S, N = x.shape[0], P.shape[1]
    need_x, need_loc, need_P, need_d = needs
    dtype, one_d = product_dtype(x, loc, P, d), d.shape[1] == 1
    grad_x, grad_loc = _empty(x, need_x), _empty(loc, need_loc)
    grad_P = empty_gradient(P) if need_P else x.new_empty(0)
    grad_q, grad_logdet = grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    grad_d = _of_logdet(grad_logdet, d, N, L_inv, need_d)
    rest = Remainders(N, L_inv, wide) if need_d and not one_d else None
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    minus_2av = -2 * grad_q.unsqueeze(-1) * v
    products_of_P = _Products(L_inv, grad_logdet, d, wide, dtype)
    for items, products, rooted in products_of_P.runs():
        Q_scratch, of_P = Scratch(products, P.device), products_of_P.of(products, rooted)
        minus_step, coefficients = -step, minus_2av.to(products)
        if one_d:  # D⁻¹ is in the R×R part, and Q is P
            minus_step = minus_step / d.double().unsqueeze(-1)
        minus_step = minus_step.to(products)
        for b, n, part in blocks.vector_blocks(P, S, items, products):
            d_inv = blocks.diagonal(d, b, n, products).reciprocal()
            r = residual[:, b, n].to(products).transpose(0, 1)
            z = torch.empty_like(r)
            row_sums = d_inv.new_empty(part.shape[:2]) if need_d and not one_d else None
            for i, j, p in blocks.factor_blocks(part, S, products):
                # With Q = D⁻¹P: z = D⁻¹r − QC⁻¹g.
                Q = blocks.scaled(p, None if one_d else d_inv[i, j], Q_scratch)
                shift = blocks.rows(minus_step[b][i], Q)
                zj = torch.addcmul(shift, r[i, :, j], blocks.columns(d_inv, i, j).unsqueeze(1), out=z[i, :, j])
                if not need_P and row_sums is None:
                    continue
                PC = of_P(p, Q, b, i, None if row_sums is None else row_sums[i, j])
                if need_P and S == 1 and products == P.dtype:  # straight into the gradient: a step less
                    torch.addcmul(PC, zj.mT, coefficients[b][i], out=grad_P[b, n][i, j])
                elif need_P:
                    grad_P[b, n][i, j] = PC.baddbmm_(zj.mT, coefficients[b][i]) if S else PC
            az = z * grad_q[b].to(products).unsqueeze(-1)
            if need_d:
                az2 = z.mul_(az).sum(1)
                if row_sums is None or rest is None:
                    grad_d[b] -= az2.sum(-1, keepdim=True, dtype=torch.float64)
                else:
                    grad_d[b, n] = _of_pi(grad_logdet[b], d_inv, row_sums, b, rest) - az2
            if need_x:
                grad_x[:, b, n] = 2 * az.transpose(0, 1)
            if need_loc:
                az = az if loc.shape[0] == S else az.sum(1, keepdim=True)
                grad_loc[:, b, n] = az.mul_(-2).transpose(0, 1)

    def pixels(t: Items) -> Pixels:
        return Pixels((x[:, t], loc[:, t]), P[t])

    each = (grad_d, need_d), (grad_x, need_x), (grad_loc, need_loc), (grad_P, need_P)
    grads = Gradients(*(g if need else None for g, need in each))
    doubtful = _doubtful(products_of_P.rooted, N, L_inv, rest, need_d)
    mend(doubtful, N * (P.shape[2] + 2 * S), pixels, d, L_inv, v, grad_q, grad_logdet, grads)
    return grad_x, grad_loc, grad_P, grad_d.to(d.dtype)


def logdet_backward(
    grad_logdet: Tensor, P: Tensor, d: Tensor, L_inv: Tensor, wide: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """grad_P = 2 grad_logdet D⁻¹PC⁻¹ and grad_d = grad_logdet π; empty where `needs` says no."""
    need_P, need_d = needs
    (B, N, R), one_d, dtype = P.shape, d.shape[1] == 1, product_dtype(P, d)
    grad_P = empty_gradient(P) if need_P else P.new_empty(0)
    grad_logdet = grad_logdet.double()
    grad_d = _of_logdet(grad_logdet, d, N, L_inv, need_d)
    rest = Remainders(N, L_inv, wide) if need_d and not one_d else None
    products_of_P = _Products(L_inv, grad_logdet, d, wide, dtype)
    for items, products, rooted in products_of_P.runs() if need_P or rest else ():
        Q_scratch, of_P = Scratch(products, P.device), products_of_P.of(products, rooted)
        for b, n, p in blocks.factor_blocks_of(P, items, products):
            d_inv = blocks.diagonal(d, b, n, products).reciprocal()
            Q = blocks.scaled(p, None if one_d else d_inv, Q_scratch)
            row_sums = None if rest is None else d_inv.new_empty(p.shape[:2])
            PC = of_P(p, Q, b, slice(None), row_sums)
            if need_P:
                grad_P[b, n] = PC
            if rest is not None and row_sums is not None:
                grad_d[b, n] = _of_pi(grad_logdet[b], d_inv, row_sums, b, rest)

    def pixels(t: Items) -> Pixels:
        return Pixels(None, P[t])

    grads = Gradients(grad_d if need_d else None, P=grad_P if need_P else None)
    doubtful, none = _doubtful(products_of_P.rooted, N, L_inv, rest, need_d), grad_logdet.new_empty(B, 0)
    mend(doubtful, N * R, pixels, d, L_inv, none.unsqueeze(-1).expand(B, 0, R), none, grad_logdet, grads)
    return grad_P, grad_d.to(d.dtype)


class _Products:
    """2 grad_logdet D⁻¹PC⁻¹, and the products of its rows with those of D⁻¹P."""

    def __init__(self, L_inv: Tensor, grad_logdet: Tensor, d: Tensor, wide: Tensor, dtype: torch.dtype) -> None:
        self.L_inv, self.wide, self.dtype = L_inv, wide, dtype
        self.weight = 2 * grad_logdet[:, None, None]
        if d.shape[1] == 1:
            self.weight = self.weight / d.double().unsqueeze(-1)
        self.weighted = self.weight * inverse(L_inv)
        # Items for which a product with C⁻¹ is one with L⁻ᵀ, then one with L⁻¹.
        self.rooted = wide & doubtful_rows(L_inv, dtype)

    def runs(self) -> Iterator[tuple[slice, torch.dtype, bool]]:
        """Runs of items, with the dtype of their products, and whether those are with the root."""
        for items, products in runs(self.wide, self.dtype):
            for part, rooted in spans(self.rooted[items]):
                yield slice(items.start + part.start, items.start + part.stop), products, rooted

    def of(self, products: torch.dtype, rooted: bool) -> "_Product":
        if rooted:
            return _Product(self.L_inv.mT.to(products), (self.weight * self.L_inv).to(products), self.weight)
        return _Product(None, self.weighted.to(products), self.weight)


class _Product:
    def __init__(self, half: Tensor | None, whole: Tensor, weight: Tensor) -> None:
        self.half, self.whole, self.weight = half, whole, weight
        self.half_scratch, self.scratch = Scratch(whole.dtype, whole.device), Scratch(whole.dtype, whole.device)

    def __call__(self, p: Tensor, Q: Tensor, b: slice, i: slice, row_sums: Tensor | None) -> Tensor:
        """The product of a block, in the layout of `p`, and its row sums [b, n] in place; may overwrite Q = D⁻¹P."""
        if self.half is not None:
            Q = blocks.times(Q, self.half[b][i], self.half_scratch.like(p))
        PC = blocks.times(Q, self.whole[b][i], self.scratch.like(p))
        if row_sums is not None and self.half is not None:  # a sum of squares
            torch.sum(Q.square_(), -1, out=row_sums).mul_(self.weight[b][i].squeeze(-1))
        elif row_sums is not None:
            torch.sum(Q.mul_(PC), -1, out=row_sums)
        return PC


def _doubtful(rooted: Tensor, N: int, L_inv: Tensor, rest: Remainders | None, need_d: bool) -> Tensor:
    """Which items have pixels whose gradients are to be made again, [B]."""
    if rest is not None:
        return rooted | rest.doubtful()
    return torch.ones_like(rooted) if need_d and L_inv.shape[-1] >= N else rooted


def _empty(t: Tensor, need: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)


def _of_logdet(grad_logdet: Tensor, d: Tensor, N: int, L_inv: Tensor, need: bool) -> Tensor:
    """grad_d, holding grad_logdet Σπ already where d is one value, and then in float64."""
    if not need or d.shape[1] > 1:
        return kept(torch.zeros_like(d, memory_format=torch.contiguous_format), need)
    return (grad_logdet * sum_of_pi(d[:, 0], N, L_inv)).unsqueeze(1)


def _of_pi(grad_logdet: Tensor, d_inv: Tensor, row_sums: Tensor, b: slice, rest: Remainders) -> Tensor:
    """grad_logdet π of a block [b, n], with 2 grad_logdet diag(PC⁻¹Pᵀ)/d² in `row_sums`."""
    of_d = grad_logdet.to(d_inv.dtype).unsqueeze(-1) * d_inv
    pi = torch.add(of_d, row_sums, alpha=-0.5)
    rest.add(b, torch.div(pi, of_d, out=of_d))
    return pi
