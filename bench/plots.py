"""Pictures of the stored results: time, memory and error against N."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from . import store
from .operators import OPERATORS
from .peers import PEERS
from .store import Row

__all__ = ["plots", "titles"]


def titles(row: Row) -> tuple[str, str]:
    operator, peer = OPERATORS.get(row.operator), PEERS.get(row.peer)
    return operator.title if operator else row.operator, peer.title if peer else row.peer


COLOURS = {
    "ours": "#0b5fa5",
    "torch": "#d1495b",
    "compile": "#edae49",
    "linear_operator": "#8d6a9f",
    "numpyro": "#3a9679",
    "betavae": "#555555",
    "textbook": "#d1495b",
    "textbook_compile": "#edae49",
}
MARKERS = dict(zip(COLOURS, "os^DvPs^", strict=True))  # where lines lie on each other


def plots(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Time, memory and error against N, one line per peer: three pictures, a panel per operator with two N or more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    panels = {}
    for operator in dict.fromkeys(row.operator for row in rows):
        chosen = _along_N([row for row in rows if row.operator == operator and row.status == "ok"])
        if len({row.N for row in chosen}) > 1:
            panels[operator] = chosen
    measures: dict[str, Callable[[Sequence[Row]], tuple[str, Callable[[Row], float]]]] = {
        "time": lambda rows: ("time of a call [ms]", lambda row: row.seconds * 1e3),
        "memory": lambda rows: ("peak above the inputs [MB]", lambda row: row.memory / 1e6),
        "error": _error,
    }
    written = []
    for measure, choose in measures.items() if panels else ():
        figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
        for axis, chosen in zip(axes[0], panels.values(), strict=True):
            label, value = choose(chosen)
            for peer in dict.fromkeys(row.peer for row in chosen):
                points = sorted((row.N, value(row)) for row in chosen if row.peer == peer)
                title = PEERS[peer].title if peer in PEERS else peer
                style = {"color": COLOURS.get(peer), "marker": MARKERS.get(peer, "o")}
                axis.plot(*zip(*points, strict=True), label=title, **style)
            if measure == "time" and any(math.isfinite(row.floor) for row in chosen):
                floor = sorted((row.N, row.floor * 1e3) for row in chosen if row.peer == "ours")
                axis.plot(*zip(*floor, strict=True), "--", color="0.5", label="floor of this machine")
            row = chosen[0]
            sizes = f"B = {row.B}, R = {row.R}" if len({r.B for r in chosen}) == 1 else f"R = {row.R}"
            axis.set(xscale="log", yscale="log", xlabel="N = height · width · channels", ylabel=label)
            axis.set_xticks(sorted({r.N for r in chosen}))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axis.xaxis.set_minor_locator(NullLocator())
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{titles(row)[0]} ({sizes})", fontsize=10)
            axis.grid(True, which="major", color="0.9")
            axis.legend(fontsize=8, frameon=False)
        figure.tight_layout()
        path = folder / f"{stem}-{measure}.png"
        # No date or version in the file: the same results give the same bytes.
        save = functools.partial(figure.savefig, dpi=110, metadata={"Software": None})
        store.write_atomically(path, save, "wb")
        plt.close(figure)
        written.append(path)
    return written


def _along_N(rows: Sequence[Row]) -> list[Row]:
    """The largest set of rows of one run in which only N differs (for a training step, B too: its sizes are few)."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        batch = 0 if row.operator.startswith("train_") else row.B
        groups.setdefault((row.date, batch, row.R, row.diagonal, row.layout), []).append(row)
    return max(groups.values(), key=lambda group: len({row.N for row in group}), default=[])


_ERRORS = {
    "log p off by [nats]": "error_log_prob",
    "H off by [nats]": "error_entropy",
    "gradients off by [relative]": "error_gradient",
    "results off by [relative]": "error_output",
}


def _error(rows: Sequence[Row]) -> tuple[str, Callable[[Row], float]]:
    """The error to be drawn, the first that these rows have: its label and where it is found."""
    known = (name for name, column in _ERRORS.items() if any(math.isfinite(getattr(row, column)) for row in rows))
    name = next(known, next(iter(_ERRORS)))
    return name + ", against float64", lambda row: getattr(row, _ERRORS[name])
