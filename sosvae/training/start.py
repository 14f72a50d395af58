"""How a run begins, or goes on: everything is checked first, and written last."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .. import data, devices
from ..config import Config, incompatible
from ..data import Dataset, Split
from ..data.decode import shown
from .run import Run
from .state import State

__all__ = ["Start", "check_resumable", "resumed", "started"]


class Start(NamedTuple):
    """What the loop begins with."""

    run: Run
    config: Config
    images: Dataset
    state: State


@contextmanager
def started(
    config: Config,
    folder: str | Path,
    split: Split | None,
    accept_data_changes: bool,
    network: Mapping[str, Tensor] | None = None,
) -> Iterator[Start]:
    """A new run in `folder`, which no other process can train in meanwhile. Errors are those of `loop.train`."""
    device = devices.find(config.training.device)
    run = Run(folder)
    run.check_free()
    images = data.load(config.data, split=split, accept_changes=accept_data_changes)
    images.steps_per_epoch(config.training.batch)
    state = State(config, device)
    if network:
        state.model.load_state_dict(state.model.state_dict() | dict(network))
    with run.locked():
        Run.create(folder, config, images.split)
        run.save(config, 0, state.model, state.state_dict())
        yield Start(run, config, images, state)


@contextmanager
def resumed(config: Config, folder: str | Path, step: int | None, accept_data_changes: bool) -> Iterator[Start]:
    """The run in `folder` from its checkpoint of `step`, under its configuration and what `config` says of training."""
    device = devices.find(config.training.device)
    run = Run.open(folder)
    check_resumable(run, config)
    with run.locked():
        config = dataclasses.replace(run.config, data=config.data, training=config.training)
        checkpoint = run.load(step)
        if checkpoint.step > config.training.steps:
            raise ValueError(
                f"steps is {config.training.steps}, but {shown(str(run.folder))} is at step {checkpoint.step}: "
                "expected as many at least, or an earlier checkpoint with --step"
            )
        images = run.images(config.data, accept_changes=accept_data_changes)
        images.steps_per_epoch(config.training.batch)
        state = State(config, device)
        state.load(checkpoint.weights, checkpoint.state)
        images.split.write(run.folder / "split.json")
        run.write_config(config)
        aside = run.set_aside(checkpoint.step)
        if aside:
            names = ", ".join(path.name for path in aside)
            warnings.warn(
                f"{shown(str(run.folder))} goes on from step {checkpoint.step}; what was beyond is kept as {names}",
                stacklevel=4,
            )
        yield Start(run, config, images, state)


def check_resumable(run: Run, config: Config) -> None:
    """Finds out whether a run can be gone on with under a configuration.

    Raises:
        ValueError: it was trained with another one; the fields are named.
    """
    changed = incompatible(run.config, config)
    if changed:
        raise ValueError(
            f"{shown(str(run.folder))} was trained with another configuration (there, now): " + "; ".join(changed)
        )
