# Triton's tuples are concatenated, and grow:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"
"""What the kernels of a linear factor share: sums over columns in either layout, and how work is cut.

A block of the features is a tile [BLOCK_K, BLOCK_N] of F; the row of ones is never loaded or padded for: its products
are sums. Columns of x, δ or z are numbered j = s·C + c, sample by sample; a few of them ride on each tile of F.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..linear_forms import one_value
from . import common

# Columns that one program takes from a tile of F: each has accumulators of its own in registers.
MAX_RIDERS = 4


@triton.jit
def fold(a, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Sums of WIDTH columns each [K, n] -> [K, n / WIDTH], within a thread in either layout.

    Neighbouring columns are one thread's where they are neighbours in memory; where features are, a thread has every
    so many columns.
    """
    if WIDTH == 1:
        return a
    elif CHANNELS_LAST:
        return tl.sum(tl.reshape(a, (a.shape[0], WIDTH, a.shape[1] // WIDTH)), 1)
    else:
        return tl.sum(tl.reshape(a, (a.shape[0], a.shape[1] // WIDTH, WIDTH)), 2)


@triton.jit
def nothing(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):
    """COUNT accumulators."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((ROWS, COLUMNS), KIND),)
    return out


def block(kernel: str, table: dict, block_k: int, F: Tensor) -> common.Block:
    """The launch of `kernel` for a padded number of features; `table` is as `common.block` takes it."""
    return common.block(kernel, table, block_k, F.stride(2) == 1, F.device)


def both(table: dict[int, common.Block]) -> dict:
    """A table for `common.block` whose launches suit either layout."""
    return {(block_k, by_column): block for block_k, block in table.items() for by_column in (True, False)}


def channels_last(F: Tensor) -> bool:
    """Whether the features of one pixel are neighbours in memory."""
    return F.stride(1) == 1 and F.shape[1] > 1


def width(align: int, last: bool, block_n: int, lanes: int) -> int:
    """WIDTH of `fold`: `lanes` is how many threads share the columns of a tile where features are neighbours."""
    if last:
        return max(1, block_n // lanes)
    return 4 if align >= 4 else 1


def columns_per_program(M: int, B: int, least: int, block_n: int) -> int:
    """Few enough for `common.PROGRAMS` programs, but at least `least`, so that what a program stores is little beside F
    (less than that where an item is small, `common.fewer`)."""
    wanted = min(max(M * B // common.PROGRAMS, common.fewer(least, M)), common.MAX_COLUMNS)
    return max(1, common.ceil_div(wanted, block_n)) * block_n


def riders(columns: int) -> tuple[int, int]:
    """How many columns ride on each tile, and how often the tiles are gone through for all of them."""
    rounds = max(1, common.ceil_div(columns, MAX_RIDERS))
    return common.ceil_div(columns, rounds), rounds


__all__ = ["block", "both", "channels_last", "columns_per_program", "fold", "nothing", "one_value", "riders", "width"]
