"""Peak memory of a call above the inputs, by the account of the operating system or of the GPU's allocator.

To be called in a fresh process with `ENVIRONMENT`, after the inputs are made and after one call, so that what a library
sets up once (code, thread pools) is not charged to the operator.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT", "peak_above"]

CALLS, SECONDS = 3, 10.0  # so many calls, or as many as begin within that time

# Variables of the process that measures. glibc takes what is larger than this threshold from the system and gives it
# back when it is freed, but raises the threshold, up to 32 MiB, with each such piece that is freed. From then on a
# resident peak includes what lies idle between two pieces, and varies by a fifth from call to call where a call
# allocates thousands of them, as a training step does. A threshold that is set stays. It costs time, so nothing is
# timed in that process.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}


def peak_above(call: Callable[[], Any], device: str) -> tuple[float, str]:
    """The bytes that `call` needs at its peak beyond what is there before it (the median of a few calls), and by whose
    account: "allocator" or "resident"; NaN where the system gives none."""
    if device == "cpu" and not _reset_peak():
        return math.nan, ""
    measure, account = (_resident, "resident") if device == "cpu" else (_allocated, "allocator")
    peaks: list[int] = []
    begun = time.perf_counter()
    while not peaks or (len(peaks) < CALLS and time.perf_counter() - begun < SECONDS):
        gc.collect()
        peaks.append(measure(call))
    return float(statistics.median(peaks)), account


def _allocated(call: Callable[[], Any]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _resident(call: Callable[[], Any]) -> int:
    with suppress(AttributeError):  # raised where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the call would find it again for nothing
    _reset_peak()
    before = _status("VmRSS")
    result = call()
    highest = _status("VmHWM")
    del result
    return max(0, highest - before)


def _reset_peak() -> bool:
    """Sets VmHWM to the present resident size (proc(5), clear_refs); not every system or sandbox does so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
