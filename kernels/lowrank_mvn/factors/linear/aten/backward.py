"""The backward pass: read F, write grad_F, and grad_x and grad_d on the way; only what is asked for.

Rows made of a block, [tile; z], and matrices back to the features give grad_F:

    from tiles          [A; −u_step]F̃ with A = L⁻¹W;  grad_F = AᵀA-part · y/d + (−2 grad_q u)ᵀ z
    from the features   z alone;  grad_F = 2 grad_logdet Σ_c M_cf̃ₙ/d_c + (−2 grad_q u)ᵀ z, one product with one d

Where π = 1/d − diag(PC⁻¹Pᵀ)/d² cancels, `leverage` makes grad_d again; where rows of P outweigh
others too far, `densely` makes everything again.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ....capacitance import inverse, product_dtype, runs, sum_of_pi
from ....device.pages import Scratch, empty_gradient
from ....leverage import Gradients, Items, Remainders, doubtful_rows, mend, together
from .. import forms
from . import blocks
from .densely import Given, gradients
from .pixels import Pixels, Samples


class Scores(NamedTuple):
    """What the samples bring to the pass."""

    residual: Tensor  # r before the last step of v, [S, B, channels, pixels]
    step: Tensor  # W_cᵀ of the last step of v, [B, S·channels, K+1], float64
    back: Tensor  # −2 grad_q (u + m), [B, S·channels, K+1], float64
    grad_q: Tensor  # [B, S], float64


class Grads(NamedTuple):
    """What the pass writes; what is not needed is empty."""

    x: Tensor  # [S, B, channels, pixels]
    F: Tensor  # [B, K, pixels]
    d: Tensor  # as d; in float64 where that is one value
    rest: Remainders | None  # of a d per pixel


class Needs(NamedTuple):
    x: bool
    F: bool
    d: bool


def mahalanobis_and_logdet_backward(
    grad_mahalanobis: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    loc: Tensor | None,
    F: Tensor,
    W: Tensor,
    m: Tensor | None,
    d: Tensor,
    L_inv: Tensor,
    v: Tensor,
    step: Tensor,
    WG: Tensor,
    zF: Tensor,
    residual: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_x [S, B, channels, pixels], grad_F, grad_W, grad_m (empty without m) and grad_d; `needs` is for x, F and d:
    what is not needed is empty. grad_loc is −grad_x."""
    W64, grad_q, grad_logdet = W.double(), grad_mahalanobis.T.double(), grad_logdet.double()  # [B, S], [B]
    v, step = v.transpose(0, 1), step.transpose(0, 1)  # [B, S, R]
    u = forms.coefficients(v, W64)
    back = -2 * grad_q[:, :, None, None] * (u if m is None else u + m.double())
    scores = Scores(residual, forms.coefficients(step, W64).flatten(1, 2), back.flatten(1, 2), grad_q)
    grad_x = x.new_empty(x.shape if needs[0] else 0, dtype=residual.dtype)
    grads = _gradients(grad_logdet, F, W64, d, L_inv, wide, Needs(*needs), residual.dtype, scores, grad_x)
    made = Given(x, loc, F, W64, m, d, L_inv, v, step, residual, wide)
    rows = _apart(L_inv, residual.dtype)
    a, b, shared = grad_q.masked_fill(rows.unsqueeze(1), 0), grad_logdet.masked_fill(rows, 0), W.shape[0] == 1
    grad_W = forms.grad_weight(a, b, L_inv, v, WG, zF, shared)
    grad_m = F.new_empty(0, dtype=torch.float64) if m is None else forms.grad_mean(a, zF)

    def pixels(t: Items) -> Pixels:
        return Pixels(Samples(*made.some(t)[:2], m), *made.some(t)[2:4])

    _again(grad_q, grad_logdet, made, Needs(*needs), pixels, rows, grads, grad_W, grad_m)
    return grads.x, grads.F, grad_W.to(W.dtype), grad_m.to(F.dtype if m is None else m.dtype), grads.d.to(d.dtype)


def logdet_backward(
    grad_logdet: Tensor,
    F: Tensor,
    W: Tensor,
    d: Tensor,
    L_inv: Tensor,
    WG: Tensor,
    wide: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_F, grad_W and grad_d; `needs` is for F and d: what is not needed is empty."""
    W64, grad_logdet, dtype = W.double(), grad_logdet.double(), product_dtype(F, W, d)
    wanted, empty = Needs(False, *needs), F.new_empty(0)
    grads = _gradients(grad_logdet, F, W64, d, L_inv, wide, wanted, dtype, None, empty)
    none, rows = grad_logdet.new_empty(len(F), 0), _apart(L_inv, dtype)
    weight = 2 * grad_logdet.masked_fill(rows, 0)[:, None, None] * inverse(L_inv)
    grad_W = forms.weighted(weight, WG)
    grad_W = grad_W.sum(0, keepdim=True) if W.shape[0] == 1 else grad_W
    x, v = F.new_empty(0, len(F), W.shape[1], F.shape[2]), none.unsqueeze(2).expand(-1, -1, W.shape[2])
    made = Given(x, None, F, W64, None, d, L_inv, v, v, x, wide)

    def pixels(t: Items) -> Pixels:
        return Pixels(None, *made.some(t)[2:4])

    _again(none, grad_logdet, made, wanted, pixels, rows, grads, grad_W, none)
    return grads.F, grad_W.to(W.dtype), grads.d.to(d.dtype)


def _apart(L_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Which items go by way of P, [B]; on other devices than the CPU none, where all would have to."""
    here = L_inv.device.type == "cpu"
    return doubtful_rows(L_inv, dtype) if here else L_inv.new_zeros(len(L_inv), dtype=torch.bool)


def _again(
    grad_q: Tensor,
    grad_logdet: Tensor,
    given: Given,
    needs: "Needs",
    pixels: Callable[[Items], Pixels],
    rows: Tensor,
    grads: "Grads",
    grad_W: Tensor,
    grad_m: Tensor,
) -> None:
    """Mends grad_d at pixels that P explains almost alone, and makes all gradients of the items `rows` [B] again; their
    part of grad_W and grad_m is added."""
    F, L_inv, d = given.F, given.L_inv, given.d
    N = given.W.shape[1] * F.shape[2]
    size = F.shape[1] * F.shape[2] + 2 * N * len(given.x)
    if needs.d:
        few = torch.full_like(rows, L_inv.shape[1] >= N) if grads.rest is None else grads.rest.doubtful()
        found = Gradients(grads.d.flatten(1), grads.x.flatten(2) if needs.x else None)
        mend(few & ~rows, size, pixels, d.flatten(1), L_inv, given.v, grad_q, grad_logdet, found)
    if rows.device.type != "cpu":
        return
    for t in together(rows.nonzero().squeeze(1), size + N * L_inv.shape[1]):
        made = gradients(grad_q[t], grad_logdet[t], given.some(t), needs.x, needs.d)
        if made.x is not None:
            grads.x[:, t] = made.x.to(grads.x.dtype)
        if needs.F:
            grads.F[t] = made.F.to(grads.F.dtype)
        if made.d is not None:
            grads.d[t] = made.d.to(grads.d.dtype)
        if len(grad_W) == len(F):
            grad_W[t] += made.W
        else:
            grad_W += made.W.sum(0, keepdim=True)
        if made.m is not None:
            grad_m += made.m


def _gradients(
    grad_logdet: Tensor,
    F: Tensor,
    W: Tensor,
    d: Tensor,
    L_inv: Tensor,
    wide: Tensor,
    needs: Needs,
    dtype: torch.dtype,
    scores: Scores | None,
    grad_x: Tensor,
) -> Grads:
    """The pass; products of items that are not `wide` in `dtype`."""
    one = forms.one_d(d)
    grad_d = d.new_zeros(d.shape if needs.d else 0, dtype=torch.float64 if one else d.dtype)
    N = W.shape[1] * F.shape[2]
    if needs.d and one:
        grad_d += (grad_logdet * sum_of_pi(d[:, 0, 0], N, L_inv))[:, None, None]
    rest = Remainders(N, L_inv, wide) if needs.d and not one else None
    grads = Grads(grad_x, empty_gradient(F) if needs.F else F.new_empty(0), grad_d, rest)
    if scores is None and not needs.F and (one or not needs.d):
        return grads
    operands = _Operands(grad_logdet, W, d, L_inv, needs, scores)
    for items, products in runs(wide, dtype):
        operands.run(items, products, F, scores, grads)
    return grads


class _Operands:
    """The small matrices of the pass, and what one block does with them."""

    def __init__(
        self, grad_logdet: Tensor, W: Tensor, d: Tensor, L_inv: Tensor, needs: Needs, scores: Scores | None
    ) -> None:
        (channels, R, K1), K = W.shape[1:], W.shape[3] - 1
        self.channels, self.needs, self.d, self.one = channels, needs, d, forms.one_d(d)
        self.made = needs.F or (needs.d and not self.one)  # whether anything is made of the features but z
        self.two_b = 2 * grad_logdet[:, None, None]
        scaled = self.two_b / d.double() if self.one else self.two_b
        empty = W.new_empty(L_inv.shape[0], 0, K1)
        minus_step, self.back_z = (-scores.step, scores.back.mT[:, :K]) if scores else (empty, empty.mT[:, :K])
        self.thin = minus_step.shape[1]
        self.tile = channels * R if self.made and forms.from_tiles(channels, R, K1, not self.one) else 0
        if self.tile:
            A = blocks.rows(forms.weighted(L_inv, W))
            self.rows = torch.cat([A, minus_step], 1)
            self.back = torch.cat([A.mT[:, :K] * scaled, self.back_z], 2)
        else:
            M = (forms.quadratic_sum if self.one else forms.quadratic)(L_inv, W)
            self.rows = minus_step
            self.back = M[:, 0, :K] * scaled if self.one else M
        # grad_F of a block, and M_cf̃ₙ or squares
        self.spare_rows = max(K, self.tile) if self.tile or self.one else K + K1

    def run(self, items: slice, products: torch.dtype, F: Tensor, scores: Scores | None, grads: Grads) -> None:
        """The blocks of a run of items, products in that dtype."""
        copies, scratch = Scratch(products, F.device), Scratch(products, F.device)
        precision_of = blocks.precision_of(self.d, products)
        rows, back, back_z, two_b = (t.to(products) for t in (self.rows, self.back, self.back_z, self.two_b))
        for b, n in blocks.blocks(F, self.tile + self.thin + self.spare_rows, items):
            f, precision = blocks.features(F, b, n, copies), precision_of(b, n)
            count, K, pixels = f.shape
            spare_size = count * self.spare_rows * pixels
            made, spare = blocks.carved(scratch, (count, self.tile + self.thin, pixels), (spare_size,))
            blocks.rows_from(rows[b], f, out=made)
            y, z = made[:, : self.tile], made[:, self.tile :]
            az2 = self._of_samples(z, b, n, precision, scores, grads, products)
            if not self.made:
                continue
            grad_f = spare[: count * K * pixels].view(count, K, pixels)
            if self.tile:
                if grads.rest is not None:
                    squares = torch.mul(y, y, out=spare[: y.numel()].view(y.shape))
                    leverage = squares.unflatten(1, (-1, self.channels)).sum(1)
                    rest = 1 - leverage * precision
                    grads.rest.add(b, rest)
                    grads.d[b, :, n] = 0.5 * two_b[b] * (rest * precision) - az2
                if not self.one:
                    blocks.scale(y, precision)
                torch.bmm(back[b], made, out=grad_f)
            elif self.one:
                blocks.rows_from(back[b], f, out=grad_f).baddbmm_(back_z[b], z)
            else:
                torch.bmm(back_z[b], z, out=grad_f)
                Mf = spare[grad_f.numel() :].view(count, K + 1, pixels)
                for c in range(self.channels):
                    p = precision[:, c]
                    blocks.rows_from(back[b, c], f, out=Mf)
                    if grads.rest is not None:
                        rest = 1 - ((Mf[:, :K] * f).sum(1) + Mf[:, K]) * p
                        grads.rest.add(b, rest)
                        of_q = az2 if scores is None else az2[:, c]
                        grads.d[b, c, n] = 0.5 * two_b[b, 0] * (rest * p) - of_q
                    grad_f.addcmul_(Mf[:, :K], two_b[b] * p.unsqueeze(1))
            if self.needs.F:
                grads.F[b, :, n] = grad_f

    def _of_samples(
        self,
        z: Tensor,
        b: slice,
        n: slice,
        precision: Tensor,
        scores: Scores | None,
        grads: Grads,
        products: torch.dtype,
    ) -> Tensor:
        """Makes z of −F̃ᵀu_step in place, writes grad_x, and returns grad_q z² summed over samples, [b, channels, n]."""
        if scores is None:
            return z.new_zeros(())
        grad_q, S = scores.grad_q[b].to(products), scores.grad_q.shape[1]
        r = scores.residual[:, b, :, n].to(products).transpose(0, 1)
        blocks.scale(z.add_(r.flatten(1, 2)), precision)
        z_c = z.unflatten(1, (S, self.channels))
        if self.needs.x:
            grads.x[:, b, :, n] = (2 * grad_q[:, :, None, None] * z_c).transpose(0, 1)
        if not self.needs.d:
            return z.new_zeros(())
        az2: Tensor = (z_c.square() * grad_q[:, :, None, None]).sum(1)
        if self.one:
            grads.d[b] -= az2.sum((1, 2), dtype=torch.float64)[:, None, None]
        return az2
