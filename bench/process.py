"""A `bench.worker` in a process of its own, as the process that measures sees it."""

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .machine import ROOT
from .operators import Case, Operator

__all__ = ["PATIENCE", "Worker", "WorkerError", "link_packages"]

PACKAGES = "kernels/lowrank_mvn", "sosvae"
PATIENCE = 900.0  # s for one reply; a peer that takes longer has failed


class WorkerError(Exception):
    """A peer that cannot be measured: `status` is "missing", "wrong" or "failed"."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(f"{status}: {note}")
        self.status, self.note = status, note


def link_packages(checkout: Path, folder: Path) -> None:
    """Makes `folder` one from which exactly the two packages of a checkout are imported, whatever is installed."""
    for name in PACKAGES:
        (folder / Path(name).name).symlink_to(checkout / name)


class Worker:
    """A running worker, ended by the `with` block.

    Args:
        folder: where the oracle's outputs are.
        checkout: the version of `lowrank_mvn` and `sosvae` that is imported.
        environment: variables of the process beside those of this one.
    """

    def __init__(
        self,
        operator: Operator,
        case: Case,
        peer: str,
        device: str,
        folder: Path,
        checkout: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        spec = {"operator": operator.name, "case": dataclasses.asdict(case), "peer": peer, "device": device}
        self.name, self.checkout = peer, checkout
        self.home = tempfile.TemporaryDirectory()
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed in close)
        link_packages(checkout, Path(self.home.name))
        path = os.pathsep.join([self.home.name, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps({**spec, "folder": str(folder)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=self.home.name,  # -m puts it first on the path
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a request and waits for the reply's value.

        Raises:
            WorkerError: the worker says so, has ended, or takes too long. It is closed.
        """
        try:
            reply = self._reply(json.dumps({"do": do, **arguments}))
            if reply["status"] != "ok":
                raise WorkerError(reply["status"], reply["note"])
            return reply["value"]
        except WorkerError:
            self.close()
            raise

    def _reply(self, request: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                self.process.kill()
                raise WorkerError("failed", f"no reply within {PATIENCE:.0f} s")
            if line := self.process.stdout.readline():
                return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        logged = self.log.read().strip().splitlines()
        raise WorkerError("failed", f"ended with {code}" + (f": {logged[-1][:200]}" if logged else ""))

    def prepare(self) -> None:
        """Makes the worker build its job and call it once.

        Raises:
            WorkerError: it cannot, or what it has imported is not the checkout's.
        """
        imported = self.ask("prepare")
        packages = [(self.checkout / name).resolve() for name in PACKAGES]
        if not all(any(Path(file).is_relative_to(package) for package in packages) for file in imported):
            raise WorkerError("failed", "modules of another version were imported than of the one to be measured")

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        with suppress(BrokenPipeError):  # what the worker had no time to read
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
        self.home.cleanup()
