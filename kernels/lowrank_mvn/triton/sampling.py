r"""Samples y = μ + P ω_p + √d ⊙ ω_d from one read of P for all of them, and the gradients from none.

ω_d is given, or drawn here: Philox with the item's seed as key and (column / 4, sample) as counter gives the noise of
four neighbouring columns, whatever the grid and the blocks, so that the same seed is the same sample and the backward
draws it again instead of reading it. It has the resolution of float32, for float64 samples too.

    grad_P = Σₛ grad_y ω_pᵀ        grad_d = Σₛ grad_y ω_d / (2√d)        grad_loc = Σₛ grad_y
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import Block, aligned, load_tile, narrow, tile_offsets

# By padded rank, and whether neighbouring columns of P are neighbours in memory: one warp, and as many columns as its
# registers hold without spills.
BLOCKS = {
    (16, True): Block(1, 64),
    (16, False): Block(1, 64),
    (32, True): Block(1, 32),
    (32, False): Block(1, 32),
    (64, True): Block(1, 32),
    (64, False): Block(1, 32),
    (128, True): Block(1, 16),
    (128, False): Block(1, 16),
}
# Of the gradient where tiles of rows are walked over, and rows of one column are neighbours in memory.
TILED_BLOCK = Block(4, 32)


@triton.jit
def _cos_sin_turns(u):
    """cos 2πu and sin 2πu for u in [0, 1): a quarter turn and a polynomial, without the library's long reduction."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    t = (u - quarter.to(tl.float32) * 0.25) * 6.283185307179586
    t2 = t * t
    sin = t + t * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    cos = 1.0 - 0.5 * t2 + t2 * t2 * (4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5))
    swap = (quarter & 1) != 0
    c = tl.where(swap, -sin, cos)
    s = tl.where(swap, cos, sin)
    flip = (quarter & 2) != 0
    return tl.where(flip, -c, c), tl.where(flip, -s, s)


@triton.jit
def _normal_pair(a, b):
    """Two standard normals of two words of noise (Box and Muller)."""
    radius = tl.sqrt(-2.0 * tl.log(((a >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.960464477539063e-08))
    cos, sin = _cos_sin_turns((b >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08)
    return radius * cos, radius * sin


@triton.jit
def _noise(seed, n, s, BLOCK_N: tl.constexpr):
    """ω_d of sample s at columns n … n + BLOCK_N − 1, where n is a multiple of 4."""
    group = (n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    none = tl.zeros_like(group)
    a, b, c, d = tl.philox(seed, group, none + s.to(tl.uint32), none, none)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_N,))


@triton.jit
def sample_kernel(
    loc_ptr,  # [S or 1, B, N]
    P_ptr,  # [B, N, R]
    d_ptr,  # [B, N], or [B, 1] if SCALAR_D
    omega_p_ptr,  # [S, B, R]
    omega_d_ptr,  # [S, B, N], read if GIVEN
    seed_ptr,  # [B]
    y_ptr,  # [S, B, N]
    S,
    B,
    N,
    SPLITS,
    COLUMNS,
    CHUNKS,
    stride_ls,
    stride_lb,
    stride_ln,
    stride_pb,
    stride_pr,
    stride_pn,
    stride_db,
    stride_dn,
    stride_os,
    stride_ob,
    stride_on,
    R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    GIVEN: tl.constexpr,
    DOUBLE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    stride_pb, stride_pr = aligned((stride_pb, stride_pr), ALIGN)
    N, stride_ls, stride_lb = aligned((N, stride_ls, stride_lb), VECTORS)
    if not SCALAR_D:
        (stride_db,) = aligned((stride_db,), VECTORS)
    if GIVEN:
        stride_os, stride_ob = aligned((stride_os, stride_ob), VECTORS)
    kind: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    P_ptr += b * stride_pb
    d_ptr += b * stride_db
    offs_r = tl.arange(0, BLOCK_R)
    if not GIVEN:
        seed = tl.load(seed_ptr + b)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if SCALAR_D:
            sigma = tl.full((BLOCK_N,), 1.0, kind) * tl.sqrt(tl.load(d_ptr).to(kind))
        else:
            sigma = tl.sqrt(tl.load(d_ptr + columns * stride_dn, mask=mask_n, other=1.0).to(kind))
        P = load_tile(P_ptr, offs_r, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N).to(kind)
        for sample in range(chunk, S, CHUNKS):
            s = tl.full((), 1, tl.int64) * sample
            omega_row = omega_p_ptr + (s * B + b) * R
            omega_p = tl.load(omega_row + offs_r, mask=offs_r < R, other=0.0).to(kind)
            loc_row = loc_ptr + s * stride_ls + b * stride_lb
            y = tl.load(loc_row + columns * stride_ln, mask=mask_n, other=0.0).to(kind)
            y += tl.sum(P * omega_p[:, None], 0)
            for tile in range(1, TILES):
                offs_t = tile * BLOCK_R + offs_r
                omega_t = tl.load(omega_row + offs_t, mask=offs_t < R, other=0.0).to(kind)
                P_t = load_tile(P_ptr, offs_t, n, N, stride_pr, stride_pn, R, NARROW, BLOCK_N).to(kind)
                y += tl.sum(P_t * omega_t[:, None], 0)
            if GIVEN:
                where = s * stride_os + b * stride_ob + columns * stride_on
                y += sigma * tl.load(omega_d_ptr + where, mask=mask_n, other=0.0).to(kind)
            else:
                y += sigma * _noise(seed, n, s, BLOCK_N).to(kind)
            tl.store(y_ptr + (s * B + b) * N + columns, narrow(y, y_ptr), mask=mask_n)


@triton.jit
def sample_backward_kernel(
    grad_y_ptr,  # [S, B, N]
    d_ptr,  # [B, N], or [B, 1] if SCALAR_D
    omega_p_ptr,  # [S, B, R]
    omega_d_ptr,  # [S, B, N], read if GIVEN
    seed_ptr,  # [B]
    grad_P_ptr,  # [CHUNKS, B, N, R]
    grad_d_ptr,  # [CHUNKS, B, N]: Σ grad_y ω_d, over 2√d unless SCALAR_D
    grad_omega_d_ptr,  # [S, B, N]: grad_y √d
    S,
    B,
    N,
    SPLITS,
    COLUMNS,
    CHUNKS,
    stride_ys,
    stride_yb,
    stride_yn,
    stride_db,
    stride_dn,
    stride_os,
    stride_ob,
    stride_on,
    stride_gc,
    stride_gb,
    stride_gr,
    stride_gn,
    R: tl.constexpr,
    SCALAR_D: tl.constexpr,
    GIVEN: tl.constexpr,
    NEED_P: tl.constexpr,
    NEED_D: tl.constexpr,
    NEED_OMEGA_D: tl.constexpr,
    DOUBLE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    stride_gb, stride_gr = aligned((stride_gb, stride_gr), ALIGN)
    N, stride_ys, stride_yb = aligned((N, stride_ys, stride_yb), VECTORS)
    if not SCALAR_D:
        (stride_db,) = aligned((stride_db,), VECTORS)
    kind: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    at = tl.full((), 1, tl.int64) * chunk
    grad_P_ptr += at * stride_gc + b * stride_gb
    grad_d_ptr += (at * B + b) * N
    if not GIVEN:
        seed = tl.load(seed_ptr + b)
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if SCALAR_D:
            sigma = tl.full((BLOCK_N,), 1.0, kind) * tl.sqrt(tl.load(d_ptr + b * stride_db).to(kind))
        else:
            sigma = tl.sqrt(tl.load(d_ptr + b * stride_db + columns * stride_dn, mask=mask_n, other=1.0).to(kind))
        for tile in tl.static_range(TILES):
            offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            grad_P = tl.zeros((BLOCK_R, BLOCK_N), kind)
            grad_d = tl.zeros((BLOCK_N,), kind)
            for sample in range(chunk, S, CHUNKS):
                s = tl.full((), 1, tl.int64) * sample
                where = s * stride_ys + b * stride_yb + columns * stride_yn
                grad_y = tl.load(grad_y_ptr + where, mask=mask_n, other=0.0).to(kind)
                if NEED_P:
                    omega_row = omega_p_ptr + (s * B + b) * R
                    omega_p = tl.load(omega_row + offs_r, mask=offs_r < R, other=0.0).to(kind)
                    grad_P += omega_p[:, None] * grad_y[None, :]
                if NEED_D and tile == 0:
                    if GIVEN:
                        where = s * stride_os + b * stride_ob + columns * stride_on
                        grad_d += grad_y * tl.load(omega_d_ptr + where, mask=mask_n, other=0.0).to(kind)
                    else:
                        grad_d += grad_y * _noise(seed, n, s, BLOCK_N).to(kind)
                if NEED_OMEGA_D and tile == 0:
                    grad = narrow(grad_y * sigma, grad_omega_d_ptr)
                    tl.store(grad_omega_d_ptr + (s * B + b) * N + columns, grad, mask=mask_n)
            if NEED_P:
                offsets = tile_offsets(offs_r, stride_gr, stride_gn, NARROW, BLOCK_N)
                inside = (offs_r < R)[:, None] & mask_n[None, :]
                tile_ptr = grad_P_ptr + tl.full((), 1, tl.int64) * n * stride_gn
                tl.store(tile_ptr + offsets, narrow(grad_P, grad_P_ptr), mask=inside)
            if NEED_D and tile == 0:
                if not SCALAR_D:
                    grad_d = grad_d / (2.0 * sigma)
                tl.store(grad_d_ptr + columns, narrow(grad_d, grad_d_ptr), mask=mask_n)


def _blocks(kernel: str, P: Tensor) -> tuple[Block, dict[str, int]]:
    _, N, R = P.shape
    block_r = common.padded_rank(R) if R <= common.FUSED_R else common.TILED_R
    by_column = P.stride(1) == 1
    if kernel == "sample_backward" and block_r < R and not by_column:
        block = TILED_BLOCK
    else:
        block = common.block(kernel, BLOCKS, block_r, by_column, P.device)
    columns = common.split_columns(N, R, block.columns)
    splits = max(1, common.ceil_div(N, columns))
    tiles = common.ceil_div(R, block_r)
    sizes = {"SPLITS": splits, "COLUMNS": columns, "TILES": tiles, "BLOCK_R": block_r, "BLOCK_N": block.columns}
    return block, sizes


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y [S, B, N] in the dtype of `loc`, of loc [S or 1, B, N], ω_p [S, B, R], and ω_d [S, B, N] or a seed [B]."""
    S, (B, N, R) = omega_p.shape[0], P.shape
    if (omega_d is None) == (seed is None):
        raise ValueError("expected either omega_d or seed")
    y = loc.new_empty(S, B, N)
    noise = omega_d if omega_d is not None else y
    block, sizes = _blocks("sample", P)
    chunks = common.sample_chunks(S, N, R)
    common.launch(
        sample_kernel,
        (B * sizes["SPLITS"], chunks),
        block.num_warps,
        block.num_stages,
        loc_ptr=loc,
        P_ptr=P,
        d_ptr=d,
        omega_p_ptr=omega_p.contiguous(),
        omega_d_ptr=noise,
        seed_ptr=seed if seed is not None else y,
        y_ptr=y,
        S=S,
        B=B,
        N=N,
        CHUNKS=chunks,
        stride_ls=loc.stride(0) if loc.shape[0] > 1 else 0,
        stride_lb=loc.stride(1),
        stride_ln=loc.stride(2),
        stride_pb=P.stride(0),
        stride_pr=P.stride(2),
        stride_pn=P.stride(1),
        stride_db=d.stride(0),
        stride_dn=d.stride(1),
        stride_os=noise.stride(0),
        stride_ob=noise.stride(1),
        stride_on=noise.stride(2),
        R=R,
        SCALAR_D=d.shape[1] == 1,
        GIVEN=omega_d is not None,
        DOUBLE=common.products(loc, P, d) == "float64",
        NARROW=common.narrow_offsets(P, block.columns),
        ALIGN=common.alignment(P, loc, d, noise),
        VECTORS=common.vector_alignment(N, loc, d, noise),
        **sizes,
    )
    return y


def rsample_backward(
    grad_y: Tensor,
    P: Tensor,
    d: Tensor,
    omega_p: Tensor,
    omega_d: Tensor | None,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_P, grad_d and grad_ω_d, each in its input's shape and dtype; empty where `needs` says no."""
    need_P, need_d, need_omega_d = needs
    S, (B, N, R) = omega_p.shape[0], P.shape
    scalar_d = d.shape[1] == 1
    chunks = common.sample_chunks(S, N, R) if need_P or need_d else 1
    double = common.products(grad_y, P, d) == "float64"
    work = torch.float64 if double else torch.float32
    parts_P = common.empty_chunks(chunks, P, work) if need_P else P.new_empty(0)
    parts_d = d.new_empty(chunks, B, N, dtype=work if scalar_d or chunks > 1 else d.dtype) if need_d else d.new_empty(0)
    noise = omega_d if omega_d is not None else grad_y
    grad_omega_d = noise.new_empty(noise.shape) if need_omega_d else noise.new_empty(0)
    G = parts_P[0] if need_P else P
    block, sizes = _blocks("sample_backward", G)
    common.launch(
        sample_backward_kernel,
        (B * sizes["SPLITS"], chunks),
        block.num_warps,
        block.num_stages,
        grad_y_ptr=grad_y,
        d_ptr=d,
        omega_p_ptr=omega_p.contiguous(),
        omega_d_ptr=noise,
        seed_ptr=seed if seed is not None else grad_y,
        grad_P_ptr=parts_P,
        grad_d_ptr=parts_d,
        grad_omega_d_ptr=grad_omega_d,
        S=S,
        B=B,
        N=N,
        CHUNKS=chunks,
        stride_ys=grad_y.stride(0),
        stride_yb=grad_y.stride(1),
        stride_yn=grad_y.stride(2),
        stride_db=d.stride(0),
        stride_dn=d.stride(1),
        stride_os=noise.stride(0),
        stride_ob=noise.stride(1),
        stride_on=noise.stride(2),
        stride_gc=parts_P.stride(0),
        stride_gb=G.stride(0),
        stride_gr=G.stride(2),
        stride_gn=G.stride(1),
        R=R,
        SCALAR_D=scalar_d,
        GIVEN=omega_d is not None,
        NEED_P=need_P,
        NEED_D=need_d,
        NEED_OMEGA_D=need_omega_d,
        DOUBLE=double,
        NARROW=common.narrow_offsets(G, block.columns),
        ALIGN=common.alignment(G, grad_y, d),
        VECTORS=common.vector_alignment(N, grad_y, d),
        **sizes,
    )
    grad_P = common.sum_chunks(parts_P, P) if need_P else parts_P
    if need_d and scalar_d:
        grad_d = (parts_d.sum((0, 2), dtype=torch.float64)[:, None] / (2 * d.double().sqrt())).to(d.dtype)
    else:
        grad_d = common.sum_chunks(parts_d, d) if need_d else parts_d
    return grad_P, grad_d, grad_omega_d


__all__ = ["rsample", "rsample_backward"]
