"""Measures one operator on one case: all peers, each in a process of its own, one round after the other; and before
that in another process for its peak memory.

Round by round every peer has its turn (A B C A B C ...), so that what slows the machine down slows all of them, and
ratios are taken within a round. While one computes the others wait for a line on their pipe.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import machine, peak, peers
from .errors import NATS
from .operators import Case, Operator
from .process import Worker, WorkerError
from .store import Row
from .worker import turn_seconds

__all__ = ["Measurement", "Settings", "capture", "measure", "percentile", "rows"]


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    turn: float = 0.03  # least length of a peer's turn; a call that takes longer is a turn by itself (s)
    budget: float = 8.0  # for all rounds of a case (s)
    rounds: tuple[int, int] = (5, 25)  # at least, at most
    pause: float = 0.005  # before each turn, for the threads of the one before it to go to sleep (s)


@dataclass
class Measurement:
    """What is known of one peer."""

    peer: str
    status: str = "ok"
    note: str = ""
    calls: int = 0
    peak: float = math.nan
    peak_by: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of a call, one for each round

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What fails in the block is written down, and raises no more."""
        try:
            yield
        except WorkerError as error:
            self.status, self.note = error.status, error.note


def measure(
    operator: Operator,
    case: Case,
    device: str,
    settings: Settings | None = None,
    names: Sequence[str] | None = None,
    checkouts: Mapping[str, Path] | None = None,
) -> list[Measurement]:
    """All peers of an operator on one case, ours first. What fails is in the result, with the reason.

    Args:
        names: peers to measure, by default all of the operator's.
        checkouts: names of versions of "ours" and where they are; they take the place of the peers (`bench.compare`).
    """
    found = [Measurement(name) for name in checkouts or names or operator.peers]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = partial(Worker, operator, case, device=device, folder=folder)
        workers: dict[str, Worker] = {}

        def compute_oracle() -> None:
            if operator.oracle:
                with start(peer="oracle") as worker:
                    worker.ask("oracle")

        def prepare(m: Measurement) -> None:
            peer, checkout = ("ours", checkouts[m.peer]) if checkouts else (m.peer, machine.ROOT)
            with m.noting():
                with start(peer=peer, checkout=checkout, environment=peak.ENVIRONMENT) as fresh:
                    fresh.prepare()
                    m.peak, m.peak_by = fresh.ask("peak")
                worker = stack.enter_context(start(peer=peer, checkout=checkout))
                worker.prepare()
                oracle.result()
                m.errors = worker.ask("check")
                workers[m.peer] = worker

        for m in found:
            if checkouts is None and (reason := peers.missing(peers.PEERS[m.peer])):
                m.status, m.note = "missing", reason
        present = [m for m in found if m.status == "ok"]
        if not present:
            return found
        # On all cores: nothing is timed yet. A GPU's memory is for one at a time.
        with ThreadPoolExecutor(max(2, machine.cores()) if device == "cpu" else 1) as pool:
            oracle = pool.submit(compute_oracle)  # first: the others wait for it
            list(pool.map(prepare, sorted(present, key=lambda m: "compile" not in m.peer)))  # compiling takes longest
        _rounds(found, workers, settings or Settings())
    return found


def _rounds(found: Sequence[Measurement], workers: Mapping[str, Worker], settings: Settings) -> None:
    def running() -> list[Measurement]:
        return [m for m in found if m.status == "ok"]

    total = 0.0
    for m in running():
        with m.noting():
            m.calls, seconds = workers[m.peer].ask("calibrate", seconds=settings.turn)
            total += turn_seconds(m.calls, seconds) + settings.pause
    least, most = settings.rounds
    for _ in range(min(most, max(least, math.floor(settings.budget / max(total, 1e-9))))):
        for m in running():
            time.sleep(settings.pause)
            with m.noting():
                m.seconds.append(workers[m.peer].ask("turn", calls=m.calls))


def capture(operator: Operator, case: Case, device: str) -> float:
    """Largest relative difference between a call and its replay from a CUDA graph.

    Raises:
        WorkerError: the call cannot be captured.
    """
    with tempfile.TemporaryDirectory() as folder, Worker(operator, case, "ours", device, Path(folder)) as worker:
        worker.prepare()
        return worker.ask("capture")


def percentile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest; NaN of nothing."""
    return float(np.percentile(values, q)) if len(values) else math.nan


def rows(operator: Operator, case: Case, measured: Sequence[Measurement], where: dict[str, Any]) -> list[Row]:
    """The rows to be stored. Ratios are to the first of `measured`, round by round."""
    copy, product = float(where["copy_bandwidth"]), float(where["product_rate"])
    floor = operator.floor(case, copy, product)
    found = []
    for m in measured:
        ratios = [theirs / ours for theirs, ours in zip(m.seconds, measured[0].seconds, strict=False)]
        found.append(
            Row(
                **{key: where[key] for key in ("date", "commit", "machine", "cores", "device", "versions")},
                **{key: getattr(case, key) for key in ("height", "width", "channels", "N", "diagonal", "layout")},
                **{key: getattr(m, key) for key in ("peer", "status", "note", "calls", "peak", "peak_by")},
                **_spread("seconds", m.seconds),
                **_spread("ratio", ratios),
                copy_bandwidth=copy,
                product_rate=product,
                operator=operator.name,
                case=case.id,
                B=case.batch,
                R=case.rank,
                dtype="float32",
                rounds=len(m.seconds),
                error_log_prob=m.errors.get("log_prob", math.nan),
                error_entropy=m.errors.get("entropy", math.nan),
                error_gradient=_worst(m.errors, lambda name: name.startswith("grad_")),
                error_output=_worst(m.errors, lambda name: not name.startswith("grad_") and name not in _NAMED),
                least_bytes=float(operator.traffic.bytes(case)) if operator.traffic else math.nan,
                operations=float(operator.operations(case)) if operator.operations else math.nan,
                floor=math.nan if floor is None else floor,
            )
        )
    return found


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: percentile(values, 50), f"{name}_p20": percentile(values, 20), f"{name}_p80": percentile(values, 80)}


_NAMED = (*NATS, "noise")


def _worst(errors: dict[str, float], chosen: Callable[[str], bool]) -> float:
    return max((value for name, value in errors.items() if chosen(name)), default=math.nan)
