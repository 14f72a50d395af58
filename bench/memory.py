"""Peak memory above the inputs, by the account of the operating system or of the GPU's allocator.

To be called in a fresh process with `ENVIRONMENT`, after the inputs are made and after one call, so that what a library
sets up once (code, thread pools) is not charged to the operator.
"""

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["ENVIRONMENT", "peak_above"]

CALLS, SECONDS = 3, 10.0  # so many calls, or as many as begin within that time

# Of the process in which memory is measured. glibc takes what is larger than this from the system and gives it back
# when it is freed, but raises the limit, up to 32 MiB, with each such piece that is freed. From then on a resident peak
# counts what lies idle between two pieces too, and wanders by a fifth from call to call where a call makes thousands of
# them, as a training step does. Set, the limit stays. It costs time, so nothing is timed there.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}


def peak_above(call: Callable[[], Any], device: str) -> tuple[int, str]:
    """Bytes that `call` needs at its peak beyond what is there before it, and by whose account: the median of a few
    calls."""
    peaks, begun = [_of_one_call(call, device)], time.perf_counter()
    while len(peaks) < CALLS and time.perf_counter() - begun < SECONDS:
        peaks.append(_of_one_call(call, device))
    return int(statistics.median(peak for peak, _ in peaks)), peaks[0][1]


def _of_one_call(call: Callable[[], Any], device: str) -> tuple[int, str]:
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - base, "allocator"
    if sys.platform == "linux":
        _trim()
        if _reset_peak():
            base = _status("VmRSS")
            result = call()
            peak = _status("VmHWM")
            del result
            return max(0, peak - base), "resident"
    # Only ever grows, so that calls before this one may hide a part.
    base = _maxrss()
    result = call()
    del result
    return _maxrss() - base, "maxrss"


def _trim() -> None:
    """Gives what was freed back to the system, or a call would find it again for nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # another C library than glibc
        return


def _reset_peak() -> bool:
    """Sets VmHWM to the present resident size (proc(5), clear_refs); not every sandbox lets a process do so."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _maxrss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
