"""What trains within a memory budget: the largest image side and batch for each way of taking a step."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

from .config import Config, TrainingConfig
from .memory import FORMULATIONS, Peak, StepMemory

__all__ = ["Budget", "Fit", "fit", "largest_side", "table", "to_json"]

GIB = 2**30
SIDES = range(16, 1 << 16, 8)
BATCHES = range(1, 1 << 20)


class Budget(NamedTuple):
    """Memory, and what of it is not for tensors, in bytes."""

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

    formulation: str  # "pixelwise" where the head is
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
        memory, batch = StepMemory(way, formulation), way.training.batch
        least = min(least, memory.peak(SIDES[0]).total)

        def at_once(side: int, memory: StepMemory = memory, batch: int = batch) -> Peak:
            return memory.peak(side, batch)

        def one_by_one(side: int, memory: StepMemory = memory, batch: int = batch) -> Peak:
            return memory.peak(side, batch, batch)

        def images(number: int, memory: StepMemory = memory) -> Peak:
            return memory.peak(None, number)

        name = formulation if config.model.head == "structured" else config.model.head
        t = way.training
        found = (
            *largest(SIDES, at_once, budget),
            *largest(SIDES, one_by_one, budget),
            *largest(BATCHES, images, budget),
        )
        fits.append(Fit(name, t.precision, t.checkpointing, *found))
    if least > budget:
        raise ValueError(
            f"{budget / GIB:g} GiB are left for tensors, but a step on one image of {SIDES[0]}×{SIDES[0]} "
            f"takes {least / GIB:.2f}"
        )
    return fits


def ways(config: Config) -> Iterator[tuple[str, Config]]:
    """Formulations, and `config` in each precision and with each kind of checkpointing."""
    hints = get_type_hints(TrainingConfig)
    for formulation in FORMULATIONS if config.model.head == "structured" else ("linear",):
        for precision in get_args(hints["precision"]):
            for checkpointing in get_args(hints["checkpointing"]):
                t = dataclasses.replace(config.training, precision=precision, checkpointing=checkpointing, accumulate=1)
                yield formulation, dataclasses.replace(config, training=t)


def largest(sizes: range, peak: Callable[[int], Peak], budget: float) -> tuple[int, Peak | None]:
    """The last of ascending sizes whose peak is within the budget, by bisection, and that peak."""
    low, high = -1, len(sizes)  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(sizes[middle]).total <= budget else (low, middle)
    return (sizes[low], peak(sizes[low])) if low >= 0 else (0, None)


def largest_side(config: Config, formulation: str, budget: float) -> int:
    """The largest side of square images that `config` trains on, as it stands but for their size; 0: none."""
    memory, t = StepMemory(config, formulation), config.training
    return largest(SIDES, lambda side: memory.peak(side, t.batch, t.accumulate), budget)[0]


def table(fits: list[Fit], config: Config, budget: Budget) -> str:
    """For people."""
    channels, height, width = config.image_shape
    batch = config.training.batch
    colour = "RGB" if channels == 3 else "grey"
    heads = [
        f"side, batch {batch}",
        f"side, accumulate {batch}",
        f"batch, {height}×{width}",
    ]
    lines = [
        f"within {budget.memory / GIB:g} GiB, {budget.reserve / GIB:g} of them in reserve, {colour} images: "
        "the largest, GiB at the peak of a step, and what most of it is",
        "",
        f"{'likelihood':<24}{'precision':<11}{'checkpointing':<15}" + "".join(f"{head:<27}" for head in heads),
    ]
    for f in fits:
        cells = [(f.side, f.side_peak), (f.accumulated_side, f.accumulated_peak), (f.batch, f.batch_peak)]
        shown = [f"{n:>6}  {p.total / GIB:6.2f} {p.binds}" if p else f"{'–':>6}" for n, p in cells]
        name = FORMULATIONS.get(f.formulation, f.formulation)
        lines.append(f"{name:<24}{f.precision:<11}{f.checkpointing:<15}" + "".join(f"{cell:<27}" for cell in shown))
    lines += [
        "",
        "weights: with gradients and Adam's states (those of the decoder's first layer grow with the image);",
        "network: what encoder and decoder keep and write; likelihood: P and its temporaries.",
        "accumulate: one image at a time; batches are then any multiple of the last column. Sides: multiples of 8.",
        "A model (sosvae.memory) of tensors as torch's allocator holds them. What else there is (the process,",
        "buffers of libraries, a GPU's context, fragmentation) has to fit into the reserve (--reserve).",
    ]
    return "\n".join(line.rstrip() for line in lines)


def to_json(fits: list[Fit], config: Config, budget: Budget) -> dict[str, Any]:
    """For programs; memory in bytes."""

    def plain(value: Any) -> Any:
        return value._asdict() | {"binds": value.binds} if isinstance(value, Peak) else value

    return {
        "memory": int(budget.memory),
        "reserve": int(budget.reserve),
        "images": list(config.image_shape),
        "batch": config.training.batch,
        "fits": [{name: plain(value) for name, value in f._asdict().items()} for f in fits],
    }
