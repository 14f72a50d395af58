"""What commands share: presets, and options from a dataclass."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro

from ..config import Config
from ..presets import PRESETS

__all__ = ["Settings", "parse", "preset"]

Options = TypeVar("Options")
Settings = Annotated[Config, tyro.conf.arg(name="")]


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
