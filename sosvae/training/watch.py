"""What watches training and takes no part in it: rows of metrics, a progress bar, TensorBoard.

An observer ends no run: what it raises becomes a warning, once, and training goes on.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..config import Config
from ..data import Dataset
from ..data.decode import shown
from ..data.split import listing
from ..objective import Terms
from .run import Run, plain
from .state import State

__all__ = ["Bar", "Board", "Metrics", "Observer", "Row", "Watch"]


class Row(NamedTuple):
    """Numbers after a step."""

    step: int
    kind: str  # "train" or "validation"
    values: dict[str, float | None]  # None for what is no finite number
    rate: float | None = None  # images per second, of training; the same seed does not make it the same


def row(step: int, kind: str, values: Mapping[str, float], rate: float | None = None) -> Row:
    """Numbers, or None where one is not finite."""
    return Row(step, kind, {name: value if math.isfinite(value) else None for name, value in values.items()}, rate)


class Observer:
    """An observer does what it needs to of this."""

    def stepped(self) -> None:
        """After each step."""

    def measured(self, row: Row) -> None:
        """Every `log_every` steps, and after each evaluation."""

    def close(self) -> None:
        """At the end, whatever came in between."""


class Watch:
    """The observers of a run, and what each is told."""

    def __init__(self, run: Run, config: Config, images: Dataset, state: State, progress: bool) -> None:
        self.state, self.t = state, config.training
        self._since = time.perf_counter(), state.step
        self._failed: set[str] = set()
        self._observers: dict[str, Observer] = {}
        self._open("metrics.jsonl", lambda: Metrics(run.metrics, state.step))
        metrics = self._observers.get("metrics.jsonl")
        # What an evaluation of the state has found; nothing is known without metrics, and nothing asked for.
        self.evaluated = metrics.evaluated if isinstance(metrics, Metrics) else {}
        if isinstance(metrics, Metrics) and metrics.torn:
            lines = listing([str(line) for line in metrics.torn])
            self._warn(shown(str(run.metrics)), f"left out {len(metrics.torn)} damaged rows (lines {lines})")
        if progress:
            self._open("the progress bar", lambda: Bar(config.model.head, state.step, self.t.steps))
        if self.t.tensorboard:
            self._open("TensorBoard", lambda: Board(run.folder / "tensorboard", state, images))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(lambda observer: observer.close())

    def step(self, terms: Terms | None) -> None:
        """After a step; no terms where it was left out."""
        self._tell(lambda observer: observer.stepped())
        step = self.state.step
        if terms is None or (step % self.t.log_every and step != self.t.steps):
            return
        now = time.perf_counter()
        rate = (step - self._since[1]) * self.t.batch / max(now - self._since[0], 1e-9)
        self._since = now, step
        values = {name: float(value.detach()) for name, value in terms.mean().items()}
        values |= {f"multiplier_{name}": float(value) for name, value in self.state.constraints.multipliers.items()}
        self._measured(row(step, "train", values | {"skipped": self.state.skipped}, rate))

    def evaluation(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Evaluates and tells the values. An evaluation that fails ends no run either: it has none."""
        values: dict[str, float] = {}
        with self._guarded("evaluation"):
            values = evaluate()
            self._measured(row(self.state.step, "validation", values))
        return values

    def _measured(self, measured: Row) -> None:
        for name, value in measured.values.items():
            if value is None:
                self._warn(f"{measured.kind} {name}", f"no finite number at step {measured.step}: null in the metrics")
        self._tell(lambda observer: observer.measured(measured))

    def _open(self, name: str, opened: Callable[[], Observer]) -> None:
        with self._guarded(name):
            self._observers[name] = opened()

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for name, observer in self._observers.items():
            with self._guarded(name):
                call(observer)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(name, f"{type(error).__name__}: {error}")

    def _warn(self, name: str, fault: str) -> None:
        if name not in self._failed:
            self._failed.add(name)
            warnings.warn(f"{name}: {fault}; training goes on", stacklevel=2)


class Metrics(Observer):
    """Rows of `metrics.jsonl`: one JSON object per line, each with its `step`.

    Args:
        path: the file.
        last_step: rows beyond it are dropped: a run that is resumed makes them again.

    Attributes:
        evaluated: the row of an evaluation at `last_step`, if there is one.
        torn: lines that hold no row, which are dropped too; the last may be cut short by a kill, and is not among them.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        rows = [(i, _row(line)) for i, line in enumerate(lines[:-1], 1)]  # the last is empty, or cut short by a kill
        self.torn = [i for i, row in rows if row is None]
        kept = [row for _, row in rows if row is not None and row["step"] <= last_step]
        found = [row for row in kept if (row["step"], row.get("kind")) == (last_step, "validation")]
        self.evaluated = found[-1] if found else None
        files.write_atomically(path, "".join(map(_line, kept)).encode())
        self._file = path.open("a", encoding="utf-8")

    def measured(self, row: Row) -> None:
        self._file.write(_line({"step": row.step, "kind": row.kind, **row.values}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """A row that was written whole; none of anything else."""
    try:
        row = json.loads(line)
        step = row["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if isinstance(step, int | float) and isinstance(row, dict) else None


class Bar(Observer):
    """Progress, the terms of the objective in nats, images per second and the time left."""

    def __init__(self, title: str, step: int, steps: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]  # of the extra `train`, like all that is imported late

        self._bar = tqdm(total=steps, initial=step, unit="step", desc=title)

    def stepped(self) -> None:
        self._bar.update()

    def measured(self, row: Row) -> None:
        if row.kind == "train":
            terms = " ".join(f"{name}={_shown(row.values[name])}" for name in Terms._fields)
            self._bar.set_postfix_str(f"{terms} nats, {row.rate:.0f} images/s")

    def close(self) -> None:
        self._bar.close()


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


class Board(Observer):
    """TensorBoard: scalars, and pictures after each evaluation. What was written beyond the state's step is purged."""

    def __init__(self, folder: Path, state: State, images: Dataset) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(str(folder), purge_step=state.step + 1)
        self._state, self._images = state, images

    def measured(self, row: Row) -> None:
        for name, value in row.values.items():
            if value is not None:
                self._writer.add_scalar(f"{row.kind}/{name}", value, row.step)
        if row.rate is not None:
            self._writer.add_scalar("train/images_per_second", row.rate, row.step)
        if row.kind == "validation":
            from ..tools import figures

            for name, strip in figures.panels(self._state.model, self._images.first("validation", 8)).items():
                self._writer.add_image(name, strip, row.step)

    def close(self) -> None:
        self._writer.close()
