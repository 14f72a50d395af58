"""The command `sosvae`: finds the commands, one module each in `commands/`, and runs one.

Nothing but the standard library is imported before signals are taken care of: torch alone takes seconds.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["main"]

STOPPED = 130  # as a shell counts Ctrl-C
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in what torch raises

HELP = """\
usage: sosvae COMMAND ...

{commands}

`sosvae COMMAND --help` lists the options of a command, with units and defaults (those of the preset given
before it).

presets:
{presets}
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default); returns the exit status: 130 after Ctrl-C or SIGTERM."""
    args = list(sys.argv[1:] if args is None else args)
    with _interruptible() as signals, _printable():
        try:
            return _run(args)
        except KeyboardInterrupt:
            return _stopped(args)
        except Exception as error:
            if signals:  # some libraries make other errors of an interrupt
                return _stopped(args)
            message = _message(error)
            if message is None:
                raise
            print(f"sosvae {args[0] if args else ''}: {message}", file=sys.stderr)
            return 1


def _run(args: list[str]) -> int:
    from . import commands, registry

    names = registry.names(commands.__path__)
    name, args = (args[0], args[1:]) if args else ("--help", [])
    if name in ("--help", "-h"):
        print(_help(names))
        return 0
    if name not in names:
        print(f"sosvae: unknown command {name!r}, expected one of {', '.join(names)}", file=sys.stderr)
        return 2
    status: int = registry.module(commands.__name__, name).main(args)
    return status


def _stopped(args: list[str]) -> int:
    print(f"sosvae {args[0] if args else ''}: stopped", file=sys.stderr)
    # Python ends by SIGINT if the interrupt went through `exec`, as of a dataclass being made, until the next one.
    exec("")
    return STOPPED


def _message(error: Exception) -> str | None:
    """One line for what was asked for and cannot be: a traceback says no more. None for our own mistakes."""
    from .training.loop import NonFiniteError

    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        advice = "`sosvae fit` says what trains within how much, --training.accumulate needs less"
        return f"out of memory ({str(error).partition(chr(10))[0]}): {advice}"
    if isinstance(error, ImportError):
        return f"{error}: commands need what `pip install sosvae[train]` brings"
    return str(error) if isinstance(error, NonFiniteError | OSError | ValueError) else None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """SIGTERM stops as Ctrl-C does; the signals that came. Handlers are afterwards what they were."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can a signal be handled
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if in_main_thread and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _printable() -> Iterator[None]:
    """Characters that the terminal does not have, and bytes of paths that are no UTF-8, are printed as escapes."""
    before = getattr(sys.stdout, "errors", None)
    if before is None or not hasattr(sys.stdout, "reconfigure"):
        yield
        return
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout.reconfigure(errors=before)


def _help(names: Sequence[str]) -> str:
    from . import commands, registry
    from .presets import PRESETS

    modules = {name: registry.module(commands.__name__, name) for name in names}
    usages = {f"sosvae {name} {module.USAGE}": module.__doc__ or "" for name, module in modules.items()}
    width = max(map(len, usages))
    return HELP.format(
        commands="\n".join(f"  {usage:<{width}}  {doc.splitlines()[0]}" for usage, doc in usages.items()),
        presets="\n".join(f"  {name:<16}{line}" for name, (line, _) in PRESETS.items()),
    )
