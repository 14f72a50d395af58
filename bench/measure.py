"""Measures one operator on one case: all peers, each in a process of its own, one round after the other; and before
that in another one for its memory.

Round by round every peer has its turn (A B C A B C ...), so that what slows the machine down slows all of them, and
ratios are taken within a round. While one computes the others wait for a line on their pipe.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoReply
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine, memory, peers
from .operators import Case, Operator
from .store import Row
from .worker import turn_seconds

__all__ = ["Measurement", "Settings", "WorkerError", "environment", "measure", "percentile", "rows"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    turn: float = 0.03  # least length of a peer's turn; a call that takes longer is a turn by itself (s)
    budget: float = 8.0  # for all rounds of a case (s)
    rounds: tuple[int, int] = (5, 25)  # at least, at most
    pause: float = 0.005  # before each turn, for the threads of the one before it to go to sleep (s)
    patience: float = 900.0  # for one reply; a peer that takes longer has failed (s)


class WorkerError(Exception):
    """A peer that cannot be measured: `status` is "missing", "wrong" or "failed"."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(f"{status}: {note}")
        self.status, self.note = status, note


@dataclass
class Measurement:
    """What is known of one peer."""

    peer: str
    status: str = "ok"
    note: str = ""
    calls: int = 0
    memory: float = math.nan
    memory_by: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of a call, one for each round


class Worker:
    """A running `bench.worker`.

    Args:
        source: folder with `lowrank_mvn` and `sosvae` to measure, by default this checkout's (see `sources`).
        environment: variables of the process beside those of this one.
    """

    def __init__(
        self,
        operator: Operator,
        case: Case,
        peer: str,
        device: str,
        folder: Path,
        source: Path,
        patience: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        spec = {"operator": operator.name, "case": dataclasses.asdict(case), "peer": peer, "device": device}
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed in close)
        path = os.pathsep.join([str(source), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.name, self.patience, self.source = peer, patience, source
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps({**spec, "folder": str(folder)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,  # -m puts it first on the path, and nothing to import is there
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply.

        Raises:
            WorkerError: the worker says so, has ended, or takes too long.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError("failed", self._ended()) from None
        line = self._read()
        if not line:
            raise WorkerError("failed", self._ended())
        reply = json.loads(line)
        if reply.get("status", "ok") != "ok":
            raise WorkerError(reply["status"], reply["note"])
        return reply

    def _read(self) -> str:
        assert self.process.stdout is not None
        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(self.process.stdout.readline)
            try:
                return waiting.result(self.patience)
            except NoReply:
                self.process.kill()
                raise WorkerError("failed", f"no reply within {self.patience:.0f} s") from None

    def _ended(self) -> str:
        code = self.process.wait()
        lines = self.logged().strip().splitlines()
        return f"ended with {code}" + (f": {lines[-1][:200]}" if lines else "")

    def logged(self) -> str:
        """What the libraries wrote."""
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # what the worker had no time to read
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


@contextmanager
def sources(checkout: Path) -> Iterator[Path]:
    """A folder from which exactly the two packages of a checkout are imported, whatever is installed."""
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "lowrank_mvn").symlink_to(checkout / "kernels" / "lowrank_mvn")
        (folder / "sosvae").symlink_to(checkout / "sosvae")
        yield folder
    finally:
        shutil.rmtree(folder)


def measure(
    operator: Operator,
    case: Case,
    device: str,
    settings: Settings | None = None,
    names: Sequence[str] | None = None,
    checkouts: dict[str, Path] | None = None,
) -> list[Measurement]:
    """All peers of an operator on one case, ours first. What fails is in the result, with the reason.

    Args:
        names: peers to measure, by default all of the operator's.
        checkouts: names of further versions of "ours" and where they are; they take the place of the peers
            (`bench.compare`).
    """
    settings = settings or Settings()
    names = list(checkouts or names or operator.peers)
    measured = {name: Measurement(name) for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers: dict[str, Worker] = {}
        versions: dict[str, tuple[str, Path]] = {}  # peer, and where our code comes from

        def start(peer: str, source: Path, environment: Mapping[str, str] | None = None) -> Worker:
            worker = Worker(operator, case, peer, device, folder, source, settings.patience, environment)
            stack.callback(worker.close)
            return worker

        def peak(name: str) -> dict[str, Any]:
            worker = start(*versions[name], memory.ENVIRONMENT)
            try:
                worker.ask("prepare")
                return worker.ask("peak")
            finally:
                worker.close()

        def drop(name: str, error: WorkerError) -> None:
            measured[name].status, measured[name].note = error.status, error.note
            if name in workers:
                workers.pop(name).close()

        for name in names:
            if checkouts is None and (reason := peers.missing(peers.PEERS[name])):
                drop(name, WorkerError("missing", reason))
                continue
            source = stack.enter_context(sources((checkouts or {}).get(name, ROOT)))
            versions[name] = (name if checkouts is None else "ours", source)
            workers[name] = start(*versions[name])

        def compute_oracle() -> None:
            if operator.oracle and workers:
                oracle = start("oracle", stack.enter_context(sources(ROOT)))
                oracle.ask("oracle")
                oracle.close()

        def prepare(name: str) -> WorkerError | None:
            try:
                imported = workers[name].ask("import_libraries")["source"]
                expected = (workers[name].source / "lowrank_mvn").resolve()
                if imported and Path(imported) != expected:
                    return WorkerError("failed", "another lowrank_mvn was imported than the one to be measured")
                for key, value in peak(name).items():
                    setattr(measured[name], key, value)
                workers[name].ask("prepare")
                oracle.result()
                measured[name].errors = workers[name].ask("check")["errors"]
                return None
            except WorkerError as error:
                return error

        # On all cores: nothing is timed yet. A GPU's memory is for one at a time.
        # Compiling takes longest, so it begins; the oracle is waited for, so it comes before all.
        order = sorted(workers, key=lambda name: "compile" not in name)
        with ThreadPoolExecutor(max(2, machine.cores()) if device == "cpu" else 1) as pool:
            oracle = pool.submit(compute_oracle)
            for name, error in zip(order, list(pool.map(prepare, order)), strict=True):
                if error:
                    drop(name, error)
        oracle.result()  # its own failure is everybody's

        _rounds(workers, measured, settings, drop)
    return list(measured.values())


def _rounds(
    workers: dict[str, Worker],
    measured: dict[str, Measurement],
    settings: Settings,
    drop: Callable[[str, WorkerError], None],
) -> None:
    total = 0.0
    for name in list(workers):
        try:
            found = workers[name].ask("calibrate", seconds=settings.turn)
            measured[name].calls = found["calls"]
            total += turn_seconds(found["calls"], found["seconds"]) + settings.pause
        except WorkerError as error:
            drop(name, error)
    least, most = settings.rounds
    for _ in range(min(most, max(least, math.floor(settings.budget / max(total, 1e-9))))):
        for name in list(workers):
            time.sleep(settings.pause)
            try:
                measured[name].seconds.append(workers[name].ask("turn", calls=measured[name].calls)["seconds"])
            except WorkerError as error:
                drop(name, error)


def capture(operator: Operator, case: Case, device: str, settings: Settings | None = None) -> float:
    """Largest relative difference between a call and its replay from a CUDA graph.

    Raises:
        WorkerError: the call cannot be captured, or there is no GPU.
    """
    if device == "cpu":
        raise WorkerError("missing", "no GPU")
    settings = settings or Settings()
    with tempfile.TemporaryDirectory() as folder, sources(ROOT) as source:
        worker = Worker(operator, case, "ours", device, Path(folder), source, settings.patience)
        try:
            worker.ask("prepare")
            return worker.ask("capture")["error"]
        finally:
            worker.close()


def environment(copied: int | None = None, product: int | None = None) -> dict[str, Any]:
    """`machine.describe` in a fresh process, the commit, and the time at which the run began."""
    arguments = [] if copied is None else [str(copied), str(product)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.machine", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    versions = {"python": found.pop("python"), **found.pop("versions")}
    return {
        **found,
        "versions": "; ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": machine.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def percentile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = q / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def rows(operator: Operator, case: Case, measured: Sequence[Measurement], where: dict[str, Any]) -> list[Row]:
    """The rows to be stored. Ratios are to the first of `measured`, round by round."""
    first = measured[0].seconds
    copy, product = float(where["copy_bandwidth"]), float(where["product_rate"])
    floor = operator.floor(case, copy, product)
    found = []
    for m in measured:
        ratios = [theirs / ours for theirs, ours in zip(m.seconds, first, strict=False)]
        found.append(
            Row(
                **{key: where[key] for key in ("date", "commit", "machine", "cores", "device", "versions")},
                copy_bandwidth=copy,
                product_rate=product,
                operator=operator.name,
                case=case.id,
                height=case.height,
                width=case.width,
                channels=case.channels,
                N=case.N,
                B=case.batch,
                R=case.rank,
                diagonal=case.diagonal,
                layout=case.layout,
                dtype="float32",
                peer=m.peer,
                status=m.status,
                note=m.note,
                rounds=len(m.seconds),
                calls=m.calls,
                seconds=statistics.median(m.seconds) if m.seconds else math.nan,
                seconds_p20=percentile(m.seconds, 20),
                seconds_p80=percentile(m.seconds, 80),
                ratio=statistics.median(ratios) if ratios else math.nan,
                ratio_p20=percentile(ratios, 20),
                ratio_p80=percentile(ratios, 80),
                error_log_prob=m.errors.get("log_prob", math.nan),
                error_entropy=m.errors.get("entropy", math.nan),
                error_gradient=_worst(m.errors, lambda name: name.startswith("grad_")),
                error_output=_worst(m.errors, lambda name: not name.startswith("grad_") and name not in _NAMED),
                memory=m.memory,
                memory_by=m.memory_by,
                least_bytes=float(operator.bytes(case)) if operator.bytes else math.nan,
                operations=float(operator.operations(case)) if operator.operations else math.nan,
                floor=math.nan if floor is None else floor,
            )
        )
    return found


_NAMED = ("log_prob", "entropy", "noise")


def _worst(errors: dict[str, float], chosen: Callable[[str], bool]) -> float:
    return max((value for name, value in errors.items() if chosen(name)), default=math.nan)
