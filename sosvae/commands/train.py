"""Train a model; --resume FOLDER goes on with a run."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..config import Config
from ..training.loop import train
from ..training.run import Run
from .base import Settings, parse, preset

USAGE = "[PRESET] [options]"


@dataclass(frozen=True)
class Resume:
    """The one option that the defaults of the others depend on."""

    resume: Path | None = None


@dataclass(frozen=True)
class Options:
    """Train a model. Ctrl-C saves and says how to go on."""

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder of the new run; by default runs/PRESET (path)."""
    resume: Path | None = None
    """Folder of a run to go on with, under its own configuration (path)."""
    quiet: bool = False
    """No progress bar."""


def main(args: list[str]) -> int:
    name, config, args = preset(args)
    resumed, _ = tyro.cli(Resume, args=args, return_unknown_args=True, add_help=False)
    if resumed.resume is not None:
        config = Run.open(resumed.resume).config
    o = parse(Options, "train", args, Options(config))
    folder = o.resume or o.folder or Path("runs") / name
    run = train(o.config, folder, resume=o.resume is not None, progress=not o.quiet)
    print(f"{run.folder}: checkpoint of step {run.steps()[-1]} of {o.config.training.steps}")
    return 0
