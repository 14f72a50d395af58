"""What commands share: presets, runs, and options from a dataclass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro

from .. import devices
from ..config import Config
from ..models.observation import Temperature
from ..models.vae import VAE
from ..presets import PRESETS
from ..training.run import Run

__all__ = ["OfRun", "OfSamples", "Settings", "Temperatures", "at_least", "parse", "preset"]

Options = TypeVar("Options")
Settings = Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class OfRun:
    """What to do with which checkpoint of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run (path)."""
    step: int | None = None
    """Checkpoint to open; by default the newest whole one (steps)."""
    out: Path | None = None
    """Picture to write; by default one in figures/ in the run (path)."""
    device: str = "cpu"
    """`auto` (a GPU where there is one), or any name that torch knows."""

    def open(self) -> tuple[Run, VAE, torch.device]:
        """The run, its network, ready for inference, and where that is."""
        device = devices.find(self.device)
        run = Run.open(self.run)
        return run, run.model(self.step, device), device


@dataclass(frozen=True)
class Temperatures:
    """How far samples are from the mean."""

    temperature_global: float = 1.0
    """t_P of samples μ + t_P · (what is global) + t_L · (what is local): of the low-rank part (factor)."""
    temperature_local: float = 1.0
    """t_L, of the rest: a diagonal or a sparse precision (factor)."""

    def __post_init__(self) -> None:
        for name, value in (("global", self.temperature_global), ("local", self.temperature_local)):
            if not 0 <= value < math.inf:
                raise ValueError(f"temperature_{name} is {value}, expected at least 0, finite")

    @property
    def temperature(self) -> Temperature:
        """(t_P, t_L)."""
        return self.temperature_global, self.temperature_local


@dataclass(frozen=True)
class OfSamples(Temperatures, OfRun):
    """What to do with which checkpoint of a run, and how far samples are from the mean."""


def at_least(bound: int, **values: int) -> None:
    """Raises: ValueError: an option is below the bound."""
    for name, value in values.items():
        if value < bound:
            raise ValueError(f"{name} is {value}, expected at least {bound}")


def preset(args: Sequence[str], name: str = "faces") -> tuple[str, Config, list[str]]:
    """The preset that `args` begin with (`name` where they do not), and the other arguments.

    Raises:
        ValueError: there is no such preset.
    """
    args = list(args)
    if args and not args[0].startswith("-"):
        name = args.pop(0)
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
    return name, PRESETS[name][1], args


def parse(kind: type[Options], command: str, args: Sequence[str], default: Options | None = None) -> Options:
    """Options of a command: a dataclass, each field with its help below it; what is not given is as in `default`."""
    if default is None:
        return tyro.cli(kind, prog=f"sosvae {command}", args=args)
    return tyro.cli(kind, prog=f"sosvae {command}", args=args, default=default)
