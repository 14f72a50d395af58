r"""Samples from a linear factor, y_c = μ_c + F̃ᵀu_c + √d_c ⊙ ω_d with u_c = W_cᵀω_p + m_c, from one read of F for all.

The R coefficients of a sample become K+1 for each channel, made beforehand. ω_d is given, or drawn here as `sampling`
draws it for column c·M + n of the same item: the same seed is the same sample, whether P is made or not. The gradient
of F is a product of u and grad_y, which torch's operators make; that of d draws ω_d again in `sampling`'s kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, linear_common
from .common import Block, aligned, load_tile, narrow
from .linear_common import both, columns_per_program, one_value
from .sampling import _noise, _normal_pair

# By padded number of features: one warp, and as many pixels as its registers hold without spills in either layout.
BLOCKS = both({16: Block(1, 64), 32: Block(1, 32), 64: Block(1, 64), 128: Block(1, 16)})
# In float64, and where noise is drawn for single columns, fewer.
SPARING_BLOCKS = both({16: Block(1, 32), 32: Block(2, 16), 64: Block(2, 32), 128: Block(4, 16)})
# Where tiles of features are walked over.
TILED_BLOCK = Block(2, 64)


@triton.jit
def _noise_anywhere(seed, n, s):
    """`_noise` of single columns n, where the first is not a multiple of 4: each draws the noise of its four."""
    none = tl.zeros(n.shape, tl.uint32)
    a, b, c, d = tl.philox(seed, (n // 4).to(tl.uint32), none + s.to(tl.uint32), none, none)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    lane = n % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def linear_sample_kernel(
    loc_ptr,  # [S or 1, B, C, M], read if WITH_LOC
    F_ptr,  # [B, K, M]
    d_ptr,  # [B, C, M], or [B, 1, 1] if SCALAR_D
    u_ptr,  # [B, S, C, K+1]
    omega_d_ptr,  # [S, B, C, M], read if GIVEN
    seed_ptr,  # [B]
    y_ptr,  # [S, B, C, M]
    S,
    B,
    C,
    M,
    SPLITS,
    COLUMNS,
    CHUNKS,
    stride_ls,
    stride_lb,
    stride_lc,
    stride_ln,
    stride_fb,
    stride_fk,
    stride_fn,
    stride_db,
    stride_dc,
    stride_dn,
    stride_os,
    stride_ob,
    stride_oc,
    stride_on,
    K: tl.constexpr,
    WITH_LOC: tl.constexpr,
    SCALAR_D: tl.constexpr,
    GIVEN: tl.constexpr,
    FOURS: tl.constexpr,  # whether every channel starts at a multiple of 4
    DOUBLE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    M, stride_fb, stride_fk = aligned((M, stride_fb, stride_fk), ALIGN)
    if WITH_LOC:
        stride_ls, stride_lb, stride_lc = aligned((stride_ls, stride_lb, stride_lc), ALIGN)
    if not SCALAR_D:
        stride_db, stride_dc = aligned((stride_db, stride_dc), ALIGN)
    if GIVEN:
        stride_os, stride_ob, stride_oc = aligned((stride_os, stride_ob, stride_oc), ALIGN)
    kind: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    KT: tl.constexpr = K + 1
    F_ptr += b * stride_fb
    d_ptr += b * stride_db
    offs_k = tl.arange(0, BLOCK_K)
    if not GIVEN:
        seed = tl.load(seed_ptr + b)
    if SCALAR_D:
        sigma_one = tl.sqrt(tl.load(d_ptr).to(kind))
    start = pid_s * COLUMNS
    for n in range(start, min(start + COLUMNS, M), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < M
        columns = offs_n.to(tl.int64)
        F = load_tile(F_ptr, offs_k, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N).to(kind)
        for channel in range(C):
            c = tl.full((), 1, tl.int64) * channel
            if SCALAR_D:
                sigma = sigma_one
            else:
                d = tl.load(d_ptr + c * stride_dc + columns * stride_dn, mask=mask_n, other=1.0)
                sigma = tl.sqrt(d.to(kind))
            for sample in range(chunk, S, CHUNKS):
                s = tl.full((), 1, tl.int64) * sample
                u_row = u_ptr + ((b * S + s) * C + c) * KT
                y = tl.sum(F * tl.load(u_row + offs_k, mask=offs_k < K, other=0.0).to(kind)[:, None], 0)
                for tile in range(1, TILES):
                    offs_t = tile * BLOCK_K + offs_k
                    u_t = tl.load(u_row + offs_t, mask=offs_t < K, other=0.0).to(kind)
                    F_t = load_tile(F_ptr, offs_t, n, M, stride_fk, stride_fn, K, NARROW, BLOCK_N).to(kind)
                    y += tl.sum(F_t * u_t[:, None], 0)
                y += tl.load(u_row + K).to(kind)
                if WITH_LOC:
                    loc_row = loc_ptr + s * stride_ls + b * stride_lb + c * stride_lc
                    y += tl.load(loc_row + columns * stride_ln, mask=mask_n, other=0.0).to(kind)
                if GIVEN:
                    row = omega_d_ptr + s * stride_os + b * stride_ob + c * stride_oc
                    y += sigma * tl.load(row + columns * stride_on, mask=mask_n, other=0.0).to(kind)
                elif FOURS:
                    y += sigma * _noise(seed, c * M + n, s, BLOCK_N).to(kind)
                else:
                    y += sigma * _noise_anywhere(seed, c * M + columns, s).to(kind)
                tl.store(y_ptr + ((s * B + b) * C + c) * M + columns, narrow(y, y_ptr), mask=mask_n)


def linear_rsample(
    loc: Tensor | None, F: Tensor, u: Tensor, d: Tensor, omega_d: Tensor | None, seed: Tensor | None
) -> Tensor:
    """y [S, B, C, M], of loc [S or 1, B, C, M] or none, u [B, S, C, K+1], and ω_d [S, B, C, M] or a seed [B]."""
    if (omega_d is None) == (seed is None):
        raise ValueError("expected either omega_d or seed")
    (B, S, C, _), (_, K, M), P = u.shape, F.shape, F.mT
    given = [t for t in (loc, omega_d) if t is not None]
    y = F.new_empty(S, B, C, M, dtype=F.dtype if loc is None else torch.promote_types(F.dtype, loc.dtype))
    block_k = common.padded_rank(K) if K <= common.FUSED_R else common.TILED_R
    fours, double = M % 4 == 0, common.products(F, u, d, *given) == "float64"
    sparing = double or not fours
    name, table = ("linear_sample_sparing", SPARING_BLOCKS) if sparing else ("linear_sample", BLOCKS)
    block = linear_common.block(name, table, block_k, F) if block_k >= K else TILED_BLOCK
    columns = columns_per_program(M, B, 64, block.columns)
    splits = max(1, common.ceil_div(M, columns))
    chunks = common.sample_chunks(S, M, K)
    shift, noise = y if loc is None else loc, y if omega_d is None else omega_d
    common.launch(
        linear_sample_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        loc_ptr=shift,
        F_ptr=F,
        d_ptr=d,
        u_ptr=u.contiguous(),
        omega_d_ptr=noise,
        seed_ptr=seed if seed is not None else y,
        y_ptr=y,
        S=S,
        B=B,
        C=C,
        M=M,
        SPLITS=splits,
        COLUMNS=columns,
        CHUNKS=chunks,
        stride_ls=shift.stride(0) if shift.shape[0] > 1 else 0,
        stride_lb=shift.stride(1),
        stride_lc=shift.stride(2),
        stride_ln=shift.stride(3),
        stride_fb=F.stride(0),
        stride_fk=F.stride(1),
        stride_fn=F.stride(2),
        stride_db=d.stride(0),
        stride_dc=d.stride(1),
        stride_dn=d.stride(2),
        stride_os=noise.stride(0),
        stride_ob=noise.stride(1),
        stride_oc=noise.stride(2),
        stride_on=noise.stride(3),
        K=K,
        WITH_LOC=loc is not None,
        SCALAR_D=one_value(d),
        GIVEN=omega_d is not None,
        FOURS=fours,
        DOUBLE=double,
        TILES=common.ceil_div(K, block_k),
        ALIGN=common.alignment(P, d, *given),
        NARROW=common.narrow_offsets(P, block.columns),
        BLOCK_K=block_k,
        BLOCK_N=block.columns,
    )
    return y


__all__ = ["linear_rsample"]
