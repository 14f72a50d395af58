"""One peer on one case, in a process of its own: `python -m bench.worker SPEC`, driven line by line over its pipes.

A peak is measured in a process that does nothing else (`peak.ENVIRONMENT`). In the one that is timed the order is
fixed: the result is checked against the float64 oracle, and only then can it be timed. Requests and replies are JSON,
one per line; arrays go through files of numbers.
"""

import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from . import errors, peers
from .operators import OPERATORS, Arrays, Case, Operator
from .peak import peak_above

__all__ = ["CACHE", "MIN_CALLS", "REQUESTS", "Session", "WrongResult", "turn_seconds"]

MIN_CALLS = 3  # timed in a turn
WARM_CALLS, WARM_SECONDS = 6, 0.6  # untimed before them: so many calls, or as many as begin within that time
CACHE = 1 << 28  # bytes written between two timed calls on a GPU: more than any last cache holds


def turn_seconds(calls: int, seconds: float) -> float:
    """How long a turn of so many timed calls takes, where a call takes so long."""
    return (calls + min(WARM_CALLS, 1 + WARM_SECONDS // max(seconds, 1e-9))) * seconds


class WrongResult(Exception):
    """A result that is not to be timed."""


class Session:
    """A peer's answers to the requests of `measure`: its methods named in `REQUESTS`, whose results JSON can hold.

    Args:
        folder: where the oracle's process leaves its outputs, and the other processes find them.
    """

    def __init__(self, operator: Operator, case: Case, peer: peers.Peer, device: str, folder: Path) -> None:
        self.operator, self.case, self.peer, self.device, self.folder = operator, case, peer, device, folder
        self.checked = False
        self.flush: Any = None
        if peer.name == "numpyro" and device == "cpu":
            os.environ["JAX_PLATFORMS"] = "cpu"

    def _build(self, case: Case, inputs: Arrays, peer: peers.Peer | None = None) -> peers.Job:
        return peers.build(peer or self.peer, self.operator, case, inputs, self.device)

    def _file(self, case: Case) -> Path:
        return self.folder / f"{self.operator.name}-{case.id}"

    def oracle(self) -> None:
        """Computes the float64 outputs of this case and of the small one."""
        for case in (self.operator.tiny, self.case):
            folder = self._file(case)
            folder.mkdir(exist_ok=True)
            for name, array in self._build(case, self.operator.inputs(case)).outputs().items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)

    def prepare(self) -> list[str]:
        """Makes the inputs and calls once; the files of our packages that were imported for it."""
        self.inputs = self.operator.inputs(self.case)
        self.job = self._build(self.case, self.inputs)
        self.job.call()
        ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("lowrank_mvn", "sosvae")]
        return [str(Path(module.__file__).resolve()) for module in ours if module.__file__]

    def peak(self) -> tuple[float, str]:
        """Peak memory of a call, and by whose account."""
        return peak_above(self.job.call, self.device)

    def check(self) -> dict[str, float]:
        """Errors of this case's result, once the peer has shown on small inputs that it computes what the oracle does.

        Raises:
            WrongResult: they are larger than this operator allows.
        """
        # Compiling proves nothing about the function that is compiled; the case itself checks what came out.
        plain = peers.PEERS.get({"compile": "torch", "textbook_compile": "textbook"}.get(self.peer.name, ""), self.peer)
        small = self.operator.inputs(self.operator.tiny)
        try:
            self._errors(self.operator.tiny, small, self._build(self.operator.tiny, small, plain), exact=False)
        except WrongResult as error:
            raise WrongResult(f"on small inputs {error}") from None
        found = self._errors(self.case, self.inputs, self.job, exact=self.peer.name == "ours")
        self.checked = True
        return found

    def _errors(self, case: Case, inputs: Arrays, job: peers.Job, exact: bool) -> dict[str, float]:
        oracle = {}
        if self.operator.oracle:
            oracle = {file.stem: np.load(file, mmap_mode="r") for file in self._file(case).iterdir()}
        outputs = job.outputs()
        found = self.operator.errors(inputs, outputs, oracle)
        if fault := errors.fault(case, outputs, found, exact):
            raise WrongResult(fault)
        return found

    def calibrate(self, seconds: float) -> tuple[int, float]:
        """How many calls fill a turn of about that length, MIN_CALLS or more, and about how long a call takes."""
        first = self.turn(1)
        if first > 2 * seconds:
            return MIN_CALLS, first
        second = self.turn(1)
        return max(MIN_CALLS, round(seconds / max(second, 1e-7))), second

    def turn(self, calls: int) -> float:
        """Seconds per call: the median of a number of calls in a row, after untimed ones.

        Calls after another process's turn meet cold caches, sleeping threads and, on a virtual machine that gives free
        memory back to its host, pages that cost a hundred times their usual first touch: five calls in a row that
        write a fresh gradient of 93 MB (kernels/LOG.md). In use, steps follow each other.
        """
        if not self.checked:
            raise WrongResult("not timed before it is checked")
        if self.device != "cpu":
            return self._gpu_turn(calls)
        begun = time.perf_counter()
        for done in range(WARM_CALLS):
            if done and time.perf_counter() - begun > WARM_SECONDS:
                break
            self.job.call()
        return statistics.median(self._seconds() for _ in range(calls))

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.job.call()
        return time.perf_counter() - start

    def _gpu_turn(self, calls: int) -> float:
        """The median between events, with the cache overwritten before each call; clocks are left alone."""
        import torch

        if self.flush is None:
            self.flush = torch.empty(CACHE // 4, dtype=torch.int32, device="cuda")
        times, pairs = [], []
        for _ in range(calls):
            self.flush.zero_()
            if self.peer.name == "numpyro":  # no events: the host's clock around a call that waits for its result
                torch.cuda.synchronize()
                times.append(self._seconds())
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.job.call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median([*times, *(start.elapsed_time(end) / 1e3 for start, end in pairs)])

    def capture(self) -> float:
        """Largest relative error of a replayed CUDA graph of one call, against the call itself."""
        import torch

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


REQUESTS = ("oracle", "prepare", "peak", "check", "calibrate", "turn", "capture")


def main() -> None:
    # Replies have a pipe of their own: what libraries print goes to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    peer = peers.ORACLE if spec["peer"] == "oracle" else peers.PEERS[spec["peer"]]
    session = Session(OPERATORS[spec["operator"]], Case(**spec["case"]), peer, spec["device"], Path(spec["folder"]))
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        assert name in REQUESTS, name
        try:
            reply = {"status": "ok", "value": getattr(session, name)(**request)}
        except NotImplementedError as error:
            reply = {"status": "missing", "note": str(error)}
        except WrongResult as error:
            reply = {"status": "wrong", "note": str(error)}
        except Exception as error:
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            reply = {"status": "failed", "note": f"{type(error).__name__}: {first}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
