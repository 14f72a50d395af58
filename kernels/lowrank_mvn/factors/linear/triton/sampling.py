r"""Samples from a linear factor, y_c = μ_c + F̃ᵀu_c + √d_c ⊙ ω_d with u_c = W_cᵀω_p + m_c, from one read of F for all.

The R coefficients of a sample become K+1 for each channel, made beforehand. ω_d is given, or drawn here as `sampling`
draws it for column c · pixels + n of the same item: the same seed is the same sample, whether P is made or not. The
gradient of F is a product of u and grad_y, which torch's operators make; that of d draws ω_d again, as for any factor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import narrow, normals, normals_anywhere
from ....device.tiles import Tile, load_row, load_tile, multiple, of_item
from ..forms import one_d
from .columns import block as block_of
from .columns import both, columns_per_program

# By padded number of features: one warp, and as many pixels as its registers hold without spills in either layout.
BLOCKS: Table = both({16: Block(1, 64), 32: Block(1, 32), 64: Block(1, 64), 128: Block(1, 16)})
# Fewer for float64, and for noise that is drawn for single columns.
SPARING_BLOCKS: Table = both({16: Block(1, 32), 32: Block(2, 16), 64: Block(2, 32), 128: Block(4, 16)})
# For a walk over tiles of features.
TILED_BLOCK = Block(2, 64)


@triton.jit
def linear_sample_kernel(
    loc_at,  # [B, channels, S, pixels], or none
    F_at,  # [B, K, pixels]
    d_at,  # [B, channels, pixels], or [B, 1] if ONE_D
    u_ptr,  # [B, S, channels, K+1]
    omega_d_at,  # [B, channels, S, pixels], or none if it is drawn
    seed_ptr,  # [B], read if ω_d is drawn
    y_ptr,  # [S, B, channels, pixels]
    sizes,  # S, B, channels, pixels
    cut,  # programs for an item, pixels for each, and CHUNKS that share the samples
    K: tl.constexpr,
    ONE_D: tl.constexpr,
    FOURS: tl.constexpr,  # whether every channel starts at a multiple of 4
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """y_cn = μ_cn + f̃ₙᵀu_c + √d_cn ω_cn of one split of the pixels n of an item."""
    BLOCK_K: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    KT: tl.constexpr = K + 1
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    S, B, channels, pixels = sizes
    SPLITS, length, CHUNKS = cut
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    pixels = multiple(pixels, TILE.ALIGN)
    if loc_at is not None:
        loc_item = of_item(loc_at, b, TILE.ALIGN)
    F_item = of_item(F_at, b, TILE.ALIGN)
    d_item = of_item(d_at, b, 1 if ONE_D else TILE.ALIGN)
    if omega_d_at is None:
        seed = tl.load(seed_ptr + b)
    else:
        omega_d_item = of_item(omega_d_at, b, TILE.ALIGN)
    offs_k = tl.arange(0, BLOCK_K)
    if ONE_D:
        sigma_one = tl.sqrt(tl.load(d_item[0]).to(dtype))
    start = pid_s * length
    for n in range(start, min(start + length, pixels), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < pixels
        columns = offs_n.to(tl.int64)
        F = load_tile(F_item, offs_k, n, pixels, K, TILE).to(dtype)
        for channel in range(channels):
            c = tl.full((), 1, tl.int64) * channel
            if ONE_D:  # noqa: SIM108
                sigma = sigma_one
            else:
                sigma = tl.sqrt(load_row(of_item(d_item, c, 1), columns, mask_n, 1.0).to(dtype))
            for sample in range(chunk, S, CHUNKS):
                s = tl.full((), 1, tl.int64) * sample
                u_row = u_ptr + ((b * S + s) * channels + c) * KT
                y = tl.sum(F * tl.load(u_row + offs_k, mask=offs_k < K, other=0.0).to(dtype)[:, None], 0)
                for tile in range(1, (K + BLOCK_K - 1) // BLOCK_K):
                    offs_t = tile * BLOCK_K + offs_k
                    u_t = tl.load(u_row + offs_t, mask=offs_t < K, other=0.0).to(dtype)
                    y += tl.sum(load_tile(F_item, offs_t, n, pixels, K, TILE).to(dtype) * u_t[:, None], 0)
                y += tl.load(u_row + K).to(dtype)
                if loc_at is not None:
                    y += load_row(of_item(of_item(loc_item, c, 1), s, 1), columns, mask_n).to(dtype)
                if omega_d_at is not None:
                    y += sigma * load_row(of_item(of_item(omega_d_item, c, 1), s, 1), columns, mask_n).to(dtype)
                elif FOURS:
                    y += sigma * normals(seed, c * pixels + n, s, BLOCK_N).to(dtype)
                else:
                    y += sigma * normals_anywhere(seed, c * pixels + columns, s).to(dtype)
                tl.store(y_ptr + ((s * B + b) * channels + c) * pixels + columns, narrow(y, y_ptr), mask=mask_n)


def rsample(loc: Tensor | None, F: Tensor, u: Tensor, d: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y [S, B, channels, pixels], of loc [S or 1, B, channels, pixels] or none, u [B, S, channels, K+1], and ω_d
    [S, B, channels, pixels] or a seed [B]."""
    if (omega_d is None) == (seed is None):
        raise ValueError("expected either omega_d or seed")
    (B, S, channels, _), (_, K, pixels), one = u.shape, F.shape, one_d(d)
    given = [t for t in (loc, omega_d) if t is not None]
    y = F.new_empty(S, B, channels, pixels, dtype=F.dtype if loc is None else torch.promote_types(F.dtype, loc.dtype))
    block_k = launch.padded_rank(K) if K <= launch.FUSED_R else launch.TILED_R
    fours, kind = pixels % 4 == 0, launch.products(F, u, d, *given)
    sparing = kind == "float64" or not fours
    name, table = ("linear_sample_sparing", SPARING_BLOCKS) if sparing else ("linear_sample", BLOCKS)
    block = block_of(name, table, block_k, F) if block_k >= K else TILED_BLOCK
    columns = columns_per_program(pixels, B, 64, block.columns)
    splits = max(1, launch.ceil_div(pixels, columns))
    chunks = launch.sample_chunks(S, pixels, K)
    align = launch.alignment(F.mT, d, *given)
    launch.launch(
        linear_sample_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        loc_at=None if loc is None else launch.samples_at(loc, by_channel=True),
        F_at=launch.at(F),
        d_at=launch.at(d[:, 0] if one else d),
        u_ptr=u.contiguous(),
        omega_d_at=None if omega_d is None else launch.samples_at(omega_d, by_channel=True),
        seed_ptr=seed,
        y_ptr=y,
        sizes=(S, B, channels, pixels),
        cut=(splits, columns, chunks),
        K=K,
        ONE_D=one,
        FOURS=fours,
        KIND=kind,
        TILE=Tile(block_k, block.columns, align, align, launch.narrow_offsets(F.mT, block.columns)),
    )
    return y


__all__ = ["rsample"]
