"""What a plan will take before it is begun: time, memory, what an earlier run has measured, what does not fit.

A model, good to a factor of two: it says "over night", not when.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import store
from .measure import Settings
from .operators import FLOAT, Case, Entry, Operator
from .worker import MIN_CALLS, turn_seconds

__all__ = ["Estimate", "does_not_fit", "estimate", "measured_already", "summary"]

# Time over the floor, and peak memory above the inputs over the size of P, as measured at 8×218×178×3, R = 25.
OVER_FLOOR = {"ours": 6, "torch": 60, "compile": 20, "linear_operator": 32, "numpyro": 30}
PEAK = {"ours": 1.4, "torch": 6.5, "compile": 4.0, "linear_operator": 7.0, "numpyro": 6.0}
OTHER_PEER = "torch"  # whose figures stand for those of peers without any: none is slower or larger
ORACLE_PEAK = 2 * (PEAK["torch"] + 1)  # torch's class in float64, on a copy of the inputs

PROCESS = 3e8  # bytes of a process with its libraries
START = 4.0  # s, of a process: imports, inputs, first call, check
MEASURING = 12  # times of a call, for its memory: a few calls, each with all of its pieces fresh from the system
COMPILING = 15.0  # s
STEP = 1.4  # s of a training step of small images: what weights and optimiser take
PER_PIXEL = 1.7e-5  # s more of it, for each value of a batch of images
NETWORK = 1e4  # bytes of a training step, for each value of a batch of images


@dataclass(frozen=True)
class Estimate:
    seconds: float
    memory: float  # bytes in all processes together


def _call(operator: Operator, case: Case, peer: str, where: dict[str, Any]) -> float:
    """Seconds of a call."""
    floor = operator.floor(case, float(where["copy_bandwidth"]), float(where["product_rate"]))
    if floor is None:
        return STEP + PER_PIXEL * case.batch * case.N
    return floor * OVER_FLOOR.get(peer, OVER_FLOOR[OTHER_PEER])


def estimate(entry: Entry, where: dict[str, Any], settings: Settings) -> Estimate:
    """Of one entry, on a machine of `measure.environment`."""
    operator, case = entry.operator, entry.case
    calls = {peer: _call(operator, case, peer, where) for peer in entry.peers}
    turns = sum(
        turn_seconds(max(MIN_CALLS, round(settings.turn / seconds)), seconds) + settings.pause
        for seconds in calls.values()
    )
    least, most = settings.rounds
    rounds = min(most, max(least, math.floor(settings.budget / turns)))
    start = sum(
        2 * START + (MEASURING + 4) * seconds + COMPILING * ("compile" in peer) for peer, seconds in calls.items()
    )
    if operator.oracle:
        start += START + 2 * max(calls.values())
    together = max(1, min(int(where["cores"]), len(entry.peers)))  # as `measure.measure` prepares them

    P, images = FLOAT * case.batch * case.N * case.rank, FLOAT * case.batch * case.N
    if operator.name.startswith("train_"):
        inputs, peaks, oracle = images, [NETWORK / FLOAT * images] * len(entry.peers), 0.0
    else:
        inputs = P + 4 * images
        peaks = sorted((P * PEAK.get(peer, PEAK[OTHER_PEER]) for peer in entry.peers), reverse=True)
        oracle = P * ORACLE_PEAK if operator.oracle else 0.0
    # Every peer keeps its inputs; the oracle has gone, but for its results, before the last of the largest begin.
    processes = (len(entry.peers) + together) * PROCESS
    memory = processes + len(entry.peers) * inputs + max(oracle + peaks[0], sum(peaks[:together])) + PROCESS
    return Estimate(start / together + rounds * turns, memory)


def does_not_fit(estimated: Estimate, where: dict[str, Any]) -> str | None:
    """The reason not to begin, or none."""
    free = float(where.get("memory", math.nan))
    if not estimated.memory > free:  # unknown memory forbids nothing
        return None
    return f"does not fit: needs about {estimated.memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def measured_already(path: Path, where: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """Peers by operator and case that a file has of the same commit on the same machine with the same versions.

    Of a checkout with changes (a "+" after its commit) no two runs are the same; what failed is tried again.
    """
    found: dict[tuple[str, str], set[str]] = {}
    if where["commit"].endswith("+") or where["commit"] == "unknown" or not path.exists():
        return found
    same = ("commit", "machine", "cores", "device", "versions")
    for row in store.read(path):
        if all(getattr(row, key) == where[key] for key in same) and row.status in ("ok", "missing", "wrong"):
            found.setdefault((row.operator, row.case), set()).add(row.peer)
    return found


def summary(entries: Sequence[Entry], where: dict[str, Any], settings: Settings, path: Path | None) -> Iterable[str]:
    """Lines that say what a plan will take; `path` names the file of an earlier run that is to be gone on with."""
    known = measured_already(path, where) if path else {}
    ahead = [e for e in entries if not set(e.peers) <= known.get((e.operator.name, e.case.id), set())]
    estimates = [(entry, estimate(entry, where, settings)) for entry in ahead]
    fitting = [(entry, found) for entry, found in estimates if not does_not_fit(found, where)]
    if known:
        yield f"{len(entries) - len(ahead)} of {len(entries)} cases were measured in this commit on this machine"
    seconds = sum(found.seconds for _, found in fitting)
    length = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{math.ceil(seconds / 60)} minutes"
    yield f"{len(fitting)} cases to be measured: about {length}"
    if fitting:
        entry, largest = max(fitting, key=lambda pair: pair[1].memory)
        yield f"the largest needs about {largest.memory / 1e9:.1f} GB: {entry.operator.name} {entry.case.id}"
    for entry, found in estimates:
        if reason := does_not_fit(found, where):
            yield f"{entry.operator.name} {entry.case.id} {reason}"
