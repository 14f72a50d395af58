"""grad_d at pixels that P explains almost alone, the same for every kind of factor; README.md derives it.

With aₙ = pₙ/√dₙ, 1 − hₙ = dₙπₙ is the share that a pixel's own noise has in its variance given all others, and
πₙ = (1 − hₙ)/dₙ cancels where the leverage hₙ = aₙᵀC⁻¹aₙ is near one. That happens at few pixels H, because Σ hₙ ≤ R.
With C_L = C − A_HᵀA_H, which is summed without H and never subtracted, Yᵀ = C⁻¹A_Hᵀ and U = I − A_HYᵀ,

    (D^½Σ⁻¹D^½)_HH = UᵀU + YC_LYᵀ           d_H^½ z_H = (D^½Σ⁻¹D^½)_HH d_H^{-½}δ_H − Yw_L

are sums of squares, as q is: an error of Y enters them squared.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .capacitance import factorise, root, with_identity

# Below this, 1 − h is made again: float32 leaves an error of about 1e-6 of it.
SMALL = 0.1
# Error of a leverage that float64 may leave.
TOLERANCE = 1e-7
# The first leaves what ε‖aₙ‖² makes of an error of that size, the second no more than rounding up to ‖aₙ‖² = 1e14.
REFINEMENTS = 2
# Values of P, or of the samples, that are gathered at once.
VALUES = 1 << 20
EPS = torch.finfo(torch.float64).eps

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


class Remainders:
    """1 − h of every item, as the blocks of a backward pass have it."""

    def __init__(self, N: int, C_inv: Tensor, wide: Tensor) -> None:
        self.N, self.C_inv, self.wide = N, C_inv, wide
        self.least = C_inv.new_ones(len(wide))
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
        """Indices of the items for which `mend` is needed: one h is near one or, in float64, C⁻¹ was not good enough,
        so that they do not add up to R − tr C⁻¹. On other devices than the CPU all items: no decision waits there."""
        N, R = self.N, self.C_inv.shape[-1]
        if self.least.device.type != "cpu":
            return torch.arange(len(self.least))
        found = self.least < SMALL
        if self.total is not None:
            off = self.total - (N - R + self.C_inv.diagonal(dim1=-2, dim2=-1).sum(-1))
            # Errors of many pixels add up; what can be mended is that of a few.
            found |= self.wide & (off.abs() > TOLERANCE * math.sqrt(max(1.0, N / R)))
        return found.nonzero().squeeze(1)


def doubtful_sums(N: int, C_inv: Tensor) -> Tensor:
    """Indices of the items with one d for which `mend` is needed: N − R + tr C⁻¹ cancels where N ≤ R, and is not good
    enough where C⁻¹ is not (on other devices than the CPU no decision waits for that)."""
    B, R = C_inv.shape[:2]
    diagonal = C_inv.diagonal(dim1=-2, dim2=-1)
    if N <= R or C_inv.device.type != "cpu" or not bool((diagonal > 1e-4).any()):
        return torch.arange(B if N <= R else 0)
    squares = factorise(C_inv)[0].diagonal(dim1=-2, dim2=-1)
    error = EPS * (squares * diagonal).sqrt().sum(-1).square()  # as `capacitance.too_rough` has it
    return (~(error <= TOLERANCE * (N - R))).nonzero().squeeze(1)


def mend(
    grad_d: Tensor,
    doubtful: Tensor,
    pixels: Callable[[Items], Pixels],
    with_d_per_pixel: Callable[[Items], Tensor],
    d: Tensor,
    C_inv: Tensor,
    grad_q: Tensor,
    grad_logdet: Tensor,
    sizes: tuple[int, int],
) -> None:
    """Makes grad_d [B, N or 1] of the doubtful items again where π cancels.

    Args:
        with_d_per_pixel: gives grad_d [b, N] as if such items had a d for each pixel, where they have one.
        d: [B, N or 1].
        grad_q: [B, S]; as C⁻¹ [B, R, R] and grad_logdet [B], in float64.
        sizes: N, and the values that an item has.
    """
    N, size = sizes
    for t in _together(doubtful, size):
        if d.shape[1] < N:
            grad_d[t] = with_d_per_pixel(t).sum(1, keepdim=True)
        else:
            H, values = at_heaviest(pixels(t), d[t], C_inv[t], grad_q[t], grad_logdet[t])
            grad_d[t] = grad_d[t].scatter(1, H, values.to(grad_d.dtype))


def _together(items: Tensor, size: int) -> Iterator[Items]:
    """Items, `size` values each, that are gathered together; neighbours, or a single one, as a view."""
    for part in items.split(max(1, VALUES // max(1, size))) if len(items) else ():
        first, last = int(part[0]), int(part[-1])
        yield slice(first, last + 1) if last - first == len(part) - 1 else part


def at_heaviest(pixels: Pixels, d: Tensor, C_inv: Tensor, grad_q: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of the largest leverages, [b, k], and grad_d = grad_logdet π − Σ_s grad_q z² there.

    `d` [b, N], the rest in float64: C⁻¹ [b, R, R], `grad_q` [b, S], `grad_logdet` [b].
    """
    (b, N), R, S, d = d.shape, C_inv.shape[-1], grad_q.shape[1], d.double()
    k = min(N, 2 * R)  # at most 2R leverages are above ½
    if k == N:
        H = torch.arange(N, device=d.device).expand(b, N)
        gram, w = C_inv.new_zeros(b, R, R), C_inv.new_zeros(b, S, R)
    else:
        H = (pixels.norms(root(C_inv)) / d).topk(k, 1).indices
        gram, w = pixels.sums(d.reciprocal().scatter(1, H, 0))
    scale = d.gather(1, H).rsqrt()
    A = pixels.rows(H) * scale.unsqueeze(-1)
    precision, Y = without_cancellation(A, gram)
    grad_d = grad_logdet.unsqueeze(1) * precision.diagonal(dim1=-2, dim2=-1)
    step = max(1, VALUES // max(1, b * k))
    for start in range(0, S, step):
        s = slice(start, start + step)
        z = (pixels.deltas(H, s) * scale.unsqueeze(1)) @ precision - w[:, s] @ Y.mT
        grad_d -= (grad_q[:, s, None] * z.square()).sum(1)
    return H, grad_d * scale.square()


def without_cancellation(A: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """(D^½Σ⁻¹D^½)_HH [b, k, k] and Y [b, k, R] of A_H [b, k, R] and C_L − I [b, R, R]; rows of zeros do no harm."""
    C_L, identity = with_identity(gram), torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    L = torch.linalg.cholesky_ex(C_L + A.mT @ A)[0]
    ones = torch.eye(A.shape[2], dtype=A.dtype, device=A.device)
    L_inv = torch.linalg.solve_triangular(L, ones, upper=False)  # C⁻¹ itself would lose its small eigenvalues
    Y = A @ L_inv.mT @ L_inv
    for _ in range(REFINEMENTS):  # of CYᵀ = Aᵀ; the residual is that of products, not of C, which is rounded
        U = identity - A @ Y.mT
        Y = Y + (U.mT @ A - Y @ C_L) @ L_inv.mT @ L_inv
    U = identity - A @ Y.mT
    return U.mT @ U + Y @ C_L @ Y.mT, Y


def add_pi(
    grad_d: Tensor,
    heaviest: Tensor,
    d: Tensor,
    grad_logdet: Tensor,
    rows: Callable[[Tensor], Tensor],
    gram: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Adds grad_logdet π to grad_d [B, N] at the pixels that a kernel left out; nothing waits for the host.

    Args:
        heaviest: lists of the pixels [B, 1 + k], which begin with their number.
        rows: gives pₙ [B, k, R] in float64 of indices [B, k].
        gram: gives Pᵀ diag(ρ) P [B, R, R] of a precision ρ [B, N] for the items that are flagged [B], 0 for the others.
    """
    count, H = heaviest[:, :1], heaviest[:, 1:].long()
    listed = torch.arange(H.shape[1], device=H.device) < count
    H = torch.where(listed, H, H[:, :1])  # as if pixels were listed several times
    precision = d.to(torch.promote_types(d.dtype, torch.float32)).reciprocal()
    scale = precision.gather(1, H).double().mul_(listed).sqrt_()
    A = rows(H) * scale.unsqueeze(-1)
    rest = gram(precision.scatter_(1, H, 0), (count[:, 0] > 0).view(torch.uint8))
    pi = without_cancellation(A, rest)[0].diagonal(dim1=-2, dim2=-1) * scale.square()
    grad_d.scatter_add_(1, H, (grad_logdet.unsqueeze(1) * pi).to(grad_d.dtype))


def sum_of_few(P: Tensor, d: Tensor) -> Tensor:
    """Σₙ πₙ [B] of one d [B] and no more pixels than columns: P [B, N, R] in float64."""
    gram = P.new_zeros(len(P), P.shape[2], P.shape[2])
    precision, _ = without_cancellation(P * d.double().rsqrt()[:, None, None], gram)
    return precision.diagonal(dim1=-2, dim2=-1).sum(1) / d.double()
