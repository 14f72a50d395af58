"""The largest image side and batch that train within a budget of bytes, for each way of taking a step."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, get_args, get_type_hints

from ..config import Config, TrainingConfig
from ..models import heads
from .memory import Peak, StepMemory

__all__ = ["Budget", "Fit", "fit", "largest_side"]

GIB = 2**30
SIDES = range(16, 1 << 16, 8)
BATCHES = range(1, 1 << 20)


class Budget(NamedTuple):
    """All bytes, and those of them that are not for tensors."""

    memory: float
    reserve: float

    @classmethod
    def of(cls, memory: float, reserve: float | None = None) -> "Budget":
        """From GiB; a tenth, and at least 0.5 GiB, is kept in reserve where nothing is said.

        Raises:
            ValueError: a number out of range, or nothing left for tensors.
        """
        if not 0 < memory < math.inf:
            raise ValueError(f"memory is {memory:g} GiB, expected a positive number")
        reserve = max(0.5, memory / 10) if reserve is None else reserve
        if not 0 <= reserve < memory:
            raise ValueError(
                f"reserve is {reserve:g} GiB, expected at least 0 and less than the memory, {memory:g} GiB"
            )
        return cls(memory * GIB, reserve * GIB)

    @property
    def tensors(self) -> float:
        """What torch's allocator may hold."""
        return self.memory - self.reserve


class Fit(NamedTuple):
    """The most that trains one way, and the peak of its step; 0 and none where not even the least does."""

    formulation: str  # the head's name where it has one way alone
    precision: str
    checkpointing: str
    side: int  # of square images, at the configuration's batch, all of it at once
    side_peak: Peak | None
    accumulated_side: int  # the same with one image in a micro-batch
    accumulated_peak: Peak | None
    batch: int  # images of the configuration's size at once; accumulation makes batches of any multiple of it
    batch_peak: Peak | None


def fit(config: Config, budget: float) -> list[Fit]:
    """Every combination of formulation, precision and checkpointing, for the network and batch of `config`.

    Args:
        config: its own precision, checkpointing and accumulation are left aside.
        budget: bytes that torch's allocator may hold.

    Raises:
        ValueError: the budget is too small for a single image of the smallest size.
    """
    fits, least = [], math.inf
    for formulation, way in ways(config):
        step, t = StepMemory(way, formulation or "linear"), way.training
        least = min(least, step.peak(SIDES[0]).total)
        found = (
            *largest(SIDES, partial(step.peak, batch=t.batch), budget),
            *largest(SIDES, partial(step.peak, batch=t.batch, accumulate=t.batch), budget),
            *largest(BATCHES, partial(step.peak, None), budget),
        )
        fits.append(Fit(formulation or config.model.head, t.precision, t.checkpointing, *found))
    if least > budget:
        raise ValueError(
            f"{budget / GIB:g} GiB are left for tensors, but a step on one image of {SIDES[0]}×{SIDES[0]} "
            f"takes {least / GIB:.2f}"
        )
    return fits


def ways(config: Config) -> Iterator[tuple[str | None, Config]]:
    """The head's formulations (`None`: there is one), and `config` in each precision and kind of checkpointing."""
    hints = get_type_hints(TrainingConfig)
    for formulation in heads.find(config.model.head).formulations or (None,):
        for precision in get_args(hints["precision"]):
            for checkpointing in get_args(hints["checkpointing"]):
                way = {"precision": precision, "checkpointing": checkpointing, "accumulate": 1}
                yield formulation, config.replace(training=way)


def largest(sizes: range, peak: Callable[[int], Peak], budget: float) -> tuple[int, Peak | None]:
    """The last of ascending sizes whose peak is within the budget, by bisection, and that peak."""
    low, high = -1, len(sizes)  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(sizes[middle]).total <= budget else (low, middle)
    return (sizes[low], peak(sizes[low])) if low >= 0 else (0, None)


def largest_side(config: Config, formulation: str, budget: float) -> int:
    """The largest side of square images that `config` trains on, as it stands but for their size; 0: none."""
    t = config.training
    peak = partial(StepMemory(config, formulation).peak, batch=t.batch, accumulate=t.accumulate)
    return largest(SIDES, peak, budget)[0]
