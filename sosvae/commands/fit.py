"""The largest images and batches that train within so many GiB (--memory)."""

import json
from dataclasses import dataclass, field
from typing import Any

from ..config import Config
from ..planning.fit import GIB, Budget, Fit, fit
from ..planning.memory import FORMULATIONS, Peak
from .base import Settings, parse, preset

USAGE = "[PRESET] [options]"


@dataclass(frozen=True)
class Options:
    """The largest square images, and the most images of the preset's size, that train within a memory budget.

    The preset is celeba, the paper's network in colour, where none is given. One row for each formulation of the
    likelihood, precision and kind of checkpointing, so that those options of the configuration are left aside. From a
    model of a training step's memory, in which nothing is computed.
    """

    config: Settings = field(default_factory=Config)
    memory: float = 16.0
    """Memory of the GPU or of the machine (GiB)."""
    reserve: float | None = None
    """Part of it that stays free for what the model does not count: the process itself, libraries' own buffers, a GPU's
    context, fragmentation. Torch's allocator may hold the rest at the peak of a step. By default a tenth of the memory
    and at least 0.5 (GiB)."""
    json: bool = False
    """Print JSON, memory in bytes."""


def main(args: list[str]) -> int:
    _, config, args = preset(args, "celeba")
    o = parse(Options, "fit", args, Options(config))
    budget = Budget.of(o.memory, o.reserve)
    found = fit(o.config, budget.tensors)
    print(json.dumps(to_json(found, o.config, budget), indent=2) if o.json else table(found, o.config, budget))
    return 0


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
        "A model (sosvae.planning.memory) of tensors as torch's allocator holds them. What else there is (the process,",
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
