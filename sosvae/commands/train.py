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
    """Train a model. Ctrl-C, like SIGTERM, saves and says how to go on; the exit status is 130 then."""

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder of the new run; by default runs/PRESET (path)."""
    resume: Path | None = None
    """Folder of a run to go on with, under its own configuration (path)."""
    step: int | None = None
    """With --resume: go on from this checkpoint, and set later ones aside; by default the newest whole one (steps)."""
    accept_data_changes: bool = False
    """With --resume: go on, although images have come, gone or changed. Training images stay training images."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if self.resume is None and self.step is not None:
            raise ValueError(f"step is {self.step}, which is for --resume")
        if self.resume is not None and self.folder is not None:
            raise ValueError("folder is for a new run, and resume for one that is there: expected one of them")


def main(args: list[str]) -> int:
    name, config, args = preset(args)
    resumed, _ = tyro.cli(Resume, args=args, return_unknown_args=True, add_help=False)
    if resumed.resume is not None:
        config = Run.open(resumed.resume).config
    o = parse(Options, "train", args, Options(config))
    folder = o.resume or o.folder or Path("runs") / name
    run = train(
        o.config,
        folder,
        resume=o.resume is not None,
        step=o.step,
        accept_data_changes=o.accept_data_changes,
        progress=not o.quiet,
    )
    step = run.steps()[-1]
    print(f"{run.folder}: checkpoint of step {step} of {o.config.training.steps}")
    return 0 if step >= o.config.training.steps else 130  # as a shell counts Ctrl-C
