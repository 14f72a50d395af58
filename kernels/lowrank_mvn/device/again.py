r"""The R×R part of items whose C float32, or float64, was not good enough for: a better L⁻¹, in float64.

`capacitance` adds up L⁻¹PᵀD⁻¹PL⁻ᵀ, with the L⁻¹ that `solve` found and products of rows of D^(−½)PL⁻ᵀ in float64. Then

    C₂ = L⁻¹L⁻ᵀ + L⁻¹PᵀD⁻¹PL⁻ᵀ = L₂L₂ᵀ        L⁻¹ ← L₂⁻¹L⁻¹        v = L⁻ᵀL₂⁻¹(L⁻¹w)

C₂ is I but for the errors of the first L⁻¹: what is small in C beside its largest values, and was lost in them, is not
small there (`capacitance.improve`). One program does one flagged item, in memory, where C₂ takes the place of the first
of its partial sums. It is rarely run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .solve import IN_HAND, eliminate_in_memory, of_diagonal, sum_of_splits


@triton.jit
def again_kernel(
    gram_ptr,  # [B, SPLITS, R, R], the lower triangle of C₂ − L⁻¹L⁻ᵀ; the first is written
    w_ptr,  # [B, SPLITS, R] of L⁻¹w, or none
    logdet_D_ptr,  # [B, SPLITS], not read if ONE_D
    d_at,  # [B, 1], read if ONE_D
    L_inv_ptr,  # [B, R, R]
    v_ptr,  # [B, R], written if there is w
    logdet_ptr,  # [B]
    flag_ptr,  # [B]
    N,
    SPLITS,
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """L⁻¹ ← L₂⁻¹L⁻¹ with C₂ = L⁻¹L⁻ᵀ + gram = L₂L₂ᵀ, v = L⁻ᵀL₂⁻¹(L⁻¹w) and log|Σ| = −2 Σ log diag L⁻¹ + log|D|."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(flag_ptr + b) == 0:
        return
    C_ptr = gram_ptr + b * SPLITS * R * R
    L_inv_ptr += b * R * R
    offs = tl.arange(0, BLOCK_R)
    columns = offs[None, :]
    for i in range(0, R, BLOCK_ROWS):
        rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
        C = sum_of_splits(C_ptr, rows, columns, SPLITS, R)
        for k in range(R):
            row = tl.load(L_inv_ptr + rows * R + k, mask=rows < R, other=0.0)
            C += row * tl.load(L_inv_ptr + columns * R + k, mask=columns < R, other=0.0)
        tl.debug_barrier()  # what other threads write here has been read
        tl.store(C_ptr + rows * R + columns, C, mask=(rows < R) & (columns < R))
        tl.debug_barrier()
    _, finite, _ = eliminate_in_memory(C_ptr, 2.2204460492503131e-16 * R, R, BLOCK_R, BLOCK_ROWS)
    w = tl.zeros((BLOCK_R,), tl.float64)
    v = tl.zeros((BLOCK_R,), tl.float64)
    if w_ptr is not None:
        for s in range(SPLITS):
            w += tl.load(w_ptr + (b * SPLITS + s) * R + offs, mask=offs < R, other=0.0).to(tl.float64)
    for j in range(0, R, BLOCK_ROWS):  # from the last row to the first, which the others are made of
        rows = ((R - 1) // BLOCK_ROWS * BLOCK_ROWS - j + tl.arange(0, BLOCK_ROWS))[:, None]
        L_inv = tl.zeros((BLOCK_ROWS, BLOCK_R), tl.float64)
        half = tl.zeros((BLOCK_ROWS, 1), tl.float64)
        for k in range(R):
            row = tl.load(C_ptr + rows * R + k, mask=rows < R, other=0.0)
            L_inv += row * tl.load(L_inv_ptr + k * R + columns, mask=columns < R, other=0.0)
            half += row * tl.sum(tl.where(offs == k, w, 0.0), 0)
        v += tl.sum(L_inv * half, 0)
        tl.debug_barrier()
        tl.store(L_inv_ptr + rows * R + columns, L_inv, mask=(rows < R) & (columns < R))
        tl.debug_barrier()
    diagonal = tl.load(L_inv_ptr + offs * R + offs, mask=offs < R, other=1.0)
    log_det = of_diagonal(-2.0 * tl.sum(tl.log(diagonal), 0), logdet_D_ptr, d_at, b, N, SPLITS, ONE_D)
    ok = (finite > 0) & (log_det - log_det == 0)
    for i in range(0, R, BLOCK_ROWS):
        rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
        tl.store(L_inv_ptr + rows * R + columns, float("nan"), mask=(rows < R) & (columns < R) & (ok == 0))
    tl.store(logdet_ptr + b, tl.where(ok, log_det, float("nan")))
    if w_ptr is not None:
        tl.store(v_ptr + b * R + offs, tl.where(ok, v, float("nan")), mask=offs < R)


def again(
    parts: tuple[Tensor, Tensor | None, Tensor | None],
    d: Tensor,
    N: int,
    out: tuple[Tensor, Tensor | None, Tensor],
    flags: Tensor,
) -> None:
    """Makes `out` = L⁻¹ [B, R, R], v [1, B, R] (if there is w) and log|Σ| [B] anew for the flagged items [B].

    `parts` are partial sums of `capacitance` in float64 with rows of P times that L⁻¹; those of C are overwritten.
    """
    (gram, w, logdet_D), (L_inv, v, logdet) = parts, out
    assert gram.dtype == torch.float64
    R = gram.shape[-1]
    block_r = launch.padded_rank(R)
    launch.launch(
        again_kernel,
        (gram.shape[0],),
        8 if block_r >= 64 else 4,
        gram_ptr=gram,
        w_ptr=w,
        logdet_D_ptr=logdet_D,
        d_at=launch.at(d),
        L_inv_ptr=L_inv,
        v_ptr=v,
        logdet_ptr=logdet,
        flag_ptr=flags,
        N=N,
        SPLITS=gram.shape[1],
        R=R,
        ONE_D=d.shape[1] == 1,
        BLOCK_R=block_r,
        BLOCK_ROWS=max(1, min(16, IN_HAND // block_r)),
    )


__all__ = ["again"]
