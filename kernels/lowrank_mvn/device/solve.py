r"""The R×R part, one program per item, in float64: log|C|, L⁻¹, v = C⁻¹w and whether the products were good enough.

The partial sums of `capacitance` are added in their order and C = LLᵀ is eliminated, row by row and in place. Step k,
with pivot p = Cₖₖ and c = C[:, k], subtracts multiples of row k from those below it, in what is left of C and in I
alike, which becomes L⁻¹:

    Cᵢⱼ ← Cᵢⱼ − cᵢcⱼ/p        (L⁻¹)ᵢⱼ ← (L⁻¹)ᵢⱼ − cᵢ(L⁻¹)ₖⱼ/p        row k of L⁻¹ ← itself/√p        i > k

so that one matrix holds both: to the left what L⁻¹ has become, to the right what is left of C. log|C| = Σ log p. C ⪰ I,
so that no pivoting is needed; a pivot that rounding has left below R units in the last place of Cₖₖ counts as that,
which keeps L⁻¹ finite wherever C is. For R > 64 the matrix lies in the output buffer.

`wide` marks the items that `again` makes better, with products in float64: rounding may have moved log|C| by too much,
or a pivot is not finite (then L⁻¹ is I). The test is that of `capacitance.too_rough`, which has the bound; it stands
here again because C is in registers here, and nowhere else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

# The widest padded rank that is swept in registers, 16 float64 values of C in each of 256 lanes (32 in each of 128 do
# spill on sm_100): with 128 rows they spill at 8 and at 16 warps.
REGISTERS_R = tl.constexpr(64)
# Values of C that a program has in hand at a time where it sweeps in memory: four per lane; eight spill.
IN_HAND = 1024


@triton.jit
def sum_of_splits(gram_ptr, rows, columns, SPLITS, R: tl.constexpr):
    """Rows [n, 1] of C − I, both sides of the diagonal."""
    where = tl.maximum(rows, columns) * R + tl.minimum(rows, columns)
    total = tl.zeros((rows.shape[0], columns.shape[1]), tl.float64)
    for _ in range(SPLITS):
        total += tl.load(gram_ptr + where, mask=(rows < R) & (columns < R), other=0.0).to(tl.float64)
        gram_ptr += R * R
    return total


@triton.jit
def _pivot(p, least, log_det, finite):
    """1/√p, and what a pivot p adds to log|C| and to the test of all pivots."""
    finite = tl.where(p - p == 0, finite, 0)
    p = tl.maximum(p, least)
    log_det += tl.log(p)
    return tl.rsqrt(p), log_det, finite


@triton.jit
def _eliminated(C, c, c_row, root, rows, columns, k):
    """Step k on some rows of C, but row k itself; c and c_row are what is left of column k at these rows, and row k."""
    u = tl.where(rows > k, c * root, 0.0)
    t = tl.where(columns == k, root, c_row * root)
    return tl.where((columns == k) & (rows > k), 0.0, C) - u * t


@triton.jit
def _finished(c_row, root, columns, k):
    """Row k of L⁻¹."""
    return tl.where(columns < k, c_row * root, tl.where(columns == k, root, 0.0))


@triton.jit
def _eliminate_in_registers(gram_ptr, noise, SPLITS, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """L⁻¹, log|C|, whether the pivots are finite, and the diagonal of C."""
    offs = tl.arange(0, BLOCK_R)
    rows = offs[:, None]
    columns = offs[None, :]
    C = sum_of_splits(gram_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
    diagonal = tl.sum(tl.where(rows == columns, C, 0.0), 0)
    log_det = tl.zeros((), tl.float64)
    finite = tl.full((), 1, tl.int32)
    for k in range(R):
        # The same numbers twice, once for each way a vector can lie across the threads.
        c = tl.sum(tl.where(columns == k, C, 0.0), 1)
        c_row = tl.sum(tl.where(rows == k, C, 0.0), 0)
        p = tl.sum(tl.where(offs == k, c_row, 0.0), 0)
        least = tl.sum(tl.where(offs == k, diagonal, 0.0), 0) * noise
        root, log_det, finite = _pivot(p, least, log_det, finite)
        C = _eliminated(C, c[:, None], c_row[None, :], root, rows, columns, k)
        C = tl.where(rows == k, _finished(c_row, root, offs, k)[None, :], C)
    return C, log_det, finite, diagonal


@triton.jit
def eliminate_in_memory(C_ptr, noise, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """log|C|, whether the pivots are finite, and the diagonal of C, whose place L⁻¹ takes.

    Some rows at a time; what the threads of a program wrote is visible after a barrier.
    """
    offs = tl.arange(0, BLOCK_R)
    columns = offs[None, :]
    diagonal = tl.load(C_ptr + offs * R + offs, mask=offs < R, other=0.0)
    log_det = tl.zeros((), tl.float64)
    finite = tl.full((), 1, tl.int32)
    for k in range(R):
        least = tl.sum(tl.where(offs == k, diagonal, 0.0), 0) * noise
        root, log_det, finite = _pivot(tl.load(C_ptr + k * R + k), least, log_det, finite)
        c_row = tl.load(C_ptr + k * R + columns, mask=columns < R, other=0.0)
        for i in range(k // BLOCK_ROWS * BLOCK_ROWS, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            mask = (rows < R) & (columns < R)
            c = tl.load(C_ptr + k * R + rows, mask=rows < R, other=0.0)
            C = tl.load(C_ptr + rows * R + columns, mask=mask, other=0.0)
            C = _eliminated(C, c, c_row, root, rows, columns, k)
            tl.store(C_ptr + rows * R + columns, C, mask=mask & (rows > k))
        tl.debug_barrier()  # row k, which every row above was made with, comes last
        tl.store(C_ptr + k * R + columns, _finished(c_row, root, columns, k), mask=columns < R)
        tl.debug_barrier()
    return log_det, finite, diagonal


@triton.jit
def of_diagonal(log_det, logdet_D_ptr, d_at, b, N, SPLITS, ONE_D: tl.constexpr):
    """log|Σ| = log|C| + log|D| of item b."""
    if ONE_D:
        log_det += N * tl.log(tl.load(d_at[0] + b * d_at[1]).to(tl.float64))
    else:
        for s in range(SPLITS):
            log_det += tl.load(logdet_D_ptr + b * SPLITS + s)
    return log_det


@triton.jit
def solve_kernel(
    gram_ptr,  # [B, SPLITS, R, R], the lower triangle of C − I
    w_ptr,  # [B, SPLITS, R], or none
    logdet_D_ptr,  # [B, SPLITS], not read if ONE_D
    d_at,  # [B, 1], read if ONE_D
    L_inv_ptr,  # [B, R, R]
    v_ptr,  # [B, R], written if there is w
    logdet_ptr,  # [B]
    wide_ptr,  # [B], written unless FINAL
    flag_ptr,  # [B], or none for all items
    N,
    SPLITS,
    rounding,
    tolerance,
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """L⁻¹, v = L⁻ᵀL⁻¹w, log|Σ| = Σ log p + log|D|, and whether ε(Σⱼ √(Cⱼⱼ C⁻¹ⱼⱼ))² exceeds the tolerance."""
    b = tl.program_id(0).to(tl.int64)
    if flag_ptr is not None:  # noqa: SIM102  (decided when compiling)
        if tl.load(flag_ptr + b) == 0:
            return
    gram_ptr += b * SPLITS * R * R
    L_inv_ptr += b * R * R
    offs = tl.arange(0, BLOCK_R)
    # Of float64, whatever C was made of: a linear factor's is exact in W, and what is rougher than that is `wide`.
    noise = R * 2.2204460492503131e-16
    v = tl.zeros((BLOCK_R,), tl.float64)
    w = tl.zeros((BLOCK_R,), tl.float64)
    if w_ptr is not None:
        for s in range(SPLITS):
            w += tl.load(w_ptr + (b * SPLITS + s) * R + offs, mask=offs < R, other=0.0).to(tl.float64)
    columns = offs[None, :]
    if BLOCK_R > REGISTERS_R:
        for i in range(0, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            row = sum_of_splits(gram_ptr, rows, columns, SPLITS, R) + (rows == columns).to(tl.float64)
            tl.store(L_inv_ptr + rows * R + columns, row, mask=(rows < R) & (columns < R))
        tl.debug_barrier()
        log_det, finite, diagonal = eliminate_in_memory(L_inv_ptr, noise, R, BLOCK_R, BLOCK_ROWS)
        ok = finite > 0
        inverse = tl.zeros((BLOCK_R,), tl.float64)
        for i in range(0, R, BLOCK_ROWS):
            rows = (i + tl.arange(0, BLOCK_ROWS))[:, None]
            mask = (rows < R) & (columns < R)
            L_inv = tl.load(L_inv_ptr + rows * R + columns, mask=mask, other=0.0)
            lost = float("nan") if FINAL else (rows == columns).to(tl.float64)
            tl.store(L_inv_ptr + rows * R + columns, lost, mask=mask & (finite == 0))
            inverse += tl.sum(L_inv * L_inv, 0)
            v += tl.sum(L_inv * tl.sum(L_inv * w[None, :], 1)[:, None], 0)
    else:
        rows = offs[:, None]
        L_inv, log_det, finite, diagonal = _eliminate_in_registers(gram_ptr, noise, SPLITS, R, BLOCK_R)
        ok = finite > 0
        inverse = tl.sum(L_inv * L_inv, 0)
        w_row = tl.sum(tl.where(rows == columns, w[:, None], 0.0), 0)
        v = tl.sum(L_inv * tl.sum(L_inv * w_row[None, :], 1)[:, None], 0)
        lost = float("nan") if FINAL else (rows == columns).to(tl.float64)
        L_inv = tl.where(ok, L_inv, lost)
        tl.store(L_inv_ptr + rows * R + columns, L_inv, mask=(rows < R) & (columns < R))
    log_det = of_diagonal(log_det, logdet_D_ptr, d_at, b, N, SPLITS, ONE_D)
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
    row = sum_of_splits(part_ptr + b * SPLITS * R * R, i, columns, SPLITS, R)
    tl.store(gram_ptr + (b * R + i) * R + columns, row, mask=columns < R)


@triton.jit
def refine_kernel(
    g_ptr,  # [S, B, SPLITS, R], partial sums of PᵀD⁻¹r
    q_part_ptr,  # [S, B, SPLITS], partial sums of rᵀD⁻¹r
    L_inv_ptr,  # [B, R, R]
    v_ptr,  # [S, B, R], read unless FIRST; written
    step_ptr,  # [S, B, R], written unless FIRST
    q_ptr,  # [S, B], written unless FIRST
    B,
    SPLITS,
    R: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """v = C⁻¹w if FIRST; else g = PᵀD⁻¹r − v, q = rᵀD⁻¹r + vᵀv − ‖L⁻¹g‖², C⁻¹g and v ← v + C⁻¹g; C⁻¹ is L⁻ᵀL⁻¹."""
    pid = tl.program_id(0).to(tl.int64)  # s·B + b
    L_inv_ptr += (pid % B) * R * R
    offs = tl.arange(0, BLOCK_R)
    mask = offs < R
    g = tl.zeros((BLOCK_R,), tl.float64)
    q = tl.zeros((), tl.float64)
    v = tl.zeros((BLOCK_R,), tl.float64)
    step = tl.zeros((BLOCK_R,), tl.float64)
    for s in range(SPLITS):
        g += tl.load(g_ptr + (pid * SPLITS + s) * R + offs, mask=mask, other=0.0)
        if not FIRST:
            q += tl.load(q_part_ptr + pid * SPLITS + s)
    if not FIRST:
        v = tl.load(v_ptr + pid * R + offs, mask=mask, other=0.0)
        q += tl.sum(v * v, 0)
        g -= v
    for start in range(0, R, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = (rows < R)[:, None] & mask[None, :]
        L_inv = tl.load(L_inv_ptr + rows[:, None] * R + offs[None, :], mask=inside, other=0.0)
        half = tl.sum(L_inv * g[None, :], 1)
        q -= tl.sum(half * half, 0)
        step += tl.sum(L_inv * half[:, None], 0)
    tl.debug_barrier()  # all of v is read before any of it is written
    tl.store(v_ptr + pid * R + offs, v + step, mask=mask)
    if not FIRST:
        tl.store(step_ptr + pid * R + offs, step, mask=mask)
        tl.store(q_ptr + pid, q)


def solve(
    parts: tuple[Tensor, Tensor | None, Tensor | None],
    d: Tensor,
    N: int,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor],
    rounding: float,
    tolerance: float,
    flags: Tensor | None = None,
) -> None:
    """Fills `out` = L⁻¹ [B, R, R], v [1, B, R] (if there is w), log|Σ| [B] and `wide` [B], from the partial sums of
    `capacitance`: PᵀD⁻¹P, w and log|D|, the last not needed where d [B, N or 1] is one value per item.

    With `flags` [B] only the flagged items; then `wide` stays as it is, and what is not finite is NaN.
    """
    (gram, w, logdet_D), (L_inv, v, logdet, wide) = parts, out
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
        L_inv_ptr=L_inv,
        v_ptr=v,
        logdet_ptr=logdet,
        wide_ptr=wide.view(torch.uint8),
        flag_ptr=flags,
        N=N,
        SPLITS=gram.shape[1],
        rounding=rounding,
        tolerance=tolerance,
        R=R,
        ONE_D=d.shape[1] == 1,
        FINAL=flags is not None,
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


def refine(g: Tensor, q_part: Tensor, L_inv: Tensor, v: Tensor, step: Tensor | None, q: Tensor, first: bool) -> None:
    """v = C⁻¹w [S, B, R] if `first`, else q [S, B], the last step C⁻¹g and the refined v, in place."""
    S, B, splits, R = g.shape
    block_r = launch.padded_rank(R)
    launch.launch(
        refine_kernel,
        (S * B,),
        1 if block_r <= 32 else 4,
        g_ptr=g,
        q_part_ptr=q_part,
        L_inv_ptr=L_inv,
        v_ptr=v,
        step_ptr=step,
        q_ptr=q,
        B=B,
        SPLITS=splits,
        R=R,
        FIRST=first,
        BLOCK_R=block_r,
        BLOCK_ROWS=max(1, min(16, 2 * IN_HAND // block_r)),
    )


__all__ = ["refine", "solve", "whole"]
