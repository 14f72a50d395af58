"""Peaks of training steps, measured on the CPU and as `sosvae.memory` counts them: `python -m bench.fit`.

`python -m bench.fit --table` prints the README's table, from the model.

Each point runs in a fresh process: one step of `sosvae.trainer.train_step` after Adam's states are there and after one
of a tiny network, so that code loaded once is not charged to it. Two measures:

- allocator: every allocation and release of torch's CPU allocator, as its profiler reports them. Exact, and what the
  model counts; it holds the temporaries inside torch's operators and those of `lowrank_mvn`.
- resident: what the operating system says (`bench.memory`, with a C library that gives back what is freed), which
  would show what goes past torch's allocator.

Both above what is there before the step; weights, Adam's states and images are added to both.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from . import memory

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


def _config(point: Point) -> Any:
    from sosvae import Config, DataConfig, ModelConfig, TrainingConfig

    return Config(
        data=DataConfig(height=point.side, width=point.side, channels=3),
        model=ModelConfig(rank=point.rank, width=point.width),
        training=TrainingConfig(
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
    from sosvae.memory import StepMemory

    return StepMemory(_config(point), point.formulation).peak(point.side, point.batch, point.accumulate).total


def measure(point: Point) -> dict[str, int]:
    """Bytes at the peak of one step by both accounts; to be called in a fresh process."""
    _prepared(point._replace(side=32, width=0.125))[0]()
    step, there = _prepared(point)
    resident, _ = memory.peak_above(step, "cpu")
    return {"resident": there + resident, "allocator": there + _allocator_peak(step)}


def measure_allocator(point: Point) -> int:
    """Bytes at the peak of one step by torch's allocator, which other calls in the process do not change."""
    step, there = _prepared(point)
    return there + _allocator_peak(step)


def _prepared(point: Point) -> tuple[Callable[[], None], int]:
    """A training step, and the bytes that are there before it."""
    import torch

    from sosvae.objective import limits
    from sosvae.trainer import train_step

    config = _config(point)
    state = _state(config, point.formulation)
    x = torch.rand(point.batch, *config.image_shape)

    def step() -> None:
        train_step(state, x, limits(config), config)
        state.optimizer.zero_grad()

    weights, buffers = (sum(t.nbytes for t in ts) for ts in (state.model.parameters(), state.model.buffers()))
    return step, 3 * weights + buffers + x.nbytes


def _state(config: Any, formulation: str) -> Any:
    """A state of training with Adam's states made."""
    import torch

    from sosvae.memory import formulated
    from sosvae.trainer import State

    state = State(config, torch.device("cpu"))
    state.model = formulated(config, formulation)
    state.optimizer = torch.optim.Adam(state.model.parameters(), lr=0.0, fused=True)
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state


def _allocator_peak(call: Any) -> int:
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

    walk(profiled.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    alive: dict[int, int] = {}
    now = peak = 0
    for _, pointer, size in sorted(moments):
        if size > 0:
            alive[pointer] = size
            now += size
        else:
            now -= alive.pop(pointer, 0)  # what was there before is not counted when it goes, either
        peak = max(peak, now)
    return peak


# The README's table: title, formulation, and what is set. Batch 4 at once, but for the last.
COLUMNS = [
    ("reference formulation", "reference", {}),
    ("kernels", "kernels", {}),
    ("linear factor", "linear", {}),
    ("linear factor, checkpointing, bfloat16", "linear", {"checkpointing": "stages", "precision": "bfloat16"}),
    ("and one image at a time", "linear", {"checkpointing": "stages", "precision": "bfloat16", "accumulate": 4}),
]
BUDGETS = (4, 8, 16, 80)


def table() -> str:
    """Largest sides of square RGB images that the paper's network trains on at batch 4, as the README shows them."""
    from sosvae import PRESETS
    from sosvae.fit import GIB, largest_side

    preset = PRESETS["celeba"][1]
    rows: list[list[str]] = [[f"{budget} GiB"] for budget in BUDGETS]
    for _, formulation, settings in COLUMNS:
        training = dataclasses.replace(preset.training, batch=4, **settings)  # type: ignore[arg-type]
        config = dataclasses.replace(preset, training=training)
        for row, budget in zip(rows, BUDGETS, strict=True):
            row.append(str(largest_side(config, formulation, budget * GIB)))
    heads = ["memory", *(title for title, _, _ in COLUMNS)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of points, from 0")
    parser.add_argument("--table", action="store_true", help="the README's table, from the model alone")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.point is not None:
        print(json.dumps(measure(Point(**json.loads(options.point)))))
        return 0
    if options.table:
        print(table())
        return 0
    heads = [*("side", "batch", "width", "R"), "formulation", "checkpointing", "precision", "accumulate"]
    print("|", " | ".join([*heads, "model", "allocator", "resident"]), "|")
    print("|" + "---|" * 11)
    worst = 0.0
    for i, point in enumerate(POINTS):
        if options.only is not None and i not in options.only:
            continue
        command = [sys.executable, "-m", "bench.fit", "--point", json.dumps(point._asdict())]
        environment = {**os.environ, **memory.ENVIRONMENT}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        model = predict(point)
        ratios = {name: model / size for name, size in measured.items()}
        worst = max(worst, abs(ratios["allocator"] - 1))
        cells = [f"{measured[name] / 2**20:.0f} MiB, {ratios[name]:.3f}" for name in ("allocator", "resident")]
        shape = [
            point.side,
            point.batch,
            point.width,
            point.rank,
            point.formulation,
            point.checkpointing,
            point.precision,
        ]
        print(
            "|", " | ".join(map(str, [*shape, point.accumulate, f"{model / 2**20:.0f} MiB", *cells])), "|", flush=True
        )
    print(f"\nbehind each measure the model's figure over it; farthest from the allocator's: {worst:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
