"""Peaks of training steps, measured on the CPU and predicted by `sosvae`'s model: `python -m bench.fit`.

`python -m bench.fit --table` prints the table of `docs/memory.md`, from the model.

Each point runs in a fresh process: one training step after Adam's states are there and after one step of a tiny
network, so that code loaded once is not charged to it. Two measures:

- allocator: every allocation and release of torch's CPU allocator, as its profiler reports them. Exact, and what the
  model counts; it includes the temporaries inside torch's operators and those of `lowrank_mvn`.
- resident: what the operating system says (`bench.peak`), which would show what goes past torch's allocator.

Both are above what is there before the step; weights, Adam's states and images are added to both.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

import sosvae

from . import peak, training
from .tables import markdown

__all__ = ["POINTS", "Point", "measure", "measure_allocator", "predict", "table"]


class Point(NamedTuple):
    """One training step: square RGB images of `side`, the paper's network times `width`."""

    side: int
    batch: int
    formulation: str
    checkpointing: str
    precision: str
    accumulate: int = 1
    rank: int = 25
    width: float = 1.0


POINTS = [
    Point(128, 2, "reference", "none", "float32"),
    Point(128, 2, "kernels", "none", "float32"),
    Point(128, 2, "linear", "none", "float32"),
    Point(128, 2, "linear", "blocks", "float32"),
    Point(128, 2, "linear", "stages", "float32"),
    Point(128, 2, "linear", "none", "bfloat16"),
    Point(128, 2, "linear", "stages", "bfloat16"),
    Point(128, 4, "linear", "none", "float32", accumulate=4),
    Point(64, 8, "reference", "none", "float32"),
    Point(128, 2, "reference", "blocks", "float32", rank=64),
    Point(256, 2, "reference", "none", "float32"),
    Point(256, 2, "kernels", "blocks", "float32"),
    Point(384, 1, "linear", "stages", "float32"),
    # Narrower: maps weigh more beside the weights, and a CPU without instructions for bfloat16 is very slow with it.
    Point(384, 1, "linear", "stages", "bfloat16", width=0.25),
    Point(256, 2, "linear", "stages", "bfloat16", width=0.25),
    Point(192, 1, "linear", "blocks", "bfloat16", width=0.5),
]


def _config(point: Point) -> sosvae.Config:
    return sosvae.Config(
        data=sosvae.DataConfig(height=point.side, width=point.side, channels=3),
        model=sosvae.ModelConfig(rank=point.rank, width=point.width),
        training=sosvae.TrainingConfig(
            batch=point.batch,
            accumulate=point.accumulate,
            checkpointing=point.checkpointing,  # type: ignore[arg-type]
            precision=point.precision,  # type: ignore[arg-type]
            mean_only_steps=0,
            device="cpu",
        ),
    )


def predict(point: Point) -> int:
    """Bytes, by the model."""
    model = training.memory.StepMemory(_config(point), point.formulation)
    return model.peak(point.side, point.batch, point.accumulate).total


def measure(point: Point) -> dict[str, float]:
    """Bytes at the peak of one step by both accounts; to be called in a fresh process."""
    _prepared(point._replace(side=32, width=0.125))[0]()
    step, there = _prepared(point)
    resident, _ = peak.peak_above(step, "cpu")
    return {"allocator": there + _allocator_peak(step), "resident": there + resident}


def measure_allocator(point: Point) -> int:
    """Bytes at the peak of one step by torch's allocator, which other calls in the process do not change."""
    step, there = _prepared(point)
    return there + _allocator_peak(step)


def _prepared(point: Point) -> tuple[Callable[[], None], int]:
    """A training step with Adam's states made, and the bytes that are there before it."""
    config = _config(point)
    state, take = training.start(config, "cpu", point.formulation)
    x = torch.rand(point.batch, *config.image_shape)
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)  # so that this step of Adam moves nothing
    state.optimizer.step()
    state.optimizer.zero_grad()

    def step() -> None:
        take(x)
        state.optimizer.zero_grad()

    weights, buffers = (sum(t.nbytes for t in ts) for ts in (state.model.parameters(), state.model.buffers()))
    return step, 3 * weights + buffers + x.nbytes


def _allocator_peak(call: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator has given out at once in `call`, above what it had before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    moments: list[tuple[int, int, int]] = []

    def walk(nodes: Any) -> None:
        for node in nodes:
            if node.typed[0].name == "Allocation":
                moments.append((node.start_time_ns, node.typed[1].ptr, node.typed[1].alloc_size))
            walk(node.children)

    walk(profiled.profiler.kineto_results.experimental_event_tree())
    alive: dict[int, int] = {}
    now = highest = 0
    for _, pointer, size in sorted(moments):
        if size > 0:
            alive[pointer] = size
            now += size
        else:
            now -= alive.pop(pointer, 0)  # what was there before is not counted when it goes, either
        highest = max(highest, now)
    return highest


# The table of docs/memory.md: title, formulation, and what is set. Batch 4 at once, but for the last.
COLUMNS: list[tuple[str, str, dict[str, Any]]] = [
    ("reference formulation", "reference", {}),
    ("kernels", "kernels", {}),
    ("linear factor", "linear", {}),
    ("linear factor, checkpointing, bfloat16", "linear", {"checkpointing": "stages", "precision": "bfloat16"}),
    ("and one image at a time", "linear", {"checkpointing": "stages", "precision": "bfloat16", "accumulate": 4}),
]
BUDGETS = (4, 8, 16, 80)


def table() -> str:
    """Largest sides of square RGB images that the paper's network trains on at batch 4: docs/memory.md."""
    preset = sosvae.PRESETS["celeba"][1]
    rows = [[f"{budget} GiB"] for budget in BUDGETS]
    for _, formulation, settings in COLUMNS:
        config = dataclasses.replace(preset, training=dataclasses.replace(preset.training, batch=4, **settings))
        for row, budget in zip(rows, BUDGETS, strict=True):
            row.append(str(training.fit.largest_side(config, formulation, budget * training.fit.GIB)))
    heads = ["memory", *(title for title, _, _ in COLUMNS)]
    return markdown(heads, ["---"] * len(heads), *rows)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of points, from 0")
    parser.add_argument("--table", action="store_true", help="the table of docs/memory.md, from the model alone")
    options = parser.parse_args(args)
    if options.table:
        print(table())
        return 0
    heads = [*Point._fields, "model", "allocator", "resident"]
    print(markdown(heads, ["---"] * len(heads)))
    os.environ.update(peak.ENVIRONMENT)  # of the processes to come
    worst = 0.0
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with fresh:
        for point in [POINTS[i] for i in (range(len(POINTS)) if options.only is None else options.only)]:
            measured, model = fresh.submit(measure, point).result(), predict(point)
            worst = max(worst, abs(model / measured["allocator"] - 1))
            cells = [f"{size / 2**20:.0f} MiB, {model / size:.3f}" for size in measured.values()]
            print(markdown([*map(str, point), f"{model / 2**20:.0f} MiB", *cells]), flush=True)
    print(f"\nbehind each measure the model's figure over it; farthest from the allocator's: {worst:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
