r"""The R×R part, one program per item, in float64: log|C|, C⁻¹, v = C⁻¹w and whether float32 was good enough.

The partial sums of `capacitance` are added in their order and C is swept: step k, with pivot p = Cₖₖ and c = C[:, k],

    Cᵢⱼ ← Cᵢⱼ − cᵢcⱼ/p        Cᵢₖ, Cₖⱼ ← cᵢ/p, cⱼ/p        Cₖₖ ← −1/p

which is Gauss–Jordan elimination of a symmetric matrix: the pivots are the squared diagonal of the Cholesky factor,
so that log|C| = Σ log p and a pivot that is not positive says what it says there; and after R steps C is −C⁻¹, in the
registers that held C. A triangular factor would need a second matrix for the same inverse. C ⪰ I, so that no pivoting
is needed. For R > 64 the matrix lies in the output buffer and is swept there.

`wide` marks the items whose C is to be made again with float64 products: a pivot failed, or rounding in float32 may
have moved log|C| by more than LOG_DET_TOLERANCE. With |ΔCᵢⱼ| ≤ ε √(Cᵢᵢ Cⱼⱼ), |tr C⁻¹ΔC| ≤ ε (Σⱼ √(Cⱼⱼ C⁻¹ⱼⱼ))²; ε is
that of the products (`common.ROUNDING`).
An item whose float64 pivots fail is not finite, and NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aten import LOG_DET_TOLERANCE
from . import common


@triton.jit
def _sum_of_splits(C_ptr, rows, columns, SPLITS, R: tl.constexpr):
    """Rows [n, 1] of C − I, both sides of the diagonal."""
    where = tl.maximum(rows, columns) * R + tl.minimum(rows, columns)
    total = tl.zeros((rows.shape[0], columns.shape[1]), tl.float64)
    for _ in range(SPLITS):
        total += tl.load(C_ptr + where, mask=(rows < R) & (columns < R), other=0.0).to(tl.float64)
        C_ptr += R * R
    return total


@triton.jit
def solve_kernel(
    C_ptr,  # [B, SPLITS, R, R], the lower triangle of C − I
    w_ptr,  # [B, SPLITS, R]
    logdet_D_ptr,  # [B, SPLITS]
    d_ptr,  # [B, 1] if SCALAR_D
    C_inv_ptr,  # [B, R, R]
    v_ptr,  # [B, R]
    logdet_ptr,  # [B], log|Σ|
    wide_ptr,  # [B]
    N,
    SPLITS,
    stride_db,
    rounding,
    tolerance,
    R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    WITH_W: tl.constexpr,
    FINAL: tl.constexpr,
    FLAGGED: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(wide_ptr + b) == 0:
            return
    C_ptr += b * SPLITS * R * R
    C_inv_ptr += b * R * R
    offs = tl.arange(0, BLOCK_R)
    positive = tl.full((), 1, tl.int32)
    log_det = tl.zeros((), tl.float64)
    v = tl.zeros((BLOCK_R,), tl.float64)
    w = tl.zeros((BLOCK_R,), tl.float64)
    if WITH_W:
        for s in range(SPLITS):
            w += tl.load(w_ptr + (b * SPLITS + s) * R + offs, mask=offs < R, other=0.0).to(tl.float64)
    if IN_MEMORY:
        # The same sweep, some rows at a time; what the threads of a program wrote is visible after a barrier.
        columns = offs[None, :]
        for i in range(0, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            row = _sum_of_splits(C_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
            tl.store(C_inv_ptr + rows * R + columns, row, mask=(rows < R) & (columns < R))
        tl.debug_barrier()
        diagonal = tl.load(C_inv_ptr + offs * R + offs, mask=offs < R, other=0.0)
        for k in range(R):
            p = tl.load(C_inv_ptr + k * R + k)
            positive = tl.where((p > 0) & (p < float("inf")), positive, 0)
            log_det += tl.log(p)
            root = tl.rsqrt(p)
            c = tl.load(C_inv_ptr + k * R + offs, mask=offs < R, other=0.0) * root
            for i in range(0, R, BLOCK_ROWS):
                rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
                mask = (rows < R) & (columns < R)
                c_i = tl.load(C_inv_ptr + k * R + rows, mask=rows < R, other=0.0) * root
                C = tl.load(C_inv_ptr + rows * R + columns, mask=mask, other=0.0) - c_i * c[None, :]
                C = tl.where(columns == k, c_i * root, C)
                tl.store(C_inv_ptr + rows * R + columns, C, mask=mask & (rows != k))
            tl.debug_barrier()  # row k, which every row above was made with, comes last
            tl.store(C_inv_ptr + k * R + offs, tl.where(offs == k, -root * root, c * root), mask=offs < R)
            tl.debug_barrier()
        ok = positive > 0
        inverse = -tl.load(C_inv_ptr + offs * R + offs, mask=offs < R, other=0.0)
        tl.debug_barrier()
        for i in range(0, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            mask = (rows < R) & (columns < R)
            C = -tl.load(C_inv_ptr + rows * R + columns, mask=mask, other=0.0)
            if FINAL:
                C = tl.where(ok, C, float("nan"))
            tl.store(C_inv_ptr + rows * R + columns, C, mask=mask)
            v_i = tl.sum(tl.where(mask, C, 0.0) * w[None, :], 1)
            v += tl.sum(tl.where(rows == columns, v_i[:, None], 0.0), 0)
    else:
        rows = offs[:, None]
        columns = offs[None, :]
        mask = (rows < R) & (columns < R)
        C = _sum_of_splits(C_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
        diagonal = tl.sum(tl.where(rows == columns, C, 0.0), 1)
        for k in range(R):
            # The same numbers twice, once for each way a vector can lie across the threads.
            c = tl.sum(tl.where(columns == k, C, 0.0), 1)
            c_row = tl.sum(tl.where(rows == k, C, 0.0), 0)
            p = tl.sum(tl.where(offs == k, c, 0.0), 0)
            positive = tl.where((p > 0) & (p < float("inf")), positive, 0)
            log_det += tl.log(p)
            root = tl.rsqrt(p)
            c = c * root
            c_row = c_row * root
            C = C - c[:, None] * c_row[None, :]
            C = tl.where(columns == k, (c * root)[:, None], C)
            C = tl.where(rows == k, (c_row * root)[None, :], C)
            C = tl.where((rows == k) & (columns == k), -root * root, C)
        ok = positive > 0
        C = -C
        inverse = tl.sum(tl.where(rows == columns, C, 0.0), 1)
        if FINAL:
            C = tl.where(ok, C, float("nan"))
        tl.store(C_inv_ptr + rows * R + columns, C, mask=mask)
        w_row = tl.sum(tl.where(rows == columns, w[:, None], 0.0), 0)
        v = tl.sum(C * w_row[None, :], 1)
    if SCALAR_D:
        log_det += N * tl.log(tl.load(d_ptr + b * stride_db).to(tl.float64))
    else:
        for s in range(SPLITS):
            log_det += tl.load(logdet_D_ptr + b * SPLITS + s)
    if FINAL:
        log_det = tl.where(ok, log_det, float("nan"))
    tl.store(logdet_ptr + b, log_det)
    if WITH_W:
        tl.store(v_ptr + b * R + offs, v, mask=offs < R)
    if not FINAL:
        inflation = tl.sum(tl.sqrt(tl.where((offs < R) & ok, diagonal * inverse, 0.0)), 0)
        moved = rounding * inflation * inflation
        tl.store(wide_ptr + b, tl.where(ok & (moved <= tolerance), 0, 1).to(tl.uint8))


@triton.jit
def gram_kernel(
    C_part_ptr,  # [B, SPLITS, R, R], the lower triangle of C − I
    C_ptr,  # [B, R, R]
    flag_ptr,  # [B]
    SPLITS,
    R: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """C itself, both triangles."""
    b = (tl.program_id(0) // R).to(tl.int64)
    i = tl.program_id(0) % R + tl.arange(0, 1)[:, None]
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    columns = tl.arange(0, BLOCK_R)[None, :]
    row = _sum_of_splits(C_part_ptr + b * SPLITS * R * R, i, columns, SPLITS, R) + (i == columns).to(tl.float64)
    tl.store(C_ptr + (b * R + i) * R + columns, row, mask=columns < R)


@triton.jit
def refine_kernel(
    g_ptr,  # [S, B, SPLITS, R], partial sums of PᵀD⁻¹r
    q_part_ptr,  # [S, B, SPLITS], partial sums of rᵀD⁻¹r
    C_inv_ptr,  # [B, R, R]
    v_ptr,  # [S, B, R], read unless FIRST; written
    q_ptr,  # [S, B], written unless FIRST
    B,
    SPLITS,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """v = C⁻¹w if FIRST; else g = PᵀD⁻¹r − v, q = rᵀD⁻¹r + vᵀv − gᵀC⁻¹g and v ← v + C⁻¹g."""
    pid = tl.program_id(0).to(tl.int64)  # s·B + b
    C_inv_ptr += (pid % B) * R * R
    offs = tl.arange(0, BLOCK_R)
    mask = offs < R
    g = tl.zeros((BLOCK_R,), tl.float64)
    q = tl.zeros((), tl.float64)
    for s in range(SPLITS):
        g += tl.load(g_ptr + (pid * SPLITS + s) * R + offs, mask=mask, other=0.0)
        if not FIRST:
            q += tl.load(q_part_ptr + pid * SPLITS + s)
    if not FIRST:
        v = tl.load(v_ptr + pid * R + offs, mask=mask, other=0.0)
        q += tl.sum(v * v, 0)
        g -= v
    tl.debug_barrier()  # all of v is read before any of it is written
    for start in range(0, R, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = (rows < R)[:, None] & mask[None, :]
        step = tl.sum(tl.load(C_inv_ptr + rows[:, None] * R + offs[None, :], mask=inside, other=0.0) * g[None, :], 1)
        if not FIRST:
            own = tl.sum(tl.where(rows[:, None] == offs[None, :], g[None, :], 0.0), 1)
            q -= tl.sum(own * step, 0)
            step += tl.sum(tl.where(rows[:, None] == offs[None, :], v[None, :], 0.0), 1)
        tl.store(v_ptr + pid * R + rows, step, mask=rows < R)
    if not FIRST:
        tl.store(q_ptr + pid, q)


# The widest padded rank that is swept in registers, 16 float64 values of C in each of 256 lanes (32 in each of 128 do
# spill on sm_100): with 128 rows they spill at 8 and at 16 warps.
REGISTERS_R = 64
# Values of C that a program has in hand at a time where it sweeps in memory: four per lane; eight spill.
IN_HAND = 1024


def solve(
    parts: tuple[Tensor, Tensor, Tensor],
    d: Tensor,
    N: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    with_w: bool,
    final: bool,
    flagged: bool,
    rounding: float = 0.0,
) -> None:
    """Fills `out` = C⁻¹ [B, R, R], v [1, B, R], log|Σ| [B], wide [B], from the partial sums of `capacitance`."""
    (C, w, logdet_D), (C_inv, v, logdet, wide) = parts, out
    R = C.shape[-1]
    block_r = common.padded_rank(R)
    in_memory = block_r > REGISTERS_R
    common.launch(
        solve_kernel,
        (C.shape[0],),
        8 if block_r >= REGISTERS_R else 4,
        C_ptr=C,
        w_ptr=w,
        logdet_D_ptr=logdet_D,
        d_ptr=d,
        C_inv_ptr=C_inv,
        v_ptr=v,
        logdet_ptr=logdet,
        wide_ptr=wide.view(torch.uint8),
        N=N,
        SPLITS=C.shape[1],
        stride_db=d.stride(0),
        rounding=rounding,
        tolerance=LOG_DET_TOLERANCE,
        R=R,
        SCALAR_D=d.shape[1] == 1,
        WITH_W=with_w,
        FINAL=final,
        FLAGGED=flagged,
        IN_MEMORY=in_memory,
        BLOCK_R=block_r,
        BLOCK_ROWS=max(1, IN_HAND // block_r) if in_memory else 16,
    )


def whole(C_part: Tensor, C: Tensor, flags: Tensor | None) -> None:
    """C [B, R, R] in float64 from partial sums; with `flags` only of the items whose flag is set."""
    B, splits, R = C_part.shape[:3]
    common.launch(
        gram_kernel,
        (B * R,),
        1,
        C_part_ptr=C_part,
        C_ptr=C,
        flag_ptr=flags if flags is not None else C,
        SPLITS=splits,
        R=R,
        FLAGGED=flags is not None,
        BLOCK_R=common.padded_rank(R),
    )


def refine(g: Tensor, q_part: Tensor, C_inv: Tensor, v: Tensor, q: Tensor, first: bool) -> None:
    """v = C⁻¹w [S, B, R] if `first`, else q [S, B] and the refined v, in place."""
    S, B, splits, R = g.shape
    block_r = common.padded_rank(R)
    common.launch(
        refine_kernel,
        (S * B,),
        1 if block_r <= 32 else 4,
        g_ptr=g,
        q_part_ptr=q_part,
        C_inv_ptr=C_inv,
        v_ptr=v,
        q_ptr=q,
        B=B,
        SPLITS=splits,
        R=R,
        FIRST=first,
        BLOCK_R=block_r,
        BLOCK_ROWS=max(1, min(16, 2 * IN_HAND // block_r)),
    )


__all__ = ["refine", "solve", "whole"]
