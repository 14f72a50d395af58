"""Pictures of held-out images: means and samples at their codes."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from .. import data
from ..training.run import Run
from .base import parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options:
    """Pictures of held-out images: the image, the mean at its code, and samples of p(x|z)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run (path)."""
    images: int = 8
    """Images, spread over the held-out ones (count)."""
    samples: int = 3
    """Samples below each mean (count)."""
    step: int | None = None
    """Of the checkpoint; by default the latest (steps)."""
    out: Path | None = None
    """Picture to write; by default figures/reconstructions.png in the run (path)."""
    device: str = "cpu"
    """Any name that torch knows."""


def main(args: list[str]) -> int:
    from ..tools import figures

    o = parse(Options, "reconstruct", args)
    run = Run.open(o.run)
    vae = run.model(o.step, o.device)
    x = data.load(run.config.data).first("validation", o.images)
    path = o.out or run.figures / "reconstructions.png"
    print(figures.save_reconstructions({run.config.model.head: vae}, x, path, o.samples))
    return 0
