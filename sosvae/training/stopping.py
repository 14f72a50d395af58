"""Ctrl-C, and SIGTERM from schedulers and machines that are taken back: both are heeded between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Stop", "stop_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    heeded = [n for n in SIGNALS if in_main_thread and signal.getsignal(n) != signal.SIG_IGN]  # as of a background job
    before = {number: signal.signal(number, heed) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not from Python
