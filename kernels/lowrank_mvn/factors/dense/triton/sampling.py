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

from ....device import launch
from ....device.launch import Block, Table
from ....device.math import narrow, normals
from ....device.tiles import Tile, from_column, load_row, load_tile, multiple, of_item, tile_offsets

# By padded rank, and whether neighbouring columns of P are neighbours in memory: one warp, and as many columns as its
# registers hold without spills.
BLOCKS: Table = {
    (16, True): Block(1, 64),
    (16, False): Block(1, 64),
    (32, True): Block(1, 32),
    (32, False): Block(1, 32),
    (64, True): Block(1, 32),
    (64, False): Block(1, 32),
    (128, True): Block(1, 16),
    (128, False): Block(1, 16),
}
# The gradient's, where it walks over tiles of rows and the rows of a column are neighbours in memory.
TILED_BLOCK = Block(4, 32)
# Columns of which one program draws the noise.
NOISE_BLOCK = 1024


@triton.jit
def sample_kernel(
    loc_at,  # [B, S, N]
    P_at,  # [B, R, N]
    d_at,  # [B, N], or [B, 1] if ONE_D
    omega_p_ptr,  # [S, B, R]
    omega_d_at,  # [B, S, N], or none if it is drawn
    seed_ptr,  # [B], read if ω_d is drawn
    y_ptr,  # [S, B, N]
    sizes,  # S, B, N
    cut,  # programs for an item, columns for each, and CHUNKS that share the samples
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """yₙ = μₙ + pₙᵀω_p + √dₙ ω_dₙ of one split of the columns n of an item."""
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    S, B, N = sizes
    SPLITS, length, CHUNKS = cut
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    N = multiple(N, TILE.VECTORS)
    loc_item = of_item(loc_at, b, TILE.VECTORS)
    P_item = of_item(P_at, b, TILE.ALIGN)
    d_item = of_item(d_at, b, 1 if ONE_D else TILE.VECTORS)
    offs_r = tl.arange(0, BLOCK_R)
    if omega_d_at is None:
        seed = tl.load(seed_ptr + b)
    else:
        omega_d_item = of_item(omega_d_at, b, TILE.VECTORS)
    start = pid_s * length
    for n in range(start, min(start + length, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if ONE_D:
            sigma = tl.full((BLOCK_N,), 1.0, dtype) * tl.sqrt(tl.load(d_item[0]).to(dtype))
        else:
            sigma = tl.sqrt(load_row(d_item, columns, mask_n, 1.0).to(dtype))
        P = load_tile(P_item, offs_r, n, N, R, TILE).to(dtype)
        for sample in range(chunk, S, CHUNKS):
            s = tl.full((), 1, tl.int64) * sample
            omega_row = omega_p_ptr + (s * B + b) * R
            omega_p = tl.load(omega_row + offs_r, mask=offs_r < R, other=0.0).to(dtype)
            y = load_row(of_item(loc_item, s, 1), columns, mask_n).to(dtype)
            y += tl.sum(P * omega_p[:, None], 0)
            for tile in range(1, (R + BLOCK_R - 1) // BLOCK_R):
                offs_t = tile * BLOCK_R + offs_r
                omega_t = tl.load(omega_row + offs_t, mask=offs_t < R, other=0.0).to(dtype)
                y += tl.sum(load_tile(P_item, offs_t, n, N, R, TILE).to(dtype) * omega_t[:, None], 0)
            if omega_d_at is None:
                y += sigma * normals(seed, n, s, BLOCK_N).to(dtype)
            else:
                y += sigma * load_row(of_item(omega_d_item, s, 1), columns, mask_n).to(dtype)
            tl.store(y_ptr + (s * B + b) * N + columns, narrow(y, y_ptr), mask=mask_n)


@triton.jit
def sample_backward_kernel(
    grad_y_at,  # [B, S, N]
    d_at,  # [B, N], or [B, 1] if ONE_D
    omega_p_ptr,  # [S, B, R]
    omega_d_at,  # [B, S, N], or none if it is drawn
    seed_ptr,  # [B], read if ω_d is drawn
    grad_P_at,  # [B, CHUNKS, R, N]; as the others, none where it is not needed
    grad_d_ptr,  # [CHUNKS, B, N]: Σ grad_y ω_d, over 2√d unless ONE_D
    grad_omega_d_ptr,  # [S, B, N]
    sizes,  # S, B, N
    cut,  # programs for an item, columns for each, and CHUNKS that share the samples
    R: tl.constexpr,
    ONE_D: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """Σₛ grad_y ω_pᵀ, Σₛ grad_y ω_d / (2√d) and grad_y √d of one split of the columns of an item."""
    BLOCK_R: tl.constexpr = TILE.ROWS
    BLOCK_N: tl.constexpr = TILE.COLUMNS
    TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    dtype: tl.constexpr = tl.float64 if KIND == "float64" else tl.float32
    S, B, N = sizes
    SPLITS, length, CHUNKS = cut
    pid = tl.program_id(0)
    b = (pid // SPLITS).to(tl.int64)
    pid_s = pid % SPLITS
    chunk = tl.program_id(1) % CHUNKS
    own = tl.full((), 1, tl.int64) * chunk
    N = multiple(N, TILE.VECTORS)
    grad_y_item = of_item(grad_y_at, b, TILE.VECTORS)
    d_item = of_item(d_at, b, 1 if ONE_D else TILE.VECTORS)
    if grad_P_at is not None:
        grad_P_item = of_item(of_item(grad_P_at, b, TILE.ALIGN), own, 1)
    if omega_d_at is None:
        seed = tl.load(seed_ptr + b)
    else:
        omega_d_item = of_item(omega_d_at, b, 1)
    start = pid_s * length
    for n in range(start, min(start + length, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        if ONE_D:
            sigma = tl.full((BLOCK_N,), 1.0, dtype) * tl.sqrt(tl.load(d_item[0]).to(dtype))
        else:
            sigma = tl.sqrt(load_row(d_item, columns, mask_n, 1.0).to(dtype))
        for tile in tl.static_range(TILES):
            offs_r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
            grad_P = tl.zeros((BLOCK_R, BLOCK_N), dtype)
            grad_d = tl.zeros((BLOCK_N,), dtype)
            for sample in range(chunk, S, CHUNKS):
                s = tl.full((), 1, tl.int64) * sample
                grad_y = load_row(of_item(grad_y_item, s, 1), columns, mask_n).to(dtype)
                if grad_P_at is not None:
                    omega_p = tl.load(omega_p_ptr + (s * B + b) * R + offs_r, mask=offs_r < R, other=0.0).to(dtype)
                    grad_P += omega_p[:, None] * grad_y[None, :]
                if grad_d_ptr is not None and tile == 0:
                    if omega_d_at is None:
                        grad_d += grad_y * normals(seed, n, s, BLOCK_N).to(dtype)
                    else:
                        grad_d += grad_y * load_row(of_item(omega_d_item, s, 1), columns, mask_n).to(dtype)
                if grad_omega_d_ptr is not None and tile == 0:
                    grad = narrow(grad_y * sigma, grad_omega_d_ptr)
                    tl.store(grad_omega_d_ptr + (s * B + b) * N + columns, grad, mask=mask_n)
            if grad_P_at is not None:
                inside = (offs_r < R)[:, None] & mask_n[None, :]
                tile_ptr = from_column(grad_P_item, n) + tile_offsets(grad_P_item, offs_r, TILE)
                tl.store(tile_ptr, narrow(grad_P, grad_P_at[0]), mask=inside)
            if grad_d_ptr is not None and tile == 0:
                if not ONE_D:
                    grad_d = grad_d / (2.0 * sigma)
                tl.store(grad_d_ptr + (own * B + b) * N + columns, narrow(grad_d, grad_d_ptr), mask=mask_n)


@triton.jit
def noise_kernel(
    seed_ptr,  # [B]
    omega_d_ptr,  # [S, B, N]
    B,
    N,
    BLOCK_N: tl.constexpr,
):
    """ω_d of some columns of an item and a sample."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # s·B + b
    n = tl.program_id(0) % blocks * BLOCK_N
    offs_n = n + tl.arange(0, BLOCK_N)
    omega_d = normals(tl.load(seed_ptr + row % B), n, row // B, BLOCK_N)
    tl.store(omega_d_ptr + row * N + offs_n, narrow(omega_d, omega_d_ptr), mask=offs_n < N)


def _cut(kernel: str, N: int, R: int, by_column: bool, device: torch.device) -> tuple[Block, int, int, int]:
    """The launch, rows of a tile, programs for an item and columns for each."""
    block_r = launch.padded_rank(R) if R <= launch.FUSED_R else launch.TILED_R
    if kernel == "sample_backward" and block_r < R and not by_column:
        block = TILED_BLOCK
    else:
        block = launch.block(kernel, BLOCKS, block_r, by_column, device)
    columns = launch.split_columns(N, R, block.columns)
    return block, block_r, max(1, launch.ceil_div(N, columns)), columns


def _tile(block: Block, block_r: int, P: Tensor, *vectors: Tensor) -> Tile:
    align, of_vectors = launch.alignment(P, *vectors), launch.vector_alignment(P.shape[1], *vectors)
    return Tile(block_r, block.columns, align, of_vectors, launch.narrow_offsets(P, block.columns))


def noise(seed: Tensor, S: int, N: int, dtype: torch.dtype) -> Tensor:
    """ω_d [S, B, N], exactly what `rsample` draws for the seeds [B]; it has the resolution of float32 in any dtype."""
    B = len(seed)
    omega_d = torch.empty(S, B, N, dtype=dtype, device=seed.device)
    grid = (S * B * launch.ceil_div(N, NOISE_BLOCK),)
    launch.launch(noise_kernel, grid, 4, seed_ptr=seed, omega_d_ptr=omega_d, B=B, N=N, BLOCK_N=NOISE_BLOCK)
    return omega_d


def rsample(loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, omega_d: Tensor | None, seed: Tensor | None) -> Tensor:
    """y [S, B, N] in the dtype of `loc`, of loc [S or 1, B, N], ω_p [S, B, R], and ω_d [S, B, N] or a seed [B]."""
    if (omega_d is None) == (seed is None):
        raise ValueError("expected either omega_d or seed")
    S, (B, N, R) = omega_p.shape[0], P.shape
    y = loc.new_empty(S, B, N)
    block, block_r, splits, columns = _cut("sample", N, R, P.stride(1) == 1, P.device)
    chunks = launch.sample_chunks(S, N, R)
    vectors = (loc, d) if omega_d is None else (loc, d, omega_d)
    launch.launch(
        sample_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        loc_at=launch.samples_at(loc),
        P_at=launch.at(P.mT),
        d_at=launch.at(d),
        omega_p_ptr=omega_p.contiguous(),
        omega_d_at=None if omega_d is None else launch.samples_at(omega_d),
        seed_ptr=seed,
        y_ptr=y,
        sizes=(S, B, N),
        cut=(splits, columns, chunks),
        R=R,
        ONE_D=d.shape[1] == 1,
        KIND=launch.products(loc, P, d),
        TILE=_tile(block, block_r, P, *vectors),
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
    S, (B, N, R), one_d, kind = omega_p.shape[0], P.shape, d.shape[1] == 1, launch.products(grad_y, P, d)
    chunks = launch.sample_chunks(S, N, R) if need_P or need_d else 1
    work = torch.float64 if kind == "float64" else torch.float32
    parts_P = launch.empty_chunks(chunks, P, work) if need_P else None
    parts_d = d.new_empty(chunks, B, N, dtype=work if one_d or chunks > 1 else d.dtype) if need_d else None
    like = omega_d if omega_d is not None else grad_y
    grad_omega_d = like.new_empty(like.shape) if need_omega_d else None
    G = P if parts_P is None else parts_P[0]
    block, block_r, splits, columns = _cut("sample_backward", N, R, G.stride(1) == 1, P.device)
    launch.launch(
        sample_backward_kernel,
        (B * splits, chunks),
        block.num_warps,
        block.num_stages,
        grad_y_at=launch.samples_at(grad_y),
        d_at=launch.at(d),
        omega_p_ptr=omega_p.contiguous(),
        omega_d_at=None if omega_d is None else launch.samples_at(omega_d),
        seed_ptr=seed,
        grad_P_at=None if parts_P is None else launch.at(parts_P.permute(1, 0, 3, 2)),
        grad_d_ptr=parts_d,
        grad_omega_d_ptr=grad_omega_d,
        sizes=(S, B, N),
        cut=(splits, columns, chunks),
        R=R,
        ONE_D=one_d,
        KIND=kind,
        TILE=_tile(block, block_r, G, grad_y, d),
    )
    grad_P = P.new_empty(0) if parts_P is None else launch.sum_chunks(parts_P, P)
    if parts_d is None:
        grad_d = d.new_empty(0)
    elif one_d:
        grad_d = (parts_d.sum((0, 2), dtype=torch.float64)[:, None] / (2 * d.double().sqrt())).to(d.dtype)
    else:
        grad_d = launch.sum_chunks(parts_d, d)
    return grad_P, grad_d, like.new_empty(0) if grad_omega_d is None else grad_omega_d


__all__ = ["noise", "rsample", "rsample_backward"]
