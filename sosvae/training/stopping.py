"""Ctrl-C, which is heeded between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Stop", "stop_on_signals"]

SIGNALS = (signal.SIGINT,)


@dataclass
class Stop:
    """Whether somebody asked for an early end."""

    requested: bool = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Notes the first signal and raises `KeyboardInterrupt` at the second; the handlers before are back afterwards."""
    stop = Stop()

    def heed(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    in_main_thread = threading.current_thread() is threading.main_thread()  # only there can a signal be handled
    before = {number: signal.signal(number, heed) for number in SIGNALS if in_main_thread}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
