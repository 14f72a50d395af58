"""Results as rows of a CSV file: appended, never executed, written whole or not at all."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from sosvae import files

__all__ = ["RESULTS", "Row", "append", "default_file", "latest", "read"]

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One operator on one case by one peer. What was not measured is NaN, and `status` says why."""

    # when, where, what
    date: str  # UTC, of the whole run: rows that share it were measured in alternation
    commit: str  # short hash; + where the checkout had changes
    machine: str  # processor
    cores: int
    device: str  # "cpu", or the GPU's name
    versions: str  # "python 3.11.7; torch 2.13.0; ..."
    copy_bandwidth: float  # byte/s, measured
    product_rate: float  # float32 operations/s of a matrix product, measured
    # the case
    operator: str
    case: str
    height: int
    width: int
    channels: int
    N: int
    B: int
    R: int
    diagonal: str
    layout: str
    dtype: str
    peer: str
    status: str  # "ok", "missing", "wrong", "failed" or "skipped"
    note: str  # the reason, where it is not ok
    # the result
    rounds: int
    calls: int  # per round
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    ratio: float  # to ours, round by round: median
    ratio_p20: float
    ratio_p80: float
    error_log_prob: float  # nats
    error_entropy: float  # nats
    error_gradient: float  # relative, the worst gradient
    error_output: float  # relative, the worst of everything else
    peak: float  # bytes above the inputs
    peak_by: str  # "resident" or "allocator"
    least_bytes: float
    operations: float
    floor: float  # s


_TYPES = get_type_hints(Row)
_NAMES = [field.name for field in fields(Row)]


def default_file(machine: str, cores: int, device: str) -> Path:
    """bench/results/NAME.csv for a machine; rows of different machines are not mixed."""
    name = device if device != "cpu" else f"{machine} {cores} cores"
    return RESULTS / ("-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) + ".csv")


def read(path: Path) -> list[Row]:
    """The rows of a file, in its order.

    Raises:
        ValueError: a column is missing or unknown, or a value is not of its type; file and line are named.
    """
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or list(reader.fieldnames) != _NAMES:
            different = ", ".join(sorted(set(reader.fieldnames or ()) ^ set(_NAMES))) or "order"
            raise ValueError(f"{path.name}: columns are not those of bench.store.Row: {different}")
        for values in reader:
            try:
                if None in values or None in values.values():
                    raise ValueError("another number of columns")
                rows.append(Row(**{name: _TYPES[name](values[name]) for name in _NAMES}))
            except ValueError as error:
                raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from error
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, which is made if it is not there: the old and the new together replace it at once."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _NAMES, lineterminator="\n")
    writer.writeheader()
    for row in [*(read(path) if path.exists() else ()), *rows]:
        writer.writerow({name: _text(value) for name, value in asdict(row).items()})
    files.write_atomically(path, text.getvalue().encode())


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each operator and case the rows of the newest run that has it, so that ratios are of one run."""
    rows = list(rows)
    newest: dict[tuple[str, str], str] = {}
    for row in rows:
        key = row.operator, row.case
        newest[key] = max(row.date, newest.get(key, ""))
    return [row for row in rows if row.date == newest[row.operator, row.case]]


def _text(value: Any) -> str:
    """Four significant digits of a float, which is more than a time is good for."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.4g}"
    return str(value)
