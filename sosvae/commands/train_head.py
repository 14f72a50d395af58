"""Fit a head of any kind to the features of a finished run, whose network stays as it is."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..config import Config
from ..training.head import of_run, train_head
from ..training.run import Run
from .base import Settings, parse

USAGE = "RUN [options]"


@dataclass(frozen=True)
class Options:
    """Fit a head (--model.head) to the detached features of a finished run.

    Minutes, in the memory of a forward pass: encoder, decoder and mean stay as they are. The result is a run of its
    own, which every command opens. The same command goes on with one that was interrupted.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the finished run (path)."""
    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder of the new run; by default that of the finished one, with the head's name behind it (path)."""
    step: int | None = None
    """Of the finished run's checkpoint; by default the newest whole one (steps)."""
    accept_data_changes: bool = False
    """Go on, although images have come, gone or changed since the run was trained."""
    quiet: bool = False
    """No progress bar."""


def main(args: list[str]) -> int:
    named = bool(args) and not args[0].startswith("-")
    if not named and not {"-h", "--help"} & set(args):
        raise ValueError("no run was given, expected the folder of a finished one first")
    run = Path(args[0] if named else "RUN")
    o = parse(Options, "train-head", args, Options(run, of_run(Run.open(run).config if named else Config())))
    base = Run.open(o.run)
    folder = o.folder or base.folder.with_name(f"{base.folder.name}-{o.config.model.head}")
    new = train_head(
        base,
        o.config,
        folder,
        step=o.step,
        accept_data_changes=o.accept_data_changes,
        progress=not o.quiet,
    )
    step = new.steps()[-1]
    print(f"{new.folder}: checkpoint of step {step} of {o.config.training.steps}")
    return 0 if step >= o.config.training.steps else 130  # as a shell counts Ctrl-C
