"""A head for a network that is trained already: the network stays as it is, and the head learns from its features.

Nothing is kept for a backward pass through the network, so that this takes the memory of a forward pass, and minutes
where the network took hours. What comes out is a run like any other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config
from ..data.decode import shown
from .loop import train
from .run import Run
from .start import check_resumable

__all__ = ["of_run", "train_head"]

LOOKED_AT = 64  # training images, spread over all, of which one has to vary

# What the network that stays is made of: the head's own options are free.
NETWORK = {"model": ("latents", "width", "depth", "upsampling"), "data": ("height", "width", "channels")}


def of_run(config: Config, **model: Any) -> Config:
    """The configuration of a head for the network of `config`: `global-local`, unless `model` says otherwise.

    Images are dequantised, and the steps are few: a head is convex but for its layers.
    """
    t = config.training
    return config.replace(
        model={"head": "global-local", "head_layers": 2} | model,
        objective={"mean": "frozen"},
        training={
            "steps": min(t.steps, 600),  # and in a trial no more than the network
            "mean_only_steps": 0,
            "lr": 2e-3,
            "decay": 0.5,
            "dequantise": True,
            "log_every": min(t.log_every, 50),
            "evaluate_every": 200,
            "save_every": 200,
        },
    )


def train_head(
    run: Run | str | Path,
    config: Config,
    folder: str | Path,
    *,
    step: int | None = None,
    accept_data_changes: bool = False,
    progress: bool = True,
) -> Run:
    """Fits the head of `config` to the features of `run`, whose network stays, and returns the run in `folder`.

    One that is there already and was not finished is gone on with.

    Args:
        run: what gives encoder, decoder and mean, and says which images are held out.
        config: as `of_run` makes it.
        step: of the checkpoint of `run`; by default the newest whole one.

    Raises:
        ValueError: `config` is of another network, or lets it move; the fields are named. Others as of `train`.
    """
    base = run if isinstance(run, Run) else Run.open(run)
    _check(config, base)
    new = Run(folder)
    if new.has_work():
        check_resumable(new, config)
        return train(config, folder, resume=True, accept_data_changes=accept_data_changes, progress=progress)
    images = base.images(config.data, accept_changes=accept_data_changes)
    some = images.first("train", LOOKED_AT)
    if some.min() == some.max():
        raise ValueError(
            f"{shown(config.data.source)}: training images have one value everywhere, {255 * float(some.max()):.0f} of "
            "255: expected images that vary"
        )
    split = base.split or images.split
    network = part_that_stays(base.load(step).weights)
    return train(
        config, folder, split=split, network=network, accept_data_changes=accept_data_changes, progress=progress
    )


def part_that_stays(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder, decoder and mean."""
    return {n: w for n, w in weights.items() if not n.startswith("head.") or n.startswith("head.mean.")}


def _check(config: Config, base: Run) -> None:
    mean, phase = config.objective.mean, config.training.mean_only_steps
    if mean != "frozen" or phase:
        raise ValueError(
            f"objective.mean is {mean!r} and training.mean_only_steps is {phase}, expected 'frozen' and 0: "
            "the network stays as it is"
        )
    theirs = base.config
    for section, names in NETWORK.items():
        for name in names:
            wanted, found = (getattr(getattr(c, section), name) for c in (config, theirs))
            if wanted != found:
                raise ValueError(
                    f"{section}.{name} is {wanted!r}, expected {found!r}, as of {shown(str(base.folder))}: "
                    "its network stays as it is"
                )
