r"""The R×R part, one program per item, in float64: log|C|, C⁻¹, v = C⁻¹w and whether float32 was good enough.

The partial sums of `capacitance` are added in their order and C is swept: step k, with pivot p = Cₖₖ and c = C[:, k],

    Cᵢⱼ ← Cᵢⱼ − cᵢcⱼ/p        Cᵢₖ, Cₖⱼ ← cᵢ/p, cⱼ/p        Cₖₖ ← −1/p

which is Gauss–Jordan elimination of a symmetric matrix: the pivots are the squared diagonal of the Cholesky factor,
so that log|C| = Σ log p and a pivot that is not positive says what it says there; and after R steps C is −C⁻¹, in the
registers that held C. A triangular factor would need a second matrix for the same inverse. C ⪰ I, so that no pivoting
is needed. For R > 64 the matrix lies in the output buffer and is swept there.

`wide` marks the items whose C is to be made again with float64 products: a pivot failed, or rounding in float32 may
have moved log|C| by more than LOG_DET_TOLERANCE. The test is that of `capacitance.too_rough`, which has the bound; it
stands here again because C is in registers here, and nowhere else.
An item whose float64 pivots fail is not finite, and NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacitance import LOG_DET_TOLERANCE
from . import launch

# The widest padded rank that is swept in registers, 16 float64 values of C in each of 256 lanes (32 in each of 128 do
# spill on sm_100): with 128 rows they spill at 8 and at 16 warps.
REGISTERS_R = tl.constexpr(64)
# Values of C that a program has in hand at a time where it sweeps in memory: four per lane; eight spill.
IN_HAND = 1024


@triton.jit
def _sum_of_splits(gram_ptr, rows, columns, SPLITS, R: tl.constexpr):
    """Rows [n, 1] of C − I, both sides of the diagonal."""
    where = tl.maximum(rows, columns) * R + tl.minimum(rows, columns)
    total = tl.zeros((rows.shape[0], columns.shape[1]), tl.float64)
    for _ in range(SPLITS):
        total += tl.load(gram_ptr + where, mask=(rows < R) & (columns < R), other=0.0).to(tl.float64)
        gram_ptr += R * R
    return total


@triton.jit
def _pivot(p, log_det, positive):
    """1/√p, and what a pivot p adds to log|C| and to the test of all pivots."""
    positive = tl.where((p > 0) & (p < float("inf")), positive, 0)
    log_det += tl.log(p)
    root = tl.rsqrt(p)
    return root, log_det, positive


@triton.jit
def _swept(C, c, c_row, root, rows, columns, k):
    """Step k of the sweep on some rows of C; c and c_row are column k at these rows, and row k, over √p = 1 / root."""
    C = C - c * c_row
    C = tl.where(columns == k, c * root, C)
    C = tl.where(rows == k, c_row * root, C)
    return tl.where((rows == k) & (columns == k), -root * root, C)


@triton.jit
def _sweep_in_registers(gram_ptr, SPLITS, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """−C⁻¹, log|C|, whether the pivots are positive, and the diagonal of C."""
    offs = tl.arange(0, BLOCK_R)
    rows = offs[:, None]
    columns = offs[None, :]
    C = _sum_of_splits(gram_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
    diagonal = tl.sum(tl.where(rows == columns, C, 0.0), 1)
    log_det = tl.zeros((), tl.float64)
    positive = tl.full((), 1, tl.int32)
    for k in range(R):
        # The same numbers twice, once for each way a vector can lie across the threads.
        c = tl.sum(tl.where(columns == k, C, 0.0), 1)
        c_row = tl.sum(tl.where(rows == k, C, 0.0), 0)
        p = tl.sum(tl.where(offs == k, c, 0.0), 0)
        root, log_det, positive = _pivot(p, log_det, positive)
        C = _swept(C, (c * root)[:, None], (c_row * root)[None, :], root, rows, columns, k)
    return C, log_det, positive, diagonal


@triton.jit
def _sweep_in_memory(C_ptr, gram_ptr, SPLITS, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Likewise, but −C⁻¹ takes the place of C, which is put there first.

    Some rows at a time; what the threads of a program wrote is visible after a barrier.
    """
    offs = tl.arange(0, BLOCK_R)
    columns = offs[None, :]
    for i in range(0, R, BLOCK_ROWS):
        rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
        row = _sum_of_splits(gram_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
        tl.store(C_ptr + rows * R + columns, row, mask=(rows < R) & (columns < R))
    tl.debug_barrier()
    diagonal = tl.load(C_ptr + offs * R + offs, mask=offs < R, other=0.0)
    log_det = tl.zeros((), tl.float64)
    positive = tl.full((), 1, tl.int32)
    for k in range(R):
        root, log_det, positive = _pivot(tl.load(C_ptr + k * R + k), log_det, positive)
        c_row = tl.load(C_ptr + k * R + columns, mask=columns < R, other=0.0) * root
        for i in range(0, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            mask = (rows < R) & (columns < R)
            c = tl.load(C_ptr + k * R + rows, mask=rows < R, other=0.0) * root
            C = tl.load(C_ptr + rows * R + columns, mask=mask, other=0.0)
            tl.store(C_ptr + rows * R + columns, _swept(C, c, c_row, root, rows, columns, k), mask=mask & (rows != k))
        tl.debug_barrier()  # row k, which every row above was made with, comes last
        row = tl.where(columns == k, -root * root, c_row * root)
        tl.store(C_ptr + k * R + columns, row, mask=columns < R)
        tl.debug_barrier()
    return log_det, positive, diagonal


@triton.jit
def solve_kernel(
    gram_ptr,  # [B, SPLITS, R, R], the lower triangle of C − I
    w_ptr,  # [B, SPLITS, R], or none
    logdet_D_ptr,  # [B, SPLITS], not read if ONE_D
    d_at,  # [B, 1], read if ONE_D
    C_inv_ptr,  # [B, R, R]
    v_ptr,  # [B, R], written if there is w
    logdet_ptr,  # [B]
    wide_ptr,  # [B], read if FLAGGED; written unless FINAL
    N,
    SPLITS,
    rounding,
    tolerance,
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    FINAL: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """C⁻¹, v = C⁻¹w, log|Σ| = Σ log p + log|D|, and whether ε(Σⱼ √(Cⱼⱼ C⁻¹ⱼⱼ))² exceeds the tolerance."""
    b = tl.program_id(0).to(tl.int64)
    if FLAGGED:  # noqa: SIM102  (decided when compiling)
        if tl.load(wide_ptr + b) == 0:
            return
    gram_ptr += b * SPLITS * R * R
    C_inv_ptr += b * R * R
    offs = tl.arange(0, BLOCK_R)
    v = tl.zeros((BLOCK_R,), tl.float64)
    w = tl.zeros((BLOCK_R,), tl.float64)
    if w_ptr is not None:
        for s in range(SPLITS):
            w += tl.load(w_ptr + (b * SPLITS + s) * R + offs, mask=offs < R, other=0.0).to(tl.float64)
    if BLOCK_R > REGISTERS_R:
        log_det, positive, diagonal = _sweep_in_memory(C_inv_ptr, gram_ptr, SPLITS, R, BLOCK_R, BLOCK_ROWS)
        ok = positive > 0
        columns = offs[None, :]
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
        C, log_det, positive, diagonal = _sweep_in_registers(gram_ptr, SPLITS, R, BLOCK_R)
        ok = positive > 0
        C = -C
        inverse = tl.sum(tl.where(rows == columns, C, 0.0), 1)
        if FINAL:
            C = tl.where(ok, C, float("nan"))
        tl.store(C_inv_ptr + rows * R + columns, C, mask=(rows < R) & (columns < R))
        w_row = tl.sum(tl.where(rows == columns, w[:, None], 0.0), 0)
        v = tl.sum(C * w_row[None, :], 1)
    if ONE_D:
        log_det += N * tl.log(tl.load(d_at[0] + b * d_at[1]).to(tl.float64))
    else:
        for s in range(SPLITS):
            log_det += tl.load(logdet_D_ptr + b * SPLITS + s)
    if FINAL:
        log_det = tl.where(ok, log_det, float("nan"))
    tl.store(logdet_ptr + b, log_det)
    if w_ptr is not None:
        tl.store(v_ptr + b * R + offs, v, mask=offs < R)
    if not FINAL:
        inflation = tl.sum(tl.sqrt(tl.where((offs < R) & ok, diagonal * inverse, 0.0)), 0)
        moved = rounding * inflation * inflation
        tl.store(wide_ptr + b, tl.where(ok & (moved <= tolerance), 0, 1).to(tl.uint8))


@triton.jit
def gram_kernel(
    part_ptr,  # [B, SPLITS, R, R], the lower triangle
    gram_ptr,  # [B, R, R]
    flag_ptr,  # [B], or none for all items
    SPLITS,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """PᵀD⁻¹P, both triangles, of its partial sums."""
    b = (tl.program_id(0) // R).to(tl.int64)
    i = tl.program_id(0) % R + tl.arange(0, 1)[:, None]
    if flag_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    columns = tl.arange(0, BLOCK_R)[None, :]
    row = _sum_of_splits(part_ptr + b * SPLITS * R * R, i, columns, SPLITS, R)
    tl.store(gram_ptr + (b * R + i) * R + columns, row, mask=columns < R)


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


def solve(
    parts: tuple[Tensor, Tensor | None, Tensor | None],
    d: Tensor,
    N: int,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor],
    final: bool,
    flagged: bool,
    rounding: float = 0.0,
) -> None:
    """Fills `out` = C⁻¹ [B, R, R], v [1, B, R] (if there is w), log|Σ| [B] and `wide` [B], from the partial sums of
    `capacitance`: PᵀD⁻¹P, w and log|D|, the last not needed where d [B, N or 1] is one value per item."""
    (gram, w, logdet_D), (C_inv, v, logdet, wide) = parts, out
    R = gram.shape[-1]
    block_r = launch.padded_rank(R)
    launch.launch(
        solve_kernel,
        (gram.shape[0],),
        8 if block_r >= REGISTERS_R.value else 4,
        gram_ptr=gram,
        w_ptr=w,
        logdet_D_ptr=logdet_D,
        d_at=launch.at(d),
        C_inv_ptr=C_inv,
        v_ptr=v,
        logdet_ptr=logdet,
        wide_ptr=wide.view(torch.uint8),
        N=N,
        SPLITS=gram.shape[1],
        rounding=rounding,
        tolerance=LOG_DET_TOLERANCE,
        R=R,
        ONE_D=d.shape[1] == 1,
        FINAL=final,
        FLAGGED=flagged,
        BLOCK_R=block_r,
        BLOCK_ROWS=max(1, IN_HAND // block_r) if block_r > REGISTERS_R.value else 16,
    )


def whole(parts: Tensor, gram: Tensor, flags: Tensor | None) -> None:
    """Fills PᵀD⁻¹P [B, R, R] in float64 from its partial sums; with `flags` only the items whose flag is set."""
    B, splits, R = parts.shape[:3]
    launch.launch(
        gram_kernel,
        (B * R,),
        1,
        part_ptr=parts,
        gram_ptr=gram,
        flag_ptr=flags,
        SPLITS=splits,
        R=R,
        BLOCK_R=launch.padded_rank(R),
    )


def refine(g: Tensor, q_part: Tensor, C_inv: Tensor, v: Tensor, q: Tensor, first: bool) -> None:
    """v = C⁻¹w [S, B, R] if `first`, else q [S, B] and the refined v, in place."""
    S, B, splits, R = g.shape
    block_r = launch.padded_rank(R)
    launch.launch(
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
