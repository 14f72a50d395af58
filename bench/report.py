"""Tables and plots from the stored results: `python -m bench.report` writes them, `--check` says whether they differ.

A document has a table between two comments, the first of which names the table and the file that it is made of:

    <!-- bench.report answer bench/results/NAME.csv -->
    <!-- /bench.report -->
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import store
from .operators import CELEBA, OPERATORS
from .peers import PEERS
from .plots import plots, titles
from .static.model import in_flight
from .store import Row

__all__ = ["TABLES", "check", "exponent", "main", "plots", "update"]

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "bench/README.md", "kernels/LOG.md")
HEADLINE = "log_prob_entropy_backward"
FIXED = replace(CELEBA, diagonal="scalar", layout="BRN")
AXES = ("N", "B", "R")

_BLOCK = re.compile(r"(<!-- bench\.report (\w+) (\S+) -->\n)(.*?)(<!-- /bench\.report -->)", re.S)


# --- Numbers ----------------------------------------------------------------------------------------------------


def _digits(value: float, digits: int = 2) -> str:
    """`digits` significant digits, in plain notation where that is short."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{round(value, digits - 1 - math.floor(math.log10(abs(value)))):.{places}f}"


def _ms(seconds: float) -> str:
    return "–" if math.isnan(seconds) else _digits(seconds * 1e3, 3) + " ms"


def _mb(size: float) -> str:
    return "–" if math.isnan(size) else _digits(size / 1e6, 3) + " MB"


def _spread(value: float, low: float, high: float, form: Callable[[float], str] = _digits) -> str:
    return "–" if math.isnan(value) else f"{form(value)} ({form(low)}–{form(high)})"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(rows + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def exponent(rows: Sequence[Row], axis: str) -> tuple[float, int]:
    """a in time ∝ sizeᵃ by least squares of the logarithms, and the number of sizes; NaN below two.

    Of the sets of rows of one run that differ in this size alone the largest is taken (N is changed by height, width,
    channels).
    """
    groups: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if math.isfinite(row.seconds):
            others = tuple(getattr(row, name) for name in AXES if name != axis)
            points = groups.setdefault((row.date, *others, row.diagonal, row.layout), {})
            points[getattr(row, axis)] = row.seconds
    points = max(groups.values(), key=len, default={})
    if len(points) < 2:
        return math.nan, len(points)
    x = [math.log(size) for size in points]
    y = [math.log(seconds) for seconds in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, len(points)


# --- Tables -----------------------------------------------------------------------------------------------------


def _where(rows: Sequence[Row]) -> str:
    runs = {row.date: row for row in rows}
    lines = []
    for date in sorted(runs):
        row = runs[date]
        place = f"{row.machine}, {row.cores} cores" if row.device == "cpu" else f"{row.device} ({row.machine})"
        rates = f"copies at {row.copy_bandwidth / 1e9:.1f} GB/s, multiplies matrices at {row.product_rate / 1e9:.0f} "
        lines.append(f"{place} ({rates}GFLOP/s); {row.versions}; commit {row.commit}, {date[:10]}")
    return "; ".join(lines)


def _absent(rows: Sequence[Row]) -> str:
    """What could not be measured, by reason; nothing is left out silently."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((row.peer, row.status, row.note), []).append(f"{row.operator} {row.case}")
    lines = []
    for (peer, status, note), cases in reasons.items():
        name = PEERS[peer].title if peer in PEERS else peer
        place = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        lines.append(f"- {name}, {place}: {status}, {note}")
    return "\nNot in these numbers:\n\n" + "\n".join(lines) + "\n" if lines else ""


def answer(rows: Sequence[Row]) -> str:
    """How much faster, how much smaller, how much more exact than what a user has."""
    chosen = {row.peer: row for row in rows if row.operator == HEADLINE and row.case == CELEBA.id}
    if "ours" not in chosen:
        return f"No results for {HEADLINE}, {CELEBA.id}.\n"
    fixed = {row.peer: row for row in rows if row.operator == HEADLINE and row.case == FIXED.id}
    ours = chosen["ours"]
    lines = []
    for peer, row in chosen.items():
        mine = peer == "ours"
        smaller = row.memory / ours.memory if ours.memory else math.nan
        there = fixed.get(peer)
        lines.append(
            [
                f"**{titles(row)[1]}**" if mine else titles(row)[1],
                _ms(row.seconds) if row.status == "ok" else row.status,
                "" if mine else _spread(row.ratio, row.ratio_p20, row.ratio_p80),
                "" if mine else _spread(there.ratio, there.ratio_p20, there.ratio_p80) if there else "–",
                _mb(row.memory),
                "" if mine else _digits(smaller),
                _digits(row.error_log_prob),
                _digits(there.error_log_prob if there else math.nan),
                _digits(row.error_gradient),
            ]
        )
    header = (
        "",
        "time",
        "we are faster by",
        "with one d",
        "memory",
        "we need less by",
        "log p off by, d ≈ 1",
        "log p off by, d = 1e-5",
    )
    case = f"log p and H with backward, {CELEBA.batch} images of {CELEBA.height}×{CELEBA.width}×{CELEBA.channels}"
    caption = (
        f"{case}, R = {CELEBA.rank}, float32. Medians, in brackets the 20th and 80th percentile of the ratios taken "
        f"within a round; memory is the peak above the inputs, gradients included; errors are against float64, log p "
        f"in nats, gradients relative. d is one of about 1 for each pixel, with P as [B, N, R] in memory; with one, it "
        f"is 1e-5, and P is [B, R, N], as a convolution leaves it. {_where(list(chosen.values()))}.\n"
    )
    return _table((*header, "gradients off by"), lines) + "\n" + caption + _absent(list(chosen.values()))


def operators(rows: Sequence[Row]) -> str:
    """Everything that was measured."""
    header = (
        "operator",
        "case",
        "by",
        "time (20–80 %)",
        "times ours (20–80 %)",
        "log p off [nats]",
        "H off [nats]",
        "gradients off",
        "other results off",
        "memory",
        "GB/s",
        "of copy",
        "of product",
        "times the floor",
    )
    lines = []
    for row in rows:
        if row.status != "ok":
            continue
        title, peer = titles(row)
        lines.append(
            [
                title,
                row.case,
                peer,
                _spread(row.seconds, row.seconds_p20, row.seconds_p80, lambda s: _digits(s * 1e3, 3)) + " ms",
                "1" if row.peer == "ours" else _spread(row.ratio, row.ratio_p20, row.ratio_p80),
                _digits(row.error_log_prob),
                _digits(row.error_entropy),
                _digits(row.error_gradient),
                _digits(row.error_output),
                _mb(row.memory),
                _digits(row.bandwidth / 1e9, 3),
                _percent(row.copy_share),
                _percent(row.product_share),
                _digits(row.over_floor),
            ]
        )
    return _table(header, lines) + f"\n{_where(rows)}.\n" + _absent(rows)


def growth(rows: Sequence[Row]) -> str:
    """Exponents of N, B and R."""
    lines = []
    for operator in dict.fromkeys(row.operator for row in rows):
        for peer in dict.fromkeys(row.peer for row in rows if row.operator == operator):
            chosen = [row for row in rows if (row.operator, row.peer, row.status) == (operator, peer, "ok")]
            fitted = [exponent(chosen, axis) for axis in AXES]
            if any(count > 1 for _, count in fitted):
                cells = [f"{slope:.2f} ({count})" if count > 1 else "–" for slope, count in fitted]
                lines.append([*titles(chosen[0]), *cells])
    caption = "\nTime grows as sizeᵃ: a by least squares of the logarithms, in brackets the number of sizes.\n"
    return _table(("operator", "by", "N", "B", "R"), lines) + caption


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"answer": answer, "operators": operators, "growth": growth}


def _requested_key(case: str) -> str:
    """Under which a document has the bytes that a case asks for: "64:BKM" of "K=64 BKM float32 item".

    They are counted in float32, and of a linear factor with one d only.
    """
    size, layout, *rest = case.split()
    not_counted = "bfloat16" in rest or (size.startswith("K=") and "item" not in rest)
    return "" if not_counted else f"{size[2:]}:{layout}"


def static(document: dict[str, Any]) -> str:
    """What `python -m bench.static --json` knows of the compiled kernels; no column of it is a time.

    Where a model gives bounds (in this version for one target) the rows are of that target's main kernels, else all.
    """
    kernels = [row for row in document["kernels"] if row.get("caps")] or document["kernels"]
    requested = {}
    for rank_layout, launches in document.get("requested", {}).items():
        for launch in launches:
            if launch.get("floor"):
                requested[launch["kernel"], rank_layout] = launch["requested"] / launch["floor"]
    header = ("kernel", "case", "target", "registers", "spills [byte]", "shared memory [byte]", "occupancy")
    flight = "stages × tile × programs = in flight"
    lines = []
    for row in kernels:
        caps = row.get("caps") or {}
        pipe = min(caps, key=caps.__getitem__, default=None)
        rank_layout = _requested_key(row["case"])
        lines.append(
            [
                f"{row['kernel']} {row.get('sizes', '')}".rstrip(),
                *(str(row[name]) for name in ("case", "target", "registers", "spills", "shared")),
                "–" if row["occupancy"] is None else _percent(row["occupancy"]),
                in_flight(row) if "tile" in row else "–",
                f"{requested[key]:.3f}" if (key := (row["kernel"], rank_layout)) in requested else "–",
                "–" if pipe is None else f"{caps[pipe] / 1e12:.1f}, {pipe}",
            ]
        )
    table = _table((*header, flight, "bytes requested / least", "model: at most [TB/s of P], by"), lines)
    assumptions = " ".join(document.get("assumptions", "").split())
    return f"{table}\nCompiled ahead of time, without a GPU: nothing here was timed. {assumptions}".rstrip() + "\n"


# --- Documents --------------------------------------------------------------------------------------------------


def _expected(table: str, file: str, root: Path) -> str:
    path = root / file
    if not path.exists():
        raise ValueError(f"{file}, which a table names, does not exist")
    if table == "static":
        return static(json.loads(path.read_text(encoding="utf-8")))
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r}, expected one of {[*TABLES, 'static']}")
    return TABLES[table](_newest(path))


def _newest(path: Path) -> list[Row]:
    """The newest rows of every case, of operators that there still are."""
    return store.latest(row for row in store.read(path) if row.operator in OPERATORS)


def render(text: str, root: Path = ROOT) -> str:
    """A document with every table made anew from the file it names.

    Raises:
        ValueError: an unknown table, or a file that is not there or cannot be read.
    """
    return _BLOCK.sub(lambda found: found[1] + "\n" + _expected(found[2], found[3], root) + "\n" + found[5], text)


def update(document: Path, root: Path = ROOT) -> bool:
    """Writes the tables of a document; whether anything changed."""
    text = document.read_text(encoding="utf-8")
    new = render(text, root)
    if new != text:
        store.write_atomically(document, lambda file: file.write(new))
    return new != text


def check(document: Path, root: Path = ROOT) -> list[str]:
    """The tables of a document that differ from the files they name, one line each."""
    text = document.read_text(encoding="utf-8")
    differing = []
    for found in _BLOCK.finditer(text):
        try:
            same = found[4] == "\n" + _expected(found[2], found[3], root) + "\n"
        except ValueError as error:
            differing.append(f"{document.name}: {error}")
            continue
        if not same:
            differing.append(f"{document.name}: table {found[2]} differs from {found[3]}; run python -m bench.report")
    return differing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, help=f"default: {', '.join(DOCUMENTS)}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table differs")
    parser.add_argument("--show", type=Path, metavar="CSV", help="print the tables of a file, and nothing else")
    options = parser.parse_args(arguments)
    if options.show:
        for table in TABLES.values():
            print(table(_newest(options.show)))
        return 0
    documents = options.documents or [ROOT / name for name in DOCUMENTS if (ROOT / name).exists()]
    if options.check:
        differing = [line for document in documents for line in check(document)]
        print("\n".join(differing) or "every table agrees with its file")
        return 1 if differing else 0
    for file in sorted(store.RESULTS.glob("*.csv")):
        for path in plots(_newest(file), store.RESULTS, file.stem):
            print(f"drew {path.relative_to(ROOT)}")
    for document in documents:
        print(f"{document.name}: {'tables written' if update(document) else 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
