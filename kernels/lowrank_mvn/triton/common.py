"""What the kernels share: reading blocks, products in split tf32, and how work is cut into programs.

A block of P is a tile [BLOCK_R, BLOCK_N] in every kernel, whatever the layout in memory: Triton lays the threads
out along the dimension whose stride is 1. Offsets are int64 before the first multiply.
"""

import functools
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import max_shared_mem

from . import tuned

# The widest rank that is held in one tile; beyond, kernels walk over tiles of TILED_R rows.
FUSED_R = 128
TILED_R = 64
# Bytes of shared memory without which TILED_R takes FUSED_R's place in the backward kernels, which hold two matrices
# of float32 there: 147 456 at 128 rows. Data-centre GPUs from sm_80 on have them, a T4 and consumers' cards do not.
FUSED_SHARED = 150_000

# Columns that one program adds up in float32, if R does not ask for more (`split_columns`). Tensor cores cut off what
# does not fit the accumulator: 2⁻²⁴ of it per 8 columns on average, 4e-6 after 1024. Partial sums are added in float64.
MIN_COLUMNS, MAX_COLUMNS = 1024, 2048
# Programs that fill a large GPU several times over.
PROGRAMS = 1024
# Blocks of columns that one program walks over at most: Π of so many mantissas, each below 2, is a finite float64.
MAX_BLOCKS = 1000
# Pixels of an item at most: what a program counts columns with is an int32.
MAX_PIXELS = 2**31 - 2**20
# Below so many columns of an item a program has fewer, but not below LEAST_COLUMNS.
LARGE, LEAST_COLUMNS = 12_288, 256

# Relative error of a sum of products, by how they are made: that of the split into 11 bits and the rest, or of float32.
ROUNDING = {"tf32": 2.0**-21, "float32": 2.0**-23}


@triton.jit
def aligned(numbers, ALIGN: tl.constexpr):
    """`numbers`, multiples of ALIGN, so that the compiler knows it: Triton 3.7 drops `multiple_of` on an argument."""
    if ALIGN == 1:
        return numbers
    known = ()
    for i in tl.static_range(len(numbers)):  # neither starred expressions nor annotations are Triton's
        known = known + (numbers[i] // ALIGN * ALIGN,)  # type: ignore[assignment]  # noqa: RUF005
    return known


@triton.jit
def tile_offsets(offs_r, stride_pr, stride_pn, NARROW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile from its first column; they do not change from step to step, and with NARROW fit an int32."""
    local = tl.arange(0, BLOCK_N)
    if NARROW:
        return (offs_r * stride_pr)[:, None] + (local * stride_pn)[None, :]
    else:  # both branches would be compiled without it
        return (offs_r.to(tl.int64) * stride_pr)[:, None] + (local.to(tl.int64) * stride_pn)[None, :]


@triton.jit
def load_tile(P_ptr, offs_r, n, N, stride_pr, stride_pn, R: tl.constexpr, NARROW: tl.constexpr, BLOCK_N: tl.constexpr):
    """P[n : n + BLOCK_N, offs_r] as [BLOCK_R, BLOCK_N] in its own dtype, zero outside."""
    offsets = tile_offsets(offs_r, stride_pr, stride_pn, NARROW, BLOCK_N)
    mask = (offs_r < R)[:, None] & ((n + tl.arange(0, BLOCK_N)) < N)[None, :]
    return tl.load(P_ptr + tl.full((), 1, tl.int64) * n * stride_pn + offsets, mask=mask, other=0.0)


@triton.jit
def scaled(P, scale, n, N, KIND: tl.constexpr, OUTER: tl.constexpr = False):
    """P·scale of a tile [R, n], its first column n, in the dtype KIND, for `tl.dot`.

    In float64 behind a branch that is always taken: where Triton 3.7 sees that an operand of sm_80's or sm_90's float64
    product was loaded with 16 bits, it lays it out in pairs, and then fails to compile the product. With OUTER there is
    no such product, and of the branch gfx942 fails to compile some.
    """
    if KIND == tl.float64 and not OUTER:  # noqa: SIM300  (not a constant before it is compiled)
        out = tl.zeros(P.shape, KIND)
        if n < N:
            out = P.to(KIND) * scale
        return out
    else:
        return P.to(KIND) * scale


@triton.jit
def converted(P, n, N, KIND: tl.constexpr):
    """As `scaled`, by nothing: only half precision has to be hidden."""
    if P.dtype.primitive_bitwidth == 16:
        return scaled(P, 1.0, n, N, KIND)
    else:
        return P.to(KIND)


@triton.jit
def split(a):
    """a = high + low: high has the 11 significant bits that a tensor core reads, low is exact in float32."""
    bits = a.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def reciprocal(d):
    """1/d in float64 without a division: one Newton step from float32 leaves a relative error of 1e-14."""
    if d.dtype == tl.float64:
        return 1.0 / d
    else:
        d64 = d.to(tl.float64)
        guess = (1.0 / d.to(tl.float32)).to(tl.float64)
        return guess * (2.0 - d64 * guess)


@triton.jit
def narrow(a, like_ptr):
    """`a` in the dtype that `like_ptr` points to; half precision by way of float32."""
    if like_ptr.dtype.element_ty == tl.float64:
        return a.to(tl.float64)
    else:
        return a.to(tl.float32).to(like_ptr.dtype.element_ty)


@triton.jit
def fold(a, WIDTH: tl.constexpr):
    """Sums over WIDTH neighbouring columns [R, n] -> [R, n / WIDTH]: within a thread where it holds them all."""
    if WIDTH == 1:
        return a
    else:
        return tl.sum(tl.reshape(a, (a.shape[0], a.shape[1] // WIDTH, WIDTH)), 2)


class Block(NamedTuple):
    """How a kernel is cut for one padded rank; found with `bench.static` (kernels/LOG.md), whose bounds they keep."""

    num_warps: int
    columns: int  # of one tile
    num_stages: int = 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(R: int) -> int:
    """A power of two, and at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(R))


def split_columns(N: int, R: int, block_n: int) -> int:
    """Columns per program: many enough that what is stored per program (R² values) stays below 4 % of P.

    An item of fewer than LARGE columns is cut into as many programs as one of LARGE: there latency counts, not bytes.
    The number does not depend on the batch, so that neither do an item's results.
    """
    wanted = fewer(max(MIN_COLUMNS, 40 * R), N)
    return min(ceil_div(wanted, block_n), MAX_BLOCKS) * block_n


def sample_chunks(S: int, N: int, R: int) -> int:
    """Programs that share the samples of the same columns: several where the columns of an item do not fill a GPU.

    Each has so many samples that partial sums of the size of P are little beside x (8R samples a program: an eighth).
    As in `split_columns` the number does not depend on the batch.
    """
    programs = ceil_div(N, split_columns(N, R, 1))
    return max(1, min(ceil_div(PROGRAMS, max(1, programs)), S // max(64, 8 * R)))


def empty_chunks(chunks: int, t: Tensor, dtype: torch.dtype) -> Tensor:
    """[chunks, *t.shape] for partial sums of a gradient of P or of vectors; if there is one, the gradient itself."""
    if t.dim() < 3:
        return t.new_empty(chunks, *t.shape, dtype=t.dtype if chunks == 1 else dtype)
    if chunks == 1:  # whose strides are those of P
        return torch.empty_like(t)[None]
    B, N, R = t.shape
    sizes = (B, R, N) if t.stride(1) == 1 else (B, N, R)
    parts = t.new_empty(chunks, *sizes, dtype=dtype)
    return parts.mT if t.stride(1) == 1 else parts


def sum_chunks(parts: Tensor, t: Tensor) -> Tensor:
    """The gradient of `t`."""
    if parts.shape[0] == 1:
        return parts[0]
    return parts.sum(0).to(t.dtype) if t.dim() < 3 else torch.empty_like(t).copy_(parts.sum(0))


def fewer(columns: int, N: int) -> int:
    """What LARGE columns are cut into, for an item of N."""
    if N > MAX_PIXELS:
        raise ValueError(f"an item has {N} pixels, the kernels take at most {MAX_PIXELS}")
    return max(min(columns, ceil_div(columns * N, LARGE)), min(columns, LEAST_COLUMNS))


def alignment(P: Tensor, *vectors: Tensor) -> int:
    """Columns of P that may be read at once: a power of two that divides N and the strides of rows, at most 16.

    Triton finds out by itself only about multiples of 16 (116 412 is one of 4). What is read beside P, `vectors`, has
    to allow it too, so that all are laid out alike.
    """
    if P.stride(1) != 1 or (P.stride(2) == 1 and P.shape[2] != 1):
        return 1
    return min(divisor(P.stride(0), P.stride(2)), vector_alignment(P.shape[1], *vectors))


def vector_alignment(N: int, *vectors: Tensor) -> int:
    """Likewise of x, μ and d alone, which are vectors over the columns whatever the layout of P."""
    numbers = [N]
    for t in vectors:
        if t.shape[-1] != 1:
            if t.stride(-1) != 1:
                return 1
            numbers += t.stride()[:-1]
    return divisor(*numbers)


def divisor(*numbers: int) -> int:
    """The largest power of two, at most 16, that divides all."""
    return math.gcd(16, *numbers)


def narrow_offsets(P: Tensor, block_n: int) -> bool:
    """Whether the offsets inside a tile fit an int32 (the offset of the tile itself is always an int64)."""
    return abs(P.stride(1)) * block_n + abs(P.stride(2)) * 2 * P.shape[2] < 2**31


@functools.cache
def target(device: torch.device) -> str:
    """The newest target that kernels are tuned for and that the device is not older than; "gfx" for any of AMD's."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: what is tested is what runs
    if torch.version.hip:
        return "gfx"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (12, 0):
        return "sm_80"  # consumers' cards, whose tensor cores are not those of sm_100
    return next((f"sm_{a}{b}" for a, b in ((10, 0), (9, 0), (8, 0)) if capability >= (a, b)), "sm_75")


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use; in the interpreter those of sm_90, whose launches it runs."""
    if device.type != "cuda":
        return 232_448
    return max_shared_mem(device.index if device.index is not None else torch.cuda.current_device())


def fused_rank(device: torch.device) -> int:
    """The widest rank that the backward kernels hold in one tile."""
    return FUSED_R if shared_memory(device) >= FUSED_SHARED else TILED_R


def block(kernel: str, table: dict, block_r: int, by_column: bool, device: torch.device) -> Block:
    """The launch of `kernel` for a padded rank, where `by_column` says that neighbouring columns of P are neighbours.

    What `pytest --benchmark --tune` has measured on this device comes first (`tuned`). `table` holds under (block_r,
    by_column) what suits sm_90, and under (block_r, by_column, target) what differs.
    """
    measured = tuned.entries(device).get((kernel, block_r, by_column))
    if measured is not None:
        return Block(*measured)
    own = table.get((block_r, by_column, target(device)))
    return own if own is not None else table[block_r, by_column]


def tiled_block(table: dict, by_column: bool, device: torch.device) -> Block:
    """Likewise where tiles of TILED_R rows are walked over: under by_column, and (by_column, target) what differs."""
    own = table.get((by_column, target(device)))
    return own if own is not None else table[by_column]


def products(*tensors: Tensor) -> str:
    """How products are made: "float64", in split "tf32" where there are tensor cores for it, else "float32"."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64"
    return "float32" if target(tensors[0].device) in ("sm_75", "gfx") else "tf32"


def matrix_float64(device: torch.device) -> bool:
    """Whether `tl.dot` takes float64: Triton 3.7 compiles it for NVIDIA's targets, not for AMD's."""
    return target(device) != "gfx"


def launch(kernel, grid: tuple[int, ...], num_warps: int, num_stages: int = 1, **arguments) -> None:
    """Every kernel is started here, so that a tool can see what is started (`bench.static` does).

    One stage by default: several programs on a multiprocessor cover the memory's latency for each other, and stages
    in shared memory cost registers for their addresses (kernels/LOG.md).
    """
    if all(grid):
        # Triton launches on the current device, which need not be that of the tensors.
        device = next(t.device for t in arguments.values() if isinstance(t, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
