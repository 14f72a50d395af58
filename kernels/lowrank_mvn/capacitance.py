"""R×R algebra in float64, the same for every kind of factor: L⁻¹ of C = LLᵀ, log|C|, and how good C had to be made."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .registry import recorded, transformed

# An item's C is made again with float64 products where rounding in float32 could move log|C| by more than this.
LOG_DET_TOLERANCE = 0.01  # nats

EPS = torch.finfo(torch.float64).eps
# The largest ε Cⱼⱼ C⁻¹ⱼⱼ of a C that is made of P itself in float64, for results in that dtype.
GOOD_ENOUGH = {torch.float64: 1e-8, torch.float32: 1e-5}
# How often a C that is not is made of PL⁻ᵀ instead: each time squares what is left of the error.
ROUNDS = 3

# Up to so many columns `factorise_lean` is a loop over them in torch's operators.
SWEEP = 32


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is, float32 otherwise: half precision is an input format, not one to compute in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def with_identity(gram: Tensor) -> Tensor:
    """C = I + PᵀD⁻¹P of PᵀD⁻¹P [B, R, R]."""
    C = gram.clone()
    C.diagonal(dim1=-2, dim2=-1).add_(1)
    return C


def factorise(C: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ and log|C| of C = LLᵀ, float64 [B, R, R]; NaN for an item that is not finite.

    L⁻¹ keeps what is small beside the largest eigenvalue of C⁻¹, which an explicit C⁻¹ does not (README.md). Where
    rounding has left C indefinite, R units in the last place of its diagonal are added to it: the factor of a finite C
    is finite, and `wide` or `inexact` says that it is no more than a start.
    """
    L, failed = _cholesky(C)
    if C.device.type != "cpu" or bool(failed.any()):
        shifted, lost = _cholesky(C + torch.diag_embed(noise(C)))
        L, failed = torch.where(failed[:, None, None], shifted, L), failed & lost
    L_inv = torch.linalg.solve_triangular(L, torch.eye(C.shape[-1], dtype=C.dtype, device=C.device), upper=False)
    log_det = log_det_of(L_inv)
    failed |= ~torch.isfinite(log_det)
    return L_inv.contiguous().masked_fill_(failed[:, None, None], math.nan), log_det.masked_fill_(failed, math.nan)


def _cholesky(C: Tensor) -> tuple[Tensor, Tensor]:
    """L, and which items have none."""
    L, info = torch.linalg.cholesky_ex(C)
    return L, info != 0


def noise(C: Tensor) -> Tensor:
    """What rounding may leave of a pivot of C, [B, R]."""
    return C.shape[-1] * EPS * C.diagonal(dim1=-2, dim2=-1)


def factorise_lean(C: Tensor) -> tuple[Tensor, Tensor]:
    """`factorise` without the library's code for small C on the CPU.

    Small ones are eliminated in eight small operations a column: the code of a library's factorisation alone takes 4 MB
    at its first use, a sixth of all that a step of a linear factor needs beside grad_F.
    """
    R = C.shape[-1]
    if R > SWEEP or C.device.type != "cpu":
        return factorise(C)
    A, pivots, least = C.clone(), C.new_empty(C.shape[:2]), noise(C)
    for k in range(R):  # below row k is what is left of C, and left of column k the rows of the unit factor's inverse
        pivot = torch.maximum(A[:, k, k], least[:, k], out=pivots[:, k]).unsqueeze(1)
        row = A[:, k].clone()
        row[:, k] = 1
        factor = A[:, k, k + 1 :] / pivot
        A[:, k, k] = 1
        A[:, k, k + 1 :] = 0
        A[:, k + 1 :, k] = 0
        A[:, k + 1 :].baddbmm_(factor.unsqueeze(2), row.unsqueeze(1), alpha=-1)
    failed = ~torch.isfinite(pivots).all(1)
    L_inv = A.mul_(pivots.rsqrt().unsqueeze(2))
    return L_inv.masked_fill_(failed[:, None, None], math.nan), pivots.log().sum(1).masked_fill_(failed, math.nan)


def log_det_of(L_inv: Tensor) -> Tensor:
    """log|C| [B]."""
    return -2 * L_inv.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inverse(L_inv: Tensor) -> Tensor:
    """C⁻¹ [B, R, R]; where rows of P outweigh others, what is small in it is noise."""
    return L_inv.mT @ L_inv


def inverse_diagonal(L_inv: Tensor) -> Tensor:
    """diag C⁻¹ [B, R]."""
    return L_inv.square().sum(-2)


def applied(L_inv: Tensor, w: Tensor) -> Tensor:
    """C⁻¹w [B, S, R] of `w` [B, S, R]."""
    return (w @ L_inv.mT) @ L_inv


def too_rough(squares: Tensor, L_inv: Tensor, rounding: float) -> Tensor:
    """Whether rounding may have moved log|C| by more than LOG_DET_TOLERANCE, or C could not be factorised, [B].

    With |ΔCᵢⱼ| ≤ ε aᵢaⱼ, |tr C⁻¹ΔC| ≤ ε (Σⱼ aⱼ √C⁻¹ⱼⱼ)²; `squares` [B, R] are aⱼ² (Cⱼⱼ where products of P are summed)
    and `rounding` is ε. The root of Cⱼⱼ C⁻¹ⱼⱼ is that of the variance inflation factor of column j: 1 where it is
    orthogonal to the others and large where it is nearly a combination of them.
    """
    return exceeds(rounding * (squares * inverse_diagonal(L_inv)).sqrt().sum(-1).square())


def exceeds(moved: Tensor) -> Tensor:
    """Whether log|C| may be off by more than its tolerance; NaN counts."""
    return ~(moved <= LOG_DET_TOLERANCE)


def spans(flags: Tensor) -> Iterator[tuple[slice, bool]]:
    """Runs of neighbouring items with the same flag; on other devices than the CPU all items, as if flagged."""
    values = flags.tolist() if flags.device.type == "cpu" else [True] * len(flags)
    start = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[start]:
            yield slice(start, i), values[start]
            start = i


def runs(wide: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.dtype]]:
    """Runs of neighbouring items with the dtype of their products: float64 where `wide`, else `dtype`."""
    for items, flag in spans(wide):
        yield items, torch.float64 if flag else dtype


def last_step(q: Tensor, g: Tensor, v: Tensor, L_inv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q − gᵀC⁻¹g, v + C⁻¹g and C⁻¹g: the correction of q(v) [B, S] and v [B, S, R] by g = PᵀD⁻¹r − v."""
    half = g @ L_inv.mT
    step = half @ L_inv
    return q - half.square().sum(-1), v + step, step


def sum_of_pi(d: Tensor, N: int, L_inv: Tensor) -> Tensor:
    """Σₙ πₙ = (N − R + tr C⁻¹)/d [B] for one d [B] of all N pixels, because PᵀD⁻¹P = C − I."""
    return (N - L_inv.shape[-1] + L_inv.square().sum((-2, -1))) / d.double()


def inexact(squares: Tensor, L_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether C made in float64 is not good enough for results in `dtype`, [B]; NaN does not count.

    Rounding moves C⁻¹pₙ by some ten times ε Cⱼⱼ C⁻¹ⱼⱼ of itself.
    """
    return EPS * (squares * inverse_diagonal(L_inv)).amax(-1) > GOOD_ENOUGH[dtype]


def improve(
    L_inv: Tensor,
    log_det: Tensor,
    C: Tensor,
    wide: Tensor,
    dtype: torch.dtype,
    again: Callable[[slice], Tensor],
) -> None:
    """Makes L⁻¹ and log|C| better, in place, for the `wide` items whose C, made in float64, is not enough for `dtype`.

    `again` gives L⁻¹PᵀD⁻¹PL⁻ᵀ of a run of items with the present L⁻¹, from products of rows D^(−½)PL⁻ᵀ. What is small
    in C is not small there: C₂ = L⁻¹L⁻ᵀ + L⁻¹PᵀD⁻¹PL⁻ᵀ = L₂L₂ᵀ is I but for the errors of L⁻¹, and L₂⁻¹L⁻¹ is better.
    (The second round of Cholesky-QR of D^(−½)P stacked on I; Fukaya et al., 2020.) On other devices than the CPU every
    item is made so, once: no decision waits there.
    """
    here = C.device.type == "cpu"
    doubtful = wide & inexact(C.diagonal(dim1=-2, dim2=-1), L_inv, dtype) if here else wide.clone()
    for _ in range(ROUNDS if here else 1):
        if here and not bool(doubtful.any()):
            return
        for items, flag in spans(doubtful):
            if flag:
                C2 = torch.baddbmm(again(items), L_inv[items], L_inv[items].mT)
                step, _ = factorise(C2)
                L_inv[items] = step @ L_inv[items]
                log_det[items] = log_det_of(L_inv[items])
                doubtful[items] = inexact(C2.diagonal(dim1=-2, dim2=-1), step, dtype)


def posterior(
    gram: Tensor,
    w: Tensor,
    d: Tensor | None = None,
    exactly: Callable[[], tuple[Tensor, Tensor]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """L⁻ᵀ and C⁻¹w of C = I + gram = LLᵀ [B, R, R] and w [B, R, S], differentiable.

    Where `d` [B, 1] is one value for all pixels, gram and w are those of `fixed` d, and its gradient is made here: it
    is what cancellation leaves of much larger terms, and a sum over pixels in float32 would keep nothing of it.

    `exactly` gives L⁻¹ and C⁻¹w [S, B, R] as a density has them, from two more passes over P. They take the place of
    what gram and w give where that is not enough for `dtype`: on the CPU, and where a program may look at values.
    """
    if d is not None and d.shape[1] == 1:
        ratio = (d.detach() / d.double()).unsqueeze(-1)  # 1, with the gradient of 1/d
        gram, w = gram * ratio, w * ratio
    identity = torch.diag_embed(torch.ones_like(gram[..., 0]))
    C = gram + identity
    L, info = torch.linalg.cholesky_ex(C)
    looks = type(C) is Tensor and C.device.type == "cpu"
    looks = looks and not (torch.compiler.is_compiling() or transformed() or recorded())
    if looks and bool((info != 0).any()):
        L, _ = torch.linalg.cholesky_ex(C + torch.diag_embed(noise(C.detach())))
    L_inv_t, v = torch.linalg.solve_triangular(L.mT, identity, upper=True), torch.cholesky_solve(w, L)
    if exactly is None or not looks:
        return L_inv_t, v
    squares = C.detach().diagonal(dim1=-2, dim2=-1)
    if not bool(inexact(squares, L_inv_t.detach().mT, dtype).any()):
        return L_inv_t, v
    exact_L_inv, exact_v = exactly()
    return replaced(L_inv_t, exact_L_inv.mT), replaced(v, exact_v.permute(1, 2, 0))


def replaced(t: Tensor, value: Tensor) -> Tensor:
    """`value`, with the derivatives of `t`."""
    return t - t.detach() + value.detach()


def fixed(d: Tensor) -> Tensor:
    """d [..., N]; where it is one value, [..., 1], without its gradient, which `posterior` takes care of."""
    return d.detach() if d.shape[-1] == 1 else d
