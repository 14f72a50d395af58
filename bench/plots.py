"""Pictures of the stored results: time, peak memory and error against N."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sosvae import files

from .store import Row
from .tables import along, titles

__all__ = ["plots"]

STYLES = {  # colours, and markers where lines lie on each other
    "ours": ("#0b5fa5", "o"),
    "torch": ("#d1495b", "s"),
    "compile": ("#edae49", "^"),
    "linear_operator": ("#8d6a9f", "D"),
    "numpyro": ("#3a9679", "v"),
    "betavae": ("#555555", "P"),
    "textbook": ("#d1495b", "s"),
    "textbook_compile": ("#edae49", "^"),
}

Value = Callable[[Row], float]


def plots(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Time, memory and error against N, one line per peer: three pictures, a panel per operator with two N or more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = []
    for operator in dict.fromkeys(row.operator for row in rows):
        measured = [row for row in rows if row.operator == operator and row.status == "ok"]
        chosen = along(measured, "N", *(["B"] if operator == "train_step" else []))  # its sizes are few
        if len({row.N for row in chosen}) > 1:
            panels.append(chosen)
    written = []
    for measure, choose in _MEASURES.items() if panels else ():
        figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
        for axis, chosen in zip(axes[0], panels, strict=True):
            label, value = choose(chosen)
            for peer in dict.fromkeys(row.peer for row in chosen):
                colour, marker = STYLES.get(peer, (None, "o"))
                _line(axis, chosen, peer, value, color=colour, marker=marker)
            if measure == "time" and any(math.isfinite(row.floor) for row in chosen):
                _line(
                    axis, chosen, "ours", lambda row: row.floor * 1e3, "--", color="0.5", label="floor of this machine"
                )
            _dress(axis, chosen, label)
        figure.tight_layout()
        path = folder / f"{stem}-{measure}.png"
        with files.atomic_writer(path) as file:
            # No date or version in the file: the same results give the same bytes.
            figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def _line(axis: Any, rows: Sequence[Row], peer: str, value: Value, *form: str, **style: Any) -> None:
    chosen = sorted((row for row in rows if row.peer == peer), key=lambda row: row.N)
    style = {"label": titles(chosen[0])[1], **style}
    axis.plot([row.N for row in chosen], [value(row) for row in chosen], *form, **style)


def _dress(axis: Any, rows: Sequence[Row], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    sizes = f"B = {rows[0].B}, R = {rows[0].R}" if len({row.B for row in rows}) == 1 else f"R = {rows[0].R}"
    axis.set(xscale="log", yscale="log", xlabel="N = height · width · channels", ylabel=label)
    axis.set_xticks(sorted({row.N for row in rows}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"{titles(rows[0])[0]} ({sizes})", fontsize=10)
    axis.grid(True, which="major", color="0.9")
    axis.legend(fontsize=8, frameon=False)


_ERRORS = {
    "error_log_prob": "log p off by [nats]",
    "error_entropy": "H off by [nats]",
    "error_gradient": "gradients off by [relative]",
    "error_output": "results off by [relative]",
}


def _error(rows: Sequence[Row]) -> tuple[str, Value]:
    """The label and the value of the first error that these rows have."""
    known = (column for column in _ERRORS if any(math.isfinite(getattr(row, column)) for row in rows))
    column = next(known, "error_log_prob")
    return _ERRORS[column] + ", against float64", lambda row: getattr(row, column)


_MEASURES: dict[str, Callable[[Sequence[Row]], tuple[str, Value]]] = {
    "time": lambda rows: ("time of a call [ms]", lambda row: row.seconds * 1e3),
    "memory": lambda rows: ("peak above the inputs [MB]", lambda row: row.peak / 1e6),
    "error": _error,
}
