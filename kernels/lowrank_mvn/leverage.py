"""Gradients at pixels that P explains almost alone, the same for every kind of factor; README.md derives it.

With aₙ = pₙ/√dₙ, 1 − hₙ = dₙπₙ is the share that a pixel's own noise has in its variance given all others, and
πₙ = (1 − hₙ)/dₙ cancels where the leverage hₙ = aₙᵀC⁻¹aₙ is near one. That happens at few pixels H, because Σ hₙ ≤ R.
With C_L = C − A_HᵀA_H = L_LL_Lᵀ, which is summed without H and never subtracted, Yᵀ = C⁻¹A_Hᵀ and U = I − A_HYᵀ,

    (D^½Σ⁻¹D^½)_HH = UᵀU + YL_L(YL_L)ᵀ           d_H^½ z_H = (D^½Σ⁻¹D^½)_HH d_H^{-½}δ_H − Yw_L

are sums of squares, as q is: an error of Y enters them squared. Rows of D⁻¹PC⁻¹ are those of D^(−½)Y.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .capacitance import factorise, improve, inexact, with_identity

# Below this, 1 − h is made again: float32 leaves an error of about 1e-6 of it.
SMALL = 0.1
# Error of a leverage that float64 may leave.
TOLERANCE = 1e-7
# The first leaves what ε‖aₙ‖² makes of an error of that size, the second no more than rounding up to ‖aₙ‖² = 1e14.
REFINEMENTS = 2
# Where every C⁻¹ⱼⱼ is below this, P says much in all directions, and L⁻¹ needs no closer look.
INFORMED = 1e-4
# Values of P, or of the samples, that are gathered at once.
VALUES = 1 << 20

Items = slice | Tensor


class Pixels(Protocol):
    """Some items of a factor and their samples, pixels in a row. H [b, k] are indices of pixels."""

    def norms(self, A: Tensor) -> Tensor:
        """‖Apₙ‖² [b, N] of `A` [b, R, R]."""

    def rows(self, H: Tensor) -> Tensor:
        """pₙ at H, [b, k, R], in float64."""

    def deltas(self, H: Tensor, s: slice) -> Tensor:
        """δ of some samples at H, [b, s, k], in float64."""

    def sums(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Pᵀ diag(ρ) P [b, R, R] and Pᵀ diag(ρ) δ [b, S, R] with a precision ρ [b, N], from products in float64."""

    def mixed_gram(self, precision: Tensor, A: Tensor) -> Tensor:
        """APᵀ diag(ρ) PAᵀ [b, R, R], from products of rows of PAᵀ in float64; A [b, R, R]."""


class Gradients(NamedTuple):
    """What `mend` writes into, None where nobody needs it."""

    d: Tensor | None  # [B, N or 1]
    x: Tensor | None = None  # [S, B, N]
    loc: Tensor | None = None  # [S or 1, B, N]
    P: Tensor | None = None  # [B, N, R]


class Remainders:
    """1 − h of every item, as the blocks of a backward pass have it."""

    def __init__(self, N: int, L_inv: Tensor, wide: Tensor) -> None:
        self.N, self.L_inv, self.wide = N, L_inv, wide
        self.least = L_inv.new_ones(len(wide))
        self.total: Tensor | None = None  # of items with products in float64

    def add(self, b: slice, rest: Tensor) -> None:
        """Takes 1 − h of a block, [b, ...]."""
        rest = rest.flatten(1)
        if rest.shape[1]:
            self.least[b] = torch.minimum(self.least[b], rest.amin(1))
        if rest.dtype == torch.float64:
            self.total = torch.zeros_like(self.least) if self.total is None else self.total
            self.total[b] += rest.sum(1)

    def doubtful(self) -> Tensor:
        """Which items `mend` is needed for, [B]: one h is near one or, in float64, they do not add up to R − tr C⁻¹.

        On other devices than the CPU all items: no decision waits there.
        """
        N, R = self.N, self.L_inv.shape[-1]
        if self.least.device.type != "cpu":
            return torch.ones_like(self.wide)
        found = self.least < SMALL
        if self.total is not None:
            off = self.total - (N - R + self.L_inv.square().sum((-2, -1)))
            # Errors of many pixels add up; what can be mended is that of a few.
            found |= self.wide & (off.abs() > TOLERANCE * math.sqrt(max(1.0, N / R)))
        return found


def doubtful_rows(L_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Which items [B] have directions in which P says so little beside others that products with C⁻¹ are not good
    enough for results in `dtype`. On other devices than the CPU all items."""
    if L_inv.device.type != "cpu":
        return L_inv.new_ones(len(L_inv), dtype=torch.bool)
    if not bool((L_inv.square().sum(-2) > INFORMED).any()):
        return L_inv.new_zeros(len(L_inv), dtype=torch.bool)
    return inexact(lower_inverse(L_inv).square().sum(-1), L_inv, dtype)


def lower_inverse(L: Tensor) -> Tensor:
    """L of L⁻¹, or L⁻¹ of L."""
    ones = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse: Tensor = torch.linalg.solve_triangular(L, ones, upper=False)
    return inverse


def mend(
    doubtful: Tensor,
    size: int,
    pixels: Callable[[Items], Pixels],
    d: Tensor,
    L_inv: Tensor,
    v: Tensor,
    grad_q: Tensor,
    grad_logdet: Tensor,
    grads: Gradients,
) -> None:
    """Makes the gradients of the doubtful items [B] again at the pixels of the largest leverages.

    Args:
        size: how many values an item has.
        d: [B, N or 1]; grad_d of one value is made again where all pixels are among those.
        v: [B, S, R]; as L⁻¹ [B, R, R], grad_q [B, S] and grad_logdet [B] in float64.
    """
    here = doubtful.device.type == "cpu"
    for t in together(doubtful.nonzero().squeeze(1) if here else torch.arange(len(doubtful)), size):
        top = Heaviest(pixels(t), d[t], L_inv[t])
        index = torch.arange(len(d), device=d.device)[t].unsqueeze(1), top.H
        b = grad_logdet[t].unsqueeze(1)
        grad_d, rows = b * top.pi, 2 * (b * top.scale).unsqueeze(-1) * top.Y
        shared = grads.loc is not None and len(grads.loc) != grad_q.shape[1]
        if grads.loc is not None and shared:
            grads.loc[0][index] = 0
        for s in top.samples(grad_q.shape[1]):
            z = top.scores(s)
            az = grad_q[t, s, None] * z
            grad_d -= (az * z).sum(1)
            rows -= 2 * az.mT @ v[t, s]
            if grads.x is not None:
                grads.x[s][:, *index] = (2 * az).transpose(0, 1).to(grads.x.dtype)
            if grads.loc is not None and shared:
                grads.loc[0][index] -= (2 * az.sum(1)).to(grads.loc.dtype)
            elif grads.loc is not None:
                grads.loc[s][:, *index] = (-2 * az).transpose(0, 1).to(grads.loc.dtype)
        if grads.P is not None:
            grads.P[index] = rows.to(grads.P.dtype)
        if grads.d is not None and grads.d.shape[1] > 1:
            grads.d[index] = grad_d.to(grads.d.dtype)
        elif grads.d is not None and top.all:
            grads.d[t] = grad_d.sum(1, keepdim=True).to(grads.d.dtype)


def together(items: Tensor, size: int) -> Iterator[Items]:
    """Items, `size` values each, that are gathered together; neighbours, or a single one, as a view."""
    for part in items.split(max(1, VALUES // max(1, size))) if len(items) else ():
        first, last = int(part[0]), int(part[-1])
        yield slice(first, last + 1) if last - first == len(part) - 1 else part


class Heaviest:
    """The pixels H [b, k] of the largest leverages of some items, and what holds there: π [b, k], Y [b, k, R], d^(−½).

    `d` [b, N or 1], L⁻¹ [b, R, R] in float64.
    """

    def __init__(self, pixels: Pixels, d: Tensor, L_inv: Tensor) -> None:
        norms = pixels.norms(L_inv)
        (b, N), R = norms.shape, L_inv.shape[-1]
        d = d.double().expand(b, N)
        k = min(N, 2 * R)  # at most 2R leverages are above ½
        self.pixels, self.all = pixels, k == N
        self.H = torch.arange(N, device=d.device).expand(b, N) if self.all else (norms / d).topk(k, 1).indices
        self.scale = d.gather(1, self.H).rsqrt()
        root: Tensor | None = None
        self.w: Tensor | None = None  # of the other pixels
        if not self.all:
            root, self.w = _root_of_rest(pixels, d.reciprocal().scatter(1, self.H, 0))
        A = pixels.rows(self.H) * self.scale.unsqueeze(-1)
        self.precision, self.Y = without_cancellation(A, root, L_inv)
        self.pi = self.precision.diagonal(dim1=-2, dim2=-1) * self.scale.square()

    def samples(self, S: int) -> Iterator[slice]:
        """So many of S samples that what is made of them is small."""
        step = max(1, VALUES // max(1, self.H.numel()))
        for start in range(0, S, step):
            yield slice(start, min(start + step, S))

    def scores(self, s: slice) -> Tensor:
        """z of some samples at H, [b, s, k]."""
        z = (self.pixels.deltas(self.H, s) * self.scale.unsqueeze(1)) @ self.precision
        return (z if self.w is None else z - self.w[:, s] @ self.Y.mT) * self.scale.unsqueeze(1)


def _root_of_rest(pixels: Pixels, precision: Tensor) -> tuple[Tensor, Tensor]:
    """L_L [b, R, R] and w_L [b, S, R] of the pixels that have a precision."""
    gram, w = pixels.sums(precision)
    C = with_identity(gram)
    L_inv, log_det = factorise(C)
    everyone = torch.ones(len(C), dtype=torch.bool, device=C.device)
    improve(L_inv, log_det, C, everyone, C.dtype, lambda items: pixels.mixed_gram(precision, L_inv)[items])
    return lower_inverse(L_inv), w


def without_cancellation(A: Tensor, root: Tensor | None, L_inv: Tensor) -> tuple[Tensor, Tensor]:
    """(D^½Σ⁻¹D^½)_HH [b, k, k] and Y [b, k, R] of A_H [b, k, R], L_L [b, R, R] (I if none) and L⁻¹ of C, which may be
    rough; rows of zeros do no harm."""
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    Y = A @ L_inv.mT @ L_inv  # C⁻¹ itself would lose its small eigenvalues
    for _ in range(REFINEMENTS):  # of CYᵀ = Aᵀ; the residual is that of products, not of C, which is rounded
        U = identity - A @ Y.mT
        Y = Y + (U.mT @ A - (Y if root is None else Y @ root @ root.mT)) @ L_inv.mT @ L_inv
    U, V = identity - A @ Y.mT, Y if root is None else Y @ root
    return U.mT @ U + V @ V.mT, Y


class Listed:
    """The pixels H that a kernel has listed for each item [B, 1 + k], behind their number; nothing waits for the host.

    Args:
        d: [B, N].
        rows: gives pₙ [B, k, R] in float64 of indices [B, k].
        gram: gives Pᵀ diag(ρ) P [B, R, R] of a precision ρ [B, N] for the items that are flagged [B], 0 for the others;
            of APᵀ in the place of Pᵀ where it is given A [B, R, R].
        exactly: to float64's rounding; else as float32 has to be.
    """

    def __init__(
        self,
        listed: Tensor,
        d: Tensor,
        L_inv: Tensor,
        rows: Callable[[Tensor], Tensor],
        gram: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        exactly: bool,
    ) -> None:
        count, H = listed[:, :1], listed[:, 1:].long()
        self.listed = torch.arange(H.shape[1], device=H.device) < count
        self.H = torch.where(self.listed, H, H[:, :1])  # as if pixels were listed several times
        precision = d.to(torch.promote_types(d.dtype, torch.float32)).reciprocal()
        self.scale = precision.gather(1, self.H).double().mul_(self.listed).sqrt_()
        self.A, self.L_inv = rows(self.H) * self.scale.unsqueeze(-1), L_inv
        precision, flags = precision.scatter(1, self.H, 0), (count[:, 0] > 0).view(torch.uint8)
        C = with_identity(gram(precision, flags, None))
        root, log_det = factorise(C)
        if exactly:
            everyone = torch.ones_like(flags, dtype=torch.bool)
            improve(root, log_det, C, everyone, C.dtype, lambda items: gram(precision, flags, root)[items])
        self.precision, self.Y = without_cancellation(self.A, lower_inverse(root), L_inv)
        self.pi = self.precision.diagonal(dim1=-2, dim2=-1) * self.scale.square()

    def add_pi(self, grad_d: Tensor, grad_logdet: Tensor) -> None:
        """Adds grad_logdet π to grad_d [B, N]."""
        grad_d.scatter_add_(1, self.H, (grad_logdet.unsqueeze(1) * self.pi).to(grad_d.dtype))

    def mend(
        self,
        grads: Gradients,
        grad_q: Tensor,
        grad_logdet: Tensor,
        residual: Tensor,
        step: Tensor,
        v: Tensor,
    ) -> None:
        """Makes gradients again; grad_q [B, S], grad_logdet [B], r before the last step [S, B, N], step, v [S, B, R].

        z is that of δ − Pv at any v: D_H^(−½)(XD_H^(−½)r_H − Yg_L), with the part g_L of g = C step that other pixels
        have.
        """
        b = grad_logdet.unsqueeze(1)
        grad_d, rows, mean = b * self.pi, 2 * (b * self.scale).unsqueeze(-1) * self.Y, torch.zeros_like(self.scale)
        L, size = lower_inverse(self.L_inv), max(1, VALUES // max(1, self.H.numel()))
        for start in range(0, len(residual), size):
            s = slice(start, start + size)
            H = self.H.expand(*residual[s].shape[:2], -1)
            r = residual[s].gather(2, H).double() * self.scale
            g = torch.matmul(torch.matmul(step[s].unsqueeze(2), L), L.mT) - torch.matmul(r.unsqueeze(2), self.A)
            z = torch.matmul(r.unsqueeze(2), self.precision) - torch.matmul(g, self.Y.mT)
            z = z.squeeze(2) * self.scale
            az = grad_q.T[s].unsqueeze(2) * z
            grad_d -= (az * z).sum(0)
            rows -= 2 * torch.einsum("sbk,sbr->bkr", az, v[s])
            mean -= 2 * az.sum(0)
            if grads.x is not None:
                self._put(grads.x[s], 2 * az)
            if grads.loc is not None and len(grads.loc) == len(residual):
                self._put(grads.loc[s], -2 * az)
        if grads.loc is not None and len(grads.loc) != len(residual):
            self._put(grads.loc, mean.unsqueeze(0))
        if grads.P is not None:
            for grad, row in zip(grads.P.unbind(2), rows.unbind(2), strict=True):
                self._put(grad, row)
        if grads.d is not None:
            self._put(grads.d, grad_d)

    def _put(self, grad: Tensor, values: Tensor) -> None:
        """Writes values [..., B, k] into grad [..., B, N] at the pixels that are listed."""
        H, listed = (t.expand(values.shape) for t in (self.H, self.listed))
        values = values.to(grad.dtype)
        spare = torch.where(listed, values, grad.gather(-1, H))  # what is there already, where nothing is listed
        grad.scatter_(-1, H, torch.where(listed, values, spare[..., :1]))
