"""Pictures at codes from the prior: means and samples."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ..training.run import Run
from .base import parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options:
    """Pictures at codes from the prior z ~ N(0, I): the mean, and samples of p(x|z)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run (path)."""
    codes: int = 8
    """Codes, one column each (count)."""
    samples: int = 4
    """Samples below each mean (count)."""
    seed: int = 0
    """Of codes and samples."""
    step: int | None = None
    """Of the checkpoint; by default the latest (steps)."""
    out: Path | None = None
    """Picture to write; by default figures/samples.png in the run (path)."""
    device: str = "cpu"
    """Any name that torch knows."""


@torch.no_grad()
def main(args: list[str]) -> int:
    from ..tools import figures

    o = parse(Options, "sample", args)
    run = Run.open(o.run)
    vae = run.model(o.step, o.device)
    torch.manual_seed(o.seed)
    p = vae.decode(torch.randn(o.codes, vae.latents, device=o.device))
    rows = [("mean", vae.unflatten(p.loc).cpu())]
    rows += [("sample", vae.unflatten(p.rsample()).cpu()) for _ in range(o.samples)]
    print(figures.save_images(rows, o.out or run.figures / "samples.png"))
    return 0
