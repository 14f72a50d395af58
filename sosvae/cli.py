"""The command `sosvae`: finds the commands, one module each in `commands/`, and runs one."""

import sys
from collections.abc import Sequence

from . import commands, registry
from .presets import PRESETS
from .training.loop import NonFiniteError

__all__ = ["main"]

HELP = """\
usage: sosvae COMMAND ...

{commands}

`sosvae COMMAND --help` lists the options of a command, with units and defaults (those of the preset given
before it).

presets:
{presets}
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default); returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    name = args.pop(0) if args else "--help"
    names = registry.names(commands.__path__)
    if name in ("--help", "-h"):
        print(_help(names))
        return 0
    if name not in names:
        print(f"sosvae: unknown command {name!r}, expected one of {', '.join(names)}", file=sys.stderr)
        return 2
    try:
        status: int = registry.module(commands.__name__, name).main(args)
        return status
    except (NonFiniteError, OSError, ValueError) as error:  # what was asked for cannot be; a traceback says no more
        print(f"sosvae {name}: {error}", file=sys.stderr)
        return 1


def _help(names: Sequence[str]) -> str:
    modules = {name: registry.module(commands.__name__, name) for name in names}
    usages = {f"sosvae {name} {module.USAGE}": module.__doc__ or "" for name, module in modules.items()}
    width = max(map(len, usages))
    return HELP.format(
        commands="\n".join(f"  {usage:<{width}}  {doc.splitlines()[0]}" for usage, doc in usages.items()),
        presets="\n".join(f"  {name:<16}{line}" for name, (line, _) in PRESETS.items()),
    )
