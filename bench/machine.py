"""What a time depends on beside the code: the machine, its measured rates, versions, the commit.

`python -m bench.machine` prints it. It has neither host names nor paths: a machine is its processor and cores.
"""

import json
import math
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import peers

__all__ = ["ROOT", "commit", "cores", "describe", "environment"]

ROOT = Path(__file__).resolve().parent.parent
COPIED = 1 << 26  # values, 256 MiB: several times the last cache
PRODUCT = 2048  # rows of the square matrices


def _field(path: str, name: str) -> str | None:
    """What stands behind `NAME:` in a file of /proc."""
    try:
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return " ".join(value.split())
    except OSError:
        pass
    return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(folder: Path = ROOT) -> str:
    """Short hash, with a + where files that git tracks, or new ones, are not in it; "unknown" without git."""
    changed = ("status", "--porcelain", "--", "kernels", "sosvae", "bench", ":!bench/results")
    try:
        name, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout
            for command in (("rev-parse", "--short=10", "HEAD"), changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.strip() + ("+" if changes.strip() else "")


def _free(device: str) -> float:
    """Bytes that are free; NaN where nobody says."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    available = _field("/proc/meminfo", "MemAvailable")
    return float(available.split()[0]) * 1024 if available else math.nan


def _rates(device: str, copied: int, product: int) -> dict[str, float]:
    """Copy bandwidth [byte/s], read and written bytes both counted, and matrix-product rate [1/s], in float32."""
    import torch
    from torch.utils.benchmark import Timer

    source = torch.ones(copied, device=device)
    a, b = torch.randn(2, product, product, device=device)
    given = {"torch": torch, "a": a, "b": b, "source": source, "target": torch.empty_like(source)}

    def seconds(statement: str) -> float:
        timer = Timer(statement, globals=given, num_threads=torch.get_num_threads())
        timer.timeit(2)
        return timer.blocked_autorange(min_run_time=0.3).median

    copy, multiply = seconds("target.copy_(source)"), seconds("torch.mm(a, b)")
    return {"copy_bandwidth": 2 * source.nbytes / copy, "product_rate": 2 * product**3 / multiply}


def describe(copied: int = COPIED, product: int = PRODUCT) -> dict[str, Any]:
    """Measures; call it in a process of its own, on an idle machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version(), **peers.versions()}
    return {
        "machine": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "versions": "; ".join(f"{name} {version}" for name, version in versions.items()),
        "kind": device,
        "free": _free(device),
        **_rates(device, copied, product),
    }


def environment() -> dict[str, Any]:
    """`describe` in a fresh process, the commit, and the time at which the run began."""
    command = [sys.executable, "-m", "bench.machine"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**json.loads(done.stdout.splitlines()[-1]), "commit": commit(), "date": now}


if __name__ == "__main__":
    print(json.dumps(describe(), ensure_ascii=False))
