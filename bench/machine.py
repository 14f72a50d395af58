"""What a time depends on beside the code: the machine, its measured rates, versions, the commit.

`python -m bench.machine` prints it. Neither host names nor paths are in it: a machine is its processor and cores.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import peers

__all__ = ["commit", "describe", "main"]

ROOT = Path(__file__).resolve().parent.parent
COPIED = 1 << 26  # values, 256 MiB: several times the last cache
PRODUCT = 2048  # rows of the square matrices
REPETITIONS = 9


def processor() -> str:
    """The processor's own name for itself."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(folder: Path = ROOT) -> str:
    """Short hash, with a + where files that git tracks, or new ones, are not in it; "unknown" without git."""
    try:
        done = [
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout
            for command in (
                ("rev-parse", "--short=10", "HEAD"),
                ("status", "--porcelain", "--", "kernels", "sosvae", "bench", ":!bench/results"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0].strip() + ("+" if done[1].strip() else "")


def free_memory(device: str) -> float:
    """Bytes that are free; NaN where nobody says."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as file:
            return next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.nan


def _median(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPETITIONS + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def rates(device: str, copied: int = COPIED, product: int = PRODUCT) -> dict[str, float]:
    """Copy bandwidth [byte/s], read and written bytes both counted, and matrix-product rate [1/s], in float32."""
    import torch

    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    source = torch.ones(copied, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), wait)
    a, b = torch.randn(2, product, product, device=device)
    multiply = _median(lambda: torch.mm(a, b), wait)
    return {"copy_bandwidth": 2 * source.nbytes / copy, "product_rate": 2 * product**3 / multiply}


def describe(copied: int = COPIED, product: int = PRODUCT) -> dict[str, Any]:
    """Measures; call it in a process of its own, on an idle machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "machine": processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "python": platform.python_version(),
        "versions": peers.versions(),
        "kind": device,
        "memory": free_memory(device),
        **rates(device, copied, product),
    }


def main() -> None:
    print(json.dumps(describe(*map(int, sys.argv[1:])), ensure_ascii=False))


if __name__ == "__main__":
    main()
