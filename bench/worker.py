"""One peer on one case, in a process of its own: `python -m bench.worker SPEC`, driven line by line over its pipes.

Peak memory is measured in a process that does nothing else (`memory.ENVIRONMENT`). In the one that is timed the order
is fixed: the result is checked against the float64 oracle, and only then can it be timed. Requests and replies are
JSON, one per line; arrays go through files of numbers.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import memory, peers
from .operators import OPERATORS, Arrays, Case, Operator

__all__ = ["Timed", "WrongResult", "main", "turn_seconds"]

MIN_CALLS = 3  # timed in a turn
WARM_CALLS, WARM_SECONDS = 6, 0.6  # untimed before them: so many calls, or as many as begin within that time
CACHE = 1 << 28  # bytes written between two timed calls on a GPU: more than any last cache holds


def turn_seconds(calls: int, seconds: float) -> float:
    """How long a turn of so many timed calls takes, where a call takes so long."""
    return (calls + min(WARM_CALLS, 1 + WARM_SECONDS // max(seconds, 1e-9))) * seconds


class WrongResult(Exception):
    """A result that is not to be timed."""


class Timed:
    """A job whose memory is measured, or which is checked and can then be timed."""

    def __init__(self, operator: Operator, case: Case, build: Callable[[Case, Arrays], peers.Job], device: str) -> None:
        self.operator, self.case, self.build, self.device = operator, case, build, device
        self.job: peers.Job | None = None
        self.checked = False
        self.flush: Any = None

    def prepare(self) -> None:
        """Makes the inputs, and calls once."""
        self.inputs = self.operator.inputs(self.case)
        self.job = self.build(self.case, self.inputs)
        self.job.call()

    def peak(self) -> tuple[int, str]:
        """Peak memory of a call, and by whose account."""
        assert self.job is not None, "prepare() comes before peak()"
        return memory.peak_above(self.job.call, self.device)

    def check(self, oracle: Arrays, exact: bool) -> dict[str, float]:
        """Errors of this case's result.

        Raises:
            WrongResult: they are larger than this operator allows.
        """
        assert self.job is not None, "prepare() comes before check()"
        outputs = self.job.outputs()
        errors = self.operator.errors(self.inputs, outputs, oracle)
        fault = self.operator.fault(self.case, outputs, errors, exact)
        if fault:
            raise WrongResult(fault)
        self.checked = True
        return errors

    def turn(self, calls: int) -> float:
        """Seconds per call: the median of a number of calls in a row, after untimed ones.

        Calls after another process's turn meet cold caches, sleeping threads and, on a virtual machine that gives free
        memory back to its host, pages that cost a hundred times their usual first touch: five calls in a row that
        write a fresh gradient of 93 MB (kernels/LOG.md). In use, steps follow each other.
        """
        if not self.checked or self.job is None:
            raise WrongResult("not timed before it is checked")
        if self.device != "cpu":
            return self._gpu_turn(calls)
        call, times = self.job.call, []
        begun = time.perf_counter()
        for done in range(WARM_CALLS):
            if done and time.perf_counter() - begun > WARM_SECONDS:
                break
            call()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _gpu_turn(self, calls: int) -> float:
        """The median between events, with the cache overwritten before each call; clocks are left alone."""
        import torch

        assert self.job is not None
        if self.flush is None:
            self.flush = torch.empty(CACHE // 4, dtype=torch.int32, device="cuda")
        if type(self.job).__module__.endswith("peers_jax"):
            return self._gpu_turn_by_host(calls)
        pairs = []
        for _ in range(calls):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.job.call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _gpu_turn_by_host(self, calls: int) -> float:
        """Jax has no events: the host's clock around a call that waits for its result."""
        import torch

        assert self.job is not None
        times = []
        for _ in range(calls):
            self.flush.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.job.call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def calibrate(self, seconds: float) -> tuple[int, float]:
        """How many calls fill a turn of about that length, MIN_CALLS or more, and about how long a call takes."""
        first = self.turn(1)
        if first > 2 * seconds:
            return MIN_CALLS, first
        second = self.turn(1)
        return max(MIN_CALLS, round(seconds / max(second, 1e-7))), second

    def captured(self) -> float:
        """Largest relative error of a replayed CUDA graph of one call, against the call itself."""
        import torch

        assert self.job is not None
        assert self.device != "cpu"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                eager = self.job.call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = self.job.call()
        graph.replay()
        torch.cuda.synchronize()
        return max(float((replayed[n] - eager[n]).norm() / eager[n].norm().clamp_min(1e-30)) for n in eager)


def same_job(operator: Operator, peer: peers.Peer, device: str, folder: Path) -> None:
    """Every peer shows on small inputs with d of about one that it computes what the oracle does.

    Raises:
        WrongResult: it does not.
    """
    inputs = operator.inputs(operator.tiny)
    oracle = {}
    if operator.oracle:
        # The oracle's process wrote them: this one may have no torch.
        oracle = load(folder, operator, operator.tiny)
    # Compiling proves nothing about the function that is compiled; the case itself checks what came out.
    plain = peers.PEERS.get({"compile": "torch", "textbook_compile": "textbook"}.get(peer.name, peer.name), peer)
    outputs = peers.build(plain, operator, operator.tiny, inputs, device).outputs()
    fault = operator.fault(operator.tiny, outputs, operator.errors(inputs, outputs, oracle), exact=False)
    if fault:
        raise WrongResult("on small inputs " + fault)


def save(folder: Path, operator: Operator, case: Case, outputs: Arrays) -> None:
    for name, array in outputs.items():
        np.save(folder / f"{operator.name}-{case.id}-{name}.npy", array, allow_pickle=False)


def load(folder: Path, operator: Operator, case: Case) -> Arrays:
    prefix = f"{operator.name}-{case.id}-"
    files = [path for path in folder.iterdir() if path.name.startswith(prefix)]
    return {path.stem.removeprefix(prefix): np.load(path, mmap_mode="r", allow_pickle=False) for path in files}


class _Worker:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.operator, self.case = OPERATORS[spec["operator"]], Case(**spec["case"])
        self.device, self.folder = spec["device"], Path(spec["folder"])
        self.peer = peers.ORACLE if spec["peer"] == "oracle" else peers.PEERS[spec["peer"]]
        if self.peer.name in ("numpyro",) and self.device == "cpu":
            os.environ["JAX_PLATFORMS"] = "cpu"
        self.timed = Timed(self.operator, self.case, self._build, self.device)

    def _build(self, case: Case, inputs: Arrays) -> peers.Job:
        return peers.build(self.peer, self.operator, case, inputs, self.device)

    def import_libraries(self) -> dict[str, Any]:
        """Imports, and where the code under test comes from."""
        if reason := peers.missing(self.peer):
            raise NotImplementedError(reason)
        __import__(self.peer.module)
        if self.peer.name != "ours":
            return {"source": ""}
        import lowrank_mvn

        return {"source": str(Path(str(lowrank_mvn.__file__)).resolve().parent)}

    def oracle(self) -> dict[str, Any]:
        for case in (self.operator.tiny, self.case):
            save(self.folder, self.operator, case, self._build(case, self.operator.inputs(case)).outputs())
        return {}

    def prepare(self) -> dict[str, Any]:
        self.timed.prepare()
        return {}

    def peak(self) -> dict[str, Any]:
        return dict(zip(("memory", "memory_by"), self.timed.peak(), strict=True))

    def check(self) -> dict[str, Any]:
        same_job(self.operator, self.peer, self.device, self.folder)
        oracle = load(self.folder, self.operator, self.case) if self.operator.oracle else {}
        return {"errors": self.timed.check(oracle, exact=self.peer.name == "ours")}

    def calibrate(self, seconds: float) -> dict[str, Any]:
        return dict(zip(("calls", "seconds"), self.timed.calibrate(seconds), strict=True))

    def turn(self, calls: int) -> dict[str, Any]:
        return {"seconds": self.timed.turn(calls)}

    def capture(self) -> dict[str, Any]:
        return {"error": self.timed.captured()}


REQUESTS = ("import_libraries", "oracle", "prepare", "peak", "check", "calibrate", "turn", "capture")


def main() -> None:
    # Replies have a pipe of their own: what libraries print goes to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        assert name in REQUESTS, name
        try:
            reply = getattr(worker, name)(**request)
        except NotImplementedError as error:
            reply = {"status": "missing", "note": str(error)}
        except WrongResult as error:
            reply = {"status": "wrong", "note": str(error)}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            reply = {"status": "failed", "note": f"{type(error).__name__}: {first}"[:300]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
