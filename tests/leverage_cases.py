"""Factors with pixels of leverage near one, and what is exact of them from decimal arithmetic; no tests."""

import decimal
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGITS = decimal.Context(prec=80)
F64 = torch.float64


def _rows(spread: float, *counts: int) -> Tensor:
    """3 rows of size 7, then rows of size `spread`, of 8 columns."""
    return torch.cat([7 * torch.randn(3, 8, dtype=F64), *(spread * torch.randn(n, 8, dtype=F64) for n in counts)])


def _sparse() -> Tensor:
    P = torch.zeros(60, 4, dtype=F64)
    P[1:, 0], P[0, 1] = torch.randn(59, dtype=F64), 5
    return P


def _outlier() -> Tensor:
    P = torch.randn(60, 8, dtype=F64)
    P[0] *= 1e4
    return P


def _duplicates() -> Tensor:
    """Leverages just below a half and a fifth, where another pixel or four say the same."""
    P = _rows(0, 30)
    P[3:7], P[7] = P[0], P[1] * (1 + 1e-6 * torch.randn(8, dtype=F64))
    return P


def _one_plane() -> Tensor:
    """Three rows that add up to nothing, each of leverage two thirds, and one across."""
    angles = torch.arange(3, dtype=F64) * 2 * torch.pi / 3
    P = torch.zeros(20, 5, dtype=F64)
    P[:3] = 7 * (torch.stack([angles.cos(), angles.sin()], 1) @ torch.randn(2, 5, dtype=F64))
    P[3] = torch.randn(5, dtype=F64)
    return P


def _multiples() -> Tensor:
    """One row many times over, and two others: more heavy rows than 2R in fewer directions than R."""
    P = _rows(0, 30)
    P[3:] = P[0] * torch.randn(30, 1, dtype=F64)
    return P


def _four_directions() -> Tensor:
    P = torch.randn(40, 3, dtype=F64) @ torch.randn(3, 8, dtype=F64)
    P[0] = 7 * torch.randn(8, dtype=F64)
    return P


FACTORS = {
    "3 rows, 8 columns": lambda: _rows(0),
    "8 rows, 8 columns": lambda: torch.randn(8, 8, dtype=F64),
    "1 row, 1 column": lambda: torch.randn(1, 1, dtype=F64),
    "1 row, 2 columns": lambda: torch.randn(1, 2, dtype=F64),
    "7 rows, 8 columns": lambda: 7 * torch.randn(7, 8, dtype=F64),
    "12 rows, 9 of zeros": lambda: _rows(0, 9),
    "43 rows, 40 faint": lambda: _rows(1e-4, 40),
    "33 rows, fainter and fainter": lambda: torch.cat(
        [_rows(0), *(_rows(10.0**-i, 1)[3:] for i in range(6)), _rows(0, 20)]
    ),
    "duplicates": _duplicates,
    "one plane": _one_plane,
    "multiples": _multiples,
    "four directions": _four_directions,
    "an outlier": _outlier,
    "a column of one pixel": _sparse,
    "well conditioned": lambda: torch.randn(40, 3, dtype=F64),
}


def case(name: str, d: float, dtype: torch.dtype, one_d: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [N], P [N, R] and the diagonal [N or 1], between d and 2d."""
    P = FACTORS[name]()
    x = torch.randn(len(P), dtype=F64)
    diagonal = d * (1 + torch.rand(1 if one_d else len(P), dtype=F64))
    return x.to(dtype), P.to(dtype), diagonal.to(dtype)


class Exact(NamedTuple):
    pi: Tensor  # diag Σ⁻¹ [N]
    z: Tensor  # Σ⁻¹x [N]
    v: Tensor  # Pᵀz [R]
    SP: Tensor  # Σ⁻¹P [N, R]
    q: float  # xᵀΣ⁻¹x
    logdet: float  # log|Σ|


def exact(x: Tensor, P: Tensor, d: Tensor) -> Exact:
    """Of one item with μ = 0, by elimination with 80 digits."""
    with decimal.localcontext(DIGITS):
        p, diagonal, right = (_decimals(t.double()) for t in (P, d.expand(len(x)), x))
        N = len(p)
        A = p @ p.T + np.diag(diagonal)
        B = np.concatenate([_decimals(torch.eye(N)), right[:, None], p], 1)
        for k in range(N):
            others = [n for n in range(N) if n != k]
            factor = A[others, k] / A[k, k]
            A[others, k:] -= factor[:, None] * A[k, k:]
            B[others] -= factor[:, None] * B[k]
        B = B / np.diag(A)[:, None]
        z, logdet = B[:, N], sum(pivot.ln() for pivot in np.diag(A))
        pi, z_, v, SP = (torch.from_numpy(t.astype(float)) for t in (np.diag(B), z, z @ p, B[:, N + 1 :]))
        return Exact(pi, z_, v, SP, float(z @ right), float(logdet))


def _decimals(t: Tensor) -> np.ndarray:
    return np.vectorize(lambda v: decimal.Decimal(float(v)), otypes=[object])(t.numpy())
