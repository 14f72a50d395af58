"""Tables of stored results, in Markdown."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .operators import CELEBA, OPERATORS
from .peers import PEERS
from .static.model import in_flight
from .store import Row

__all__ = ["TABLES", "along", "exponent", "markdown", "static", "titles"]

HEADLINE = "log_prob_entropy_backward"
FIXED = replace(CELEBA, diagonal="scalar", layout="BRN")
AXES = ("N", "B", "R")


# --- Numbers ----------------------------------------------------------------------------------------------------


def markdown(*rows: Sequence[str]) -> str:
    """Rows of cells as lines of a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join([markdown(header), "|" + "---|" * len(header), *map(markdown, lines)]) + "\n"


def _digits(value: float, digits: int = 2) -> str:
    """`digits` significant digits, in plain notation where that is short."""
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):.{max(0, places)}f}"


def _scaled(factor: float, unit: str) -> Callable[[float], str]:
    return lambda value: "–" if math.isnan(value) else _digits(value * factor, 3) + unit


_ms, _mb = _scaled(1e3, " ms"), _scaled(1e-6, " MB")


def _spread(value: float, low: float, high: float, form: Callable[[float], str] = _digits) -> str:
    return "–" if math.isnan(value) else f"{form(value)} ({form(low)}–{form(high)})"


def _ratio(row: Row | None) -> str:
    return _spread(row.ratio, row.ratio_p20, row.ratio_p80) if row else "–"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def along(rows: Iterable[Row], axis: str, *free: str) -> list[Row]:
    """The largest set of rows of one run that differ in the size `axis` alone, and in `free` ones (N is changed by
    height, width, channels)."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        others = tuple(getattr(row, name) for name in AXES if name not in (axis, *free))
        groups.setdefault((row.date, *others, row.diagonal, row.layout), []).append(row)
    return max(groups.values(), key=lambda group: len({getattr(row, axis) for row in group}), default=[])


def exponent(rows: Sequence[Row], axis: str) -> tuple[float, int]:
    """a in time ∝ sizeᵃ by least squares of the logarithms, and the number of sizes; NaN below two."""
    chosen = along((row for row in rows if math.isfinite(row.seconds)), axis)
    points = {getattr(row, axis): row.seconds for row in chosen}
    if len(points) < 2:
        return math.nan, len(points)
    slope, _ = statistics.linear_regression(*([*map(math.log, values)] for values in (points, points.values())))
    return slope, len(points)


def titles(row: Row) -> tuple[str, str]:
    """Of the operator and of the peer."""
    operator, peer = OPERATORS.get(row.operator), PEERS.get(row.peer)
    return operator.title if operator else row.operator, peer.title if peer else row.peer


# --- Tables -----------------------------------------------------------------------------------------------------


def _where(rows: Sequence[Row]) -> str:
    lines = []
    for date, row in sorted({row.date: row for row in rows}.items()):
        place = f"{row.machine}, {row.cores} cores" if row.device == "cpu" else f"{row.device} ({row.machine})"
        rates = f"copies at {row.copy_bandwidth / 1e9:.1f} GB/s, multiplies matrices at {row.product_rate / 1e9:.0f} "
        lines.append(f"{place} ({rates}GFLOP/s); {row.versions}; commit {row.commit}, {date[:10]}")
    return "; ".join(lines)


def _absent(rows: Sequence[Row]) -> str:
    """What could not be measured, by reason; nothing is left out silently."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault((titles(row)[1], row.status, row.note), []).append(f"{row.operator} {row.case}")
    lines = []
    for (peer, status, note), cases in reasons.items():
        place = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        lines.append(f"- {peer}, {place}: {status}, {note}")
    return "\nNot in these numbers:\n\n" + "\n".join(lines) + "\n" if lines else ""


def answer(rows: Sequence[Row]) -> str:
    """How much faster, how much smaller, how much more exact than what a user has."""
    chosen, fixed = (
        {row.peer: row for row in rows if (row.operator, row.case) == (HEADLINE, case.id)} for case in (CELEBA, FIXED)
    )
    if "ours" not in chosen:
        return f"No results for {HEADLINE}, {CELEBA.id}.\n"
    ours = chosen["ours"]
    lines = []
    for peer, row in chosen.items():
        mine, there, title = peer == "ours", fixed.get(peer), titles(row)[1]
        lines.append(
            [
                f"**{title}**" if mine else title,
                _ms(row.seconds) if row.status == "ok" else row.status,
                "" if mine else _ratio(row),
                "" if mine else _ratio(there),
                _mb(row.peak),
                "" if mine else _digits(row.peak / ours.peak if ours.peak else math.nan),
                _digits(row.error_log_prob),
                _digits(there.error_log_prob if there else math.nan),
                _digits(row.error_gradient),
            ]
        )
    header = (
        *("", "time", "we are faster by", "with one d", "memory", "we need less by"),
        *("log p off by, d ≈ 1", "log p off by, d = 1e-5", "gradients off by"),
    )
    case = f"log p and H with backward, {CELEBA.batch} images of {CELEBA.height}×{CELEBA.width}×{CELEBA.channels}"
    caption = (
        f"{case}, R = {CELEBA.rank}, float32. Medians, in brackets the 20th and 80th percentile of the ratios taken "
        f"within a round; memory is the peak above the inputs, gradients included; errors are against float64, log p "
        f"in nats, gradients relative. d is one of about 1 for each pixel, with P as [B, N, R] in memory; with one, it "
        f"is 1e-5, and P is [B, R, N], as a convolution leaves it. {_where(list(chosen.values()))}.\n"
    )
    return _table(header, lines) + "\n" + caption + _absent(list(chosen.values()))


def headline(rows: Sequence[Row]) -> str:
    """Faster, smaller, more exact: ours beside torch's class, in three rows."""
    chosen, fixed = (
        {row.peer: row for row in rows if (row.operator, row.case) == (HEADLINE, case.id)} for case in (CELEBA, FIXED)
    )
    if not {"ours", "torch"} <= set(chosen) & set(fixed):
        return f"No results for {HEADLINE}, {CELEBA.id}.\n"
    (ours, torchs), (ours_fixed, torchs_fixed) = ((group["ours"], group["torch"]) for group in (chosen, fixed))
    lines = [
        ["faster: log p, H and all gradients", _ms(torchs.seconds), f"**{_ms(ours.seconds)}**"],
        ["smaller: memory for it, gradients included", _mb(torchs.peak), f"**{_mb(ours.peak)}**"],
        [
            "more exact: log p in float32, d = 1e-5, is off by",
            f"{_digits(torchs_fixed.error_log_prob)} nats",
            f"**{_digits(ours_fixed.error_log_prob)} nats**",
        ],
    ]
    caption = (
        f"{CELEBA.batch} images of {CELEBA.height}×{CELEBA.width}×{CELEBA.channels}, R = {CELEBA.rank}, float32; "
        f"{ours.machine}, {ours.cores} cores. Your figures: `make bench`.\n"
    )
    return _table(("", "torch's class", "`lowrank_mvn`"), lines) + "\n" + caption


def operators(rows: Sequence[Row]) -> str:
    """Everything that was measured."""
    header = (
        *("operator", "case", "by", "time (20–80 %)", "times ours (20–80 %)"),
        *("log p off [nats]", "H off [nats]", "gradients off", "other results off"),
        *("memory", "GB/s", "of copy", "of product", "times the floor"),
    )
    lines = []
    for row in rows:
        if row.status == "ok":
            title, peer = titles(row)
            bandwidth = row.least_bytes / row.seconds  # what of the machine's is put to use
            errors = (row.error_log_prob, row.error_entropy, row.error_gradient, row.error_output)
            lines.append(
                [
                    *(title, row.case, peer),
                    _spread(row.seconds, row.seconds_p20, row.seconds_p80, _scaled(1e3, "")) + " ms",
                    "1" if row.peer == "ours" else _ratio(row),
                    *map(_digits, errors),
                    _mb(row.peak),
                    _digits(bandwidth / 1e9, 3),
                    _percent(bandwidth / row.copy_bandwidth),
                    _percent(row.operations / row.seconds / row.product_rate),
                    _digits(row.seconds / row.floor),
                ]
            )
    return _table(header, lines) + f"\n{_where(rows)}.\n" + _absent(rows)


def growth(rows: Sequence[Row]) -> str:
    """Exponents of N, B and R."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.operator, row.peer), []).extend([row] if row.status == "ok" else [])
    lines = []
    for chosen in groups.values():
        fitted = [exponent(chosen, axis) for axis in AXES]
        if any(count > 1 for _, count in fitted):
            cells = [f"{slope:.2f} ({count})" if count > 1 else "–" for slope, count in fitted]
            lines.append([*titles(chosen[0]), *cells])
    caption = "\nTime grows as sizeᵃ: a by least squares of the logarithms, in brackets the number of sizes.\n"
    return _table(("operator", "by", "N", "B", "R"), lines) + caption


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "answer": answer,
    "headline": headline,
    "operators": operators,
    "growth": growth,
}


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
    requested = {
        (launch["kernel"], rank_layout): f"{launch['requested'] / launch['floor']:.3f}"
        for rank_layout, launches in document.get("requested", {}).items()
        for launch in launches
        if launch.get("floor")
    }
    lines = []
    for row in kernels:
        caps = row.get("caps") or {}
        pipe = min(caps, key=caps.__getitem__, default=None)
        lines.append(
            [
                f"{row['kernel']} {row.get('sizes', '')}".rstrip(),
                *(str(row[name]) for name in ("case", "target", "registers", "spills", "shared")),
                "–" if row["occupancy"] is None else _percent(row["occupancy"]),
                in_flight(row) if "tile" in row else "–",
                requested.get((row["kernel"], _requested_key(row["case"])), "–"),
                "–" if pipe is None else f"{caps[pipe] / 1e12:.1f}, {pipe}",
            ]
        )
    header = (
        *("kernel", "case", "target", "registers", "spills [byte]", "shared memory [byte]", "occupancy"),
        *("stages × tile × programs = in flight", "bytes requested / least", "model: at most [TB/s of P], by"),
    )
    table = _table(header, lines)
    assumptions = " ".join(document.get("assumptions", "").split())
    return f"{table}\nCompiled ahead of time, without a GPU: nothing here was timed. {assumptions}".rstrip() + "\n"
