# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
"""What the kernels of a linear factor share: sums over columns in either layout, and how work is cut.

A block of the features is a tile [rows, columns] of F; the row of ones is never loaded or padded for: its products
are sums. Columns of x, δ or z are numbered j = s · channels + c, sample by sample; a few ride on each tile of F.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....device import launch

# Columns that one program takes from a tile of F: each has accumulators of its own in registers.
MAX_RIDERS = 4


class Tile(NamedTuple):
    """What is known of a kernel's tiles of F when it is compiled."""

    ROWS: int
    COLUMNS: int
    ALIGN: int  # as in `tiles.Tile`, of F and of the vectors
    NARROW: bool
    LAST: bool  # whether the features of one pixel are neighbours in memory
    WIDTH: int  # columns that are added up within a thread
    PIECES: int = 1  # tiles that are taken together


@triton.jit
def nothing(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """COUNT accumulators."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, COLUMNS), DTYPE),)
    return out


def block(kernel: str, table: launch.Table, block_k: int, F: Tensor) -> launch.Block:
    """The launch of `kernel` for a padded number of features; `table` is as `launch.block` takes it."""
    return launch.block(kernel, table, block_k, F.stride(2) == 1, F.device)


def both(table: dict[int, launch.Block]) -> launch.Table:
    """A table for `launch.block` whose launches suit either layout."""
    return {(block_k, by_column): block for block_k, block in table.items() for by_column in (True, False)}


def channels_last(F: Tensor) -> bool:
    """Whether the features of one pixel are neighbours in memory."""
    return F.stride(1) == 1 and F.shape[1] > 1


def tile(F: Tensor, vectors: Sequence[Tensor], block: launch.Block, rows: int, pieces: int = 1) -> Tile:
    """Tiles of F beside `vectors`."""
    align, last = launch.alignment(F.mT, *vectors), channels_last(F)
    lanes = min(block.columns, 32 * block.num_warps // max(1, rows // 4))  # that share the columns of a tile
    width = max(1, block.columns // lanes) if last else 4 if align >= 4 else 1
    return Tile(rows, block.columns, align, launch.narrow_offsets(F.mT, block.columns), last, width, pieces)


def columns_per_program(pixels: int, B: int, least: int, block_n: int) -> int:
    """Few enough for `launch.PROGRAMS` programs, but at least `least`, so that what a program stores is little beside F
    (less than that where an item is small, `launch.fewer`)."""
    wanted = min(max(pixels * B // launch.PROGRAMS, launch.fewer(least, pixels)), launch.MAX_COLUMNS)
    return max(1, launch.ceil_div(wanted, block_n)) * block_n


def riders(columns: int) -> tuple[int, int]:
    """How many columns ride on each tile, and how often the tiles are gone through for all of them."""
    rounds = max(1, launch.ceil_div(columns, MAX_RIDERS))
    return launch.ceil_div(columns, rounds), rounds


__all__ = ["MAX_RIDERS", "Tile", "block", "both", "channels_last", "columns_per_program", "nothing", "riders", "tile"]
