"""What an evaluation came to, as JSON, CSV, a Markdown table and curves."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..training.run import Run

__all__ = ["markdown", "write"]

SHORT = 8  # digits of a hash in a table for people

LIKELIHOOD = (
    *("run", "row", "weights", "bits", "likelihood alone", "δᵀΣ⁻¹δ/N", "50 %", "90 %", "energy", "horizontal"),
    *("vertical", "images", "values", "codes", "samples", "seed"),
)
DISTANCE = (
    *("floor", "real", "generated", "of the floor", "repeats", "seed", "features", "resize", "rounding"),
    "weights",
)

Row = Mapping[str, Any]


def write(folder: Path, result: dict[str, Any]) -> list[Path]:
    """`evaluation.json`, `likelihood.csv`, `samples.csv`, `evaluation.md`, and `temperatures.png` for curves.

    Returns: the files.
    """
    written = [Run(folder).write_json("evaluation.json", result)]
    for name in ("likelihood", "samples"):
        if result[name]:
            files.write_atomically(folder / f"{name}.csv", _csv(result[name]).encode())
            written.append(folder / f"{name}.csv")
    files.write_atomically(folder / "evaluation.md", markdown(result).encode())
    written.append(folder / "evaluation.md")
    if any(result["curves"].values()):
        written.append(_picture(result, folder / "temperatures.png"))
    return written


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: likelihood and calibration, and distances."""
    lines = [
        "## Likelihood and calibration",
        "",
        "On test images, dequantised. Bits per dimension: of the importance-weighted bound ± its standard error over "
        "images, and of the likelihood alone at the mean code, which leaves out what the code costs. δᵀΣ⁻¹δ/N, "
        "coverage, energy score and correlation of neighbours (samples − mean beside image − mean, horizontal, "
        "vertical) are at the mean code too.",
        "",
        _table(
            LIKELIHOOD,
            [_likelihood(row) for row in result["likelihood"]],
        ),
    ]
    if result["samples"]:
        name = result["samples"][0]["called"]
        kernel = f"{'KID' if name == 'FID' else 'kernel distance'} × 1000"
        lines += [
            "",
            f"## {'FID' if name == 'FID' else 'Fréchet distance'} and kernel distance",
            "",
            "± standard deviation over repeats. Temperatures (t_P, t_L) were chosen on selection images; (0, 0) are "
            "means. The floor is the distance between two halves of the real images.",
            "",
            _table(
                ("run", "row", "(t_P, t_L)", name, kernel, *DISTANCE),
                [_distance(row) for row in result["samples"]],
            ),
        ]
        notes = sorted({row["notes"] for row in result["samples"] if row["notes"]})
        lines += ["", *(f"† {note}." for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _hash(text: str) -> str:
    return text[:SHORT] or "–"


def _likelihood(row: Row) -> list[str]:
    def of(name: str, digits: int) -> str:
        return _number(row.get(name), digits)

    error = "" if row.get("bits_error") is None else f" ± {row['bits_error']:.3f}"
    cells = [row["run"] or "–", row["row"], _hash(row.get("weights", "")), of("bits", 3) + error]
    cells += [of("bits_likelihood", 3), of("squares", 3), of("inside_0.5", 3), of("inside_0.9", 3), of("energy", 3)]
    for axis in ("horizontal", "vertical"):
        cells.append(f"{of(f'{axis}_samples', 2)} / {of(f'{axis}_residual', 2)}")
    return cells + [of(name, 0) for name in ("images", "values", "codes", "samples", "seed")]


def _distance(row: Row) -> list[str]:
    def pair(name: str, digits: int, scale: float = 1) -> str:
        spread = row[f"{name}_spread"]
        return _number(scale * row[name], digits) + ("" if spread is None else f" ± {scale * spread:.{digits}f}")

    temperature = "–" if row["t_P"] is None else f"({row['t_P']:g}, {row['t_L']:g})"
    network = row["features"] + ("" if not row["feature_weights"] else f" {_hash(row['feature_weights'])}")
    return [
        *(row["run"], row["row"], temperature, pair("distance", 2) + (" †" if row["notes"] else "")),
        *(pair("kernel", 3, 1000), _number(row["floor"], 2), str(row["real_images"]), str(row["generated_images"])),
        *(row["floor_images"], str(row["repeats"]), _number(row["seed"], 0), network, row["resize"], row["rounding"]),
        _hash(row["weights"]),
    ]


def _picture(result: Mapping[str, Any], path: Path) -> Path:
    """For each run its distance from selection images against t_L, a line for each t_P."""
    from matplotlib.figure import Figure

    curves = {name: points for name, points in result["curves"].items() if points}
    called = result["samples"][0]["called"]
    figure = Figure(figsize=(4.2 * len(curves), 3.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for ax, (name, points) in zip(axes, curves.items(), strict=True):
        for t_P in sorted({point["t_P"] for point in points}):
            line = sorted((p["t_L"], p["distance"]) for p in points if p["t_P"] == t_P)
            ax.plot(
                *zip(*line, strict=True),
                marker="o",
                markersize=3,
                label=f"$t_P$ = {t_P:g}" if len({p["t_P"] for p in points}) > 1 else None,
            )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("$t_L$")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"{called}, {points[0]['images']} selection images")
    with files.atomic_writer(path) as file:
        figure.savefig(file, format="png")
    return path
