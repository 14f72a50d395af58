"""How work is cut into programs, how tensors are handed to a kernel, and the one place where kernels are started."""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.compiler import max_shared_mem

from ..capacitance import GOOD_ENOUGH, LOG_DET_TOLERANCE
from . import tuned
from .tiles import Placed

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
ROUNDING = {"tf32": 2.0**-21, "float32": 2.0**-23, "float64": 2.0**-52}


def tolerance(kind: str, R: int) -> float:
    """How much rounding may move log|C| before C is made again with float64 products, or of better rows."""
    return R * GOOD_ENOUGH[torch.float64] if kind == "float64" else LOG_DET_TOLERANCE


class Block(NamedTuple):
    """How a kernel is cut for one padded rank; found with `bench.static` (kernels/LOG.md), whose bounds they keep."""

    num_warps: int
    columns: int  # of one tile
    num_stages: int = 1


# Whether `tl.dot` takes float64, for NVIDIA's targets: Triton 3.7 does, 3.4 does not, and for AMD's neither does.
FLOAT64_DOT = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)

# Launches by padded rank, whether neighbouring columns are neighbours in memory, and the target where it differs.
Table = Mapping[tuple[int, bool] | tuple[int, bool, str], Block]
TiledTable = Mapping[bool | tuple[bool, str], Block]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(R: int) -> int:
    """A power of two, and at least the 16 that a matrix product needs."""
    return max(16, int(triton.next_power_of_2(R)))


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


def at(t: Tensor) -> tuple[Any, ...]:
    """A tensor as a kernel takes it: the pointer and the strides."""
    return t, *t.stride()


def samples_at(t: Tensor, by_channel: bool = False) -> tuple[Any, ...]:
    """Likewise vectors [S or 1, B, ...], with the items first; one that all samples share has the stride 0.

    By channel those of [S or 1, B, channels, pixels] are in the order of items, channels, samples, pixels.
    """
    stride, *rest = t.stride()
    stride = stride if t.shape[0] > 1 else 0
    return (t, *rest[:2], stride, *rest[2:]) if by_channel else (t, rest[0], stride, *rest[1:])


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
    """Columns per program, reduced for an item of N columns that is smaller than LARGE."""
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
    return int(max_shared_mem(device.index if device.index is not None else torch.cuda.current_device()))


def fused_rank(device: torch.device) -> int:
    """The widest rank that the backward kernels hold in one tile."""
    return FUSED_R if shared_memory(device) >= FUSED_SHARED else TILED_R


def block(kernel: str, table: Table, block_r: int, by_column: bool, device: torch.device) -> Block:
    """The launch of `kernel` for a padded rank, where `by_column` says that neighbouring columns of P are neighbours.

    What `pytest --benchmark --tune` has measured on this device comes first (`tuned`). `table` holds under (block_r,
    by_column) what suits sm_90, and under (block_r, by_column, target) what differs.
    """
    measured = tuned.entries(device).get((kernel, block_r, by_column))
    if measured is not None:
        return Block(*measured)
    own = table.get((block_r, by_column, target(device)))
    return own if own is not None else table[block_r, by_column]


def tiled_block(table: TiledTable, by_column: bool, device: torch.device) -> Block:
    """Likewise where tiles of TILED_R rows are walked over: under by_column, and (by_column, target) what differs."""
    own = table.get((by_column, target(device)))
    return own if own is not None else table[by_column]


def products(*tensors: Tensor) -> str:
    """How products are made: "float64", in split "tf32" where there are tensor cores for it, else "float32"."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "float64"
    return "float32" if target(tensors[0].device) in ("sm_75", "gfx") else "tf32"


def of_matrices(kind: str, device: torch.device) -> str:
    """The kind of a product of two loaded matrices: "outer" where `tl.dot` takes no float64."""
    return "outer" if kind == "float64" and (target(device) == "gfx" or not FLOAT64_DOT) else kind


def placed(block: Block, rows: int, like: Tensor, made: Tensor, vectors: Sequence[Tensor]) -> Placed:
    """The tiles of a kernel that reads a factor `like` [B, N, R] and writes `made`, which is laid out much as it is.

    Four values of 4 bytes are what one instruction loads.
    """
    by_column = like.stride(1) == 1
    J = 4 if by_column and block.columns >= 32 else 2
    return Placed(
        ROWS=rows,
        COLUMNS=block.columns,
        ALIGN=min(alignment(like, *vectors), alignment(made, *vectors)),
        NARROW=narrow_offsets(like, block.columns) and narrow_offsets(made, block.columns),
        BY_COLUMN=by_column,
        J=J,
        WARPS=max(1, min(block.num_warps, block.columns // (8 * J))),
        LIKE=made.stride() == like.stride(),
    )


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int = 1, **arguments: Any) -> None:
    """Every kernel is started here, so that a tool can see what is started (`bench.static` does).

    One stage by default: several programs on a multiprocessor cover the memory's latency for each other, and stages
    in shared memory cost registers for their addresses (kernels/LOG.md).
    """
    if all(grid):
        # Triton launches on the current device, which need not be that of the tensors.
        tensors = (v[0] if isinstance(v, tuple) else v for v in arguments.values())
        device = next(t.device for t in tensors if isinstance(t, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
