"""R×R algebra in float64, the same for every kind of factor: C⁻¹, log|C|, and whether float32 was good enough for C."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# An item's C is made again with float64 products where rounding in float32 could move log|C| by more than this.
LOG_DET_TOLERANCE = 0.01  # nats

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
    """C⁻¹ and log|C| of float64 `C` [B, R, R]; NaN for an item where that fails, which means not finite."""
    L, info = torch.linalg.cholesky_ex(C)
    C_inv = torch.cholesky_inverse(L).contiguous()
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    failed = (info != 0) | ~torch.isfinite(log_det)
    return C_inv.masked_fill_(failed[:, None, None], math.nan), log_det.masked_fill_(failed, math.nan)


def factorise_lean(C: Tensor) -> tuple[Tensor, Tensor]:
    """`factorise` without the library's code for small C on the CPU.

    Small ones are swept (Gauss–Jordan, stable because C is positive definite) in ten small operations a column: the
    code of a library's factorisation alone takes 4 MB at its first use, a sixth of all that a step of a linear factor
    needs beside grad_F.
    """
    R = C.shape[-1]
    if R > SWEEP or C.device.type != "cpu":
        return factorise(C)
    A, pivots = C.clone(), C.new_empty(C.shape[:2])
    for k in range(R):
        pivot = pivots[:, k].copy_(A[:, k, k]).unsqueeze(1)
        column = A[:, :, k].clone()
        column[:, k] = 0
        A[:, :, k] = 0
        A[:, k, k] = 1
        row = A[:, k].div_(pivot)
        A.baddbmm_(column.unsqueeze(2), row.unsqueeze(1).clone(), alpha=-1)
    failed = ~((pivots > 0) & (pivots < math.inf)).all(1)
    A = 0.5 * (A + A.mT)
    return A.masked_fill_(failed[:, None, None], math.nan), pivots.log().sum(1).masked_fill_(failed, math.nan)


def too_rough(squares: Tensor, C_inv: Tensor, rounding: float) -> Tensor:
    """Whether rounding may have moved log|C| by more than LOG_DET_TOLERANCE, or C could not be factorised, [B].

    With |ΔCᵢⱼ| ≤ ε aᵢaⱼ, |tr C⁻¹ΔC| ≤ ε (Σⱼ aⱼ √C⁻¹ⱼⱼ)²; `squares` [B, R] are aⱼ² (Cⱼⱼ where products of P are summed)
    and `rounding` is ε. The root of Cⱼⱼ C⁻¹ⱼⱼ is that of the variance inflation factor of column j: 1 where it is
    orthogonal to the others and large where it is nearly a combination of them.
    """
    return exceeds(rounding * (squares * C_inv.diagonal(dim1=-2, dim2=-1)).sqrt().sum(-1).square())


def exceeds(moved: Tensor) -> Tensor:
    """Whether log|C| may be off by more than its tolerance; NaN counts."""
    return ~(moved <= LOG_DET_TOLERANCE)


def runs(wide: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.dtype]]:
    """Runs of neighbouring items with the dtype of their products: float64 where `wide`, else `dtype`."""
    flags = wide.tolist() if wide.device.type == "cpu" else [True] * len(wide)
    start = 0
    for i in range(1, len(flags) + 1):
        if i == len(flags) or flags[i] != flags[start]:
            yield slice(start, i), torch.float64 if flags[start] else dtype
            start = i


def last_step(q: Tensor, g: Tensor, v: Tensor, C_inv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q − gᵀC⁻¹g, v + C⁻¹g and C⁻¹g: the correction of q(v) [B, S] and v [B, S, R] by g = PᵀD⁻¹r − v."""
    step = g @ C_inv
    return q - (g * step).sum(-1), v + step, step


def sum_of_pi(d: Tensor, N: int, C_inv: Tensor) -> Tensor:
    """Σₙ πₙ = (N − R + tr C⁻¹)/d [B] for one d [B] of all N pixels, because PᵀD⁻¹P = C − I."""
    return (N - C_inv.shape[-1] + C_inv.diagonal(dim1=-2, dim2=-1).sum(-1)) / d.double()


def root(C_inv: Tensor) -> Tensor:
    """A [B, R, R] with AᵀA = C⁻¹."""
    L: Tensor
    L, info = torch.linalg.cholesky_ex(C_inv)
    if bool((info > 0).any()):  # not positive definite to the last bit, or not finite
        finite = torch.where((info > 0)[:, None, None] & torch.isfinite(C_inv), C_inv, torch.zeros_like(C_inv))
        values, vectors = torch.linalg.eigh(finite)
        L = torch.where((info > 0)[:, None, None], vectors * values.clamp_min(0).sqrt().unsqueeze(1) + 0 * C_inv, L)
    return L.mT


def posterior(gram: Tensor, w: Tensor, d: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L⁻ᵀ and C⁻¹w of C = I + gram = LLᵀ [B, R, R] and w [B, R, S], differentiable.

    Where `d` [B, 1] is one value for all pixels, gram and w are those of `fixed` d, and its gradient is made here: it
    is what cancellation leaves of much larger terms, and a sum over pixels in float32 would keep nothing of it.
    """
    if d is not None and d.shape[1] == 1:
        ratio = (d.detach() / d.double()).unsqueeze(-1)  # 1, with the gradient of 1/d
        gram, w = gram * ratio, w * ratio
    identity = torch.diag_embed(torch.ones_like(gram[..., 0]))
    L = torch.linalg.cholesky_ex(gram + identity)[0]
    return torch.linalg.solve_triangular(L.mT, identity, upper=True), torch.cholesky_solve(w, L)


def fixed(d: Tensor) -> Tensor:
    """d [..., N]; where it is one value, [..., 1], without its gradient, which `posterior` takes care of."""
    return d.detach() if d.shape[-1] == 1 else d
