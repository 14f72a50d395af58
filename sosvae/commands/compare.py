"""A β-VAE, the global-local head on it, and the paper's recipe: figures side by side, and numbers on test images."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..config import Config
from ..data import Dataset
from ..data.split import TEST
from ..evaluation import baselines, bits, counted, measure, samples
from ..models.observation import Temperature
from ..models.vae import VAE
from ..presets import beside
from ..training.head import of_run, train_head
from ..training.loop import train
from ..training.run import Run
from ..training.start import check_resumable
from .base import Settings, Temperatures, parse, preset

USAGE = "[PRESET] [options]"

BETA, PIXELWISE, GLOBAL_LOCAL, RECIPE = "β-VAE", "pixel-wise, refitted", "global-local", "paper's recipe"
FOLDERS = {BETA: "beta-vae", PIXELWISE: "pixelwise", GLOBAL_LOCAL: "global-local", RECIPE: "sos-vae"}
SHOWN = (BETA, GLOBAL_LOCAL, RECIPE)  # in the figures
ONE_SIGMA = "one σ, same means"
CODES = 16  # of the importance-weighted bound
PIXELWISE_START = 6e-3  # of its variances, as of the other heads'

# What a likelihood that is right shows in numbers, of the global-local head (DESIGN of the measures: evaluation/).
BETTER = 1.3  # bits per dimension, than the best of independent pixels
SQUARES = (0.8, 1.25)  # δᵀΣ⁻¹δ/N
COVERED = 0.05  # how far coverage may be from what the interval says
ALIKE = 0.1  # how far neighbours' correlation may be from the residual's own


@dataclass(frozen=True)
class Options(Temperatures):
    """Train a β-VAE, fit the global-local head to it, train the paper's recipe, and set them side by side.

    Numbers are of test images, on which nothing was chosen.
    """

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder for all runs and the figures; what is complete there is not trained again; by default runs/PRESET (path).
    """
    accept_data_changes: bool = False
    """Go on with runs that are there, although images have come, gone or changed."""
    quiet: bool = False
    """No progress bar."""


def main(args: list[str]) -> int:
    name, config, args = preset(args)
    o = parse(Options, "compare", args, Options(config=config))
    folder = o.folder or Path("runs") / name
    result = compare(
        o.config,
        folder,
        accept_data_changes=o.accept_data_changes,
        progress=not o.quiet,
        temperature=o.temperature,
    )
    if "unfinished" in result:
        print("the same command goes on from there, and with what is left to train")
        return 130  # as a shell counts Ctrl-C
    print("\n" + "\n".join(table(result)) + "\n")
    for expectation in result["missed"]:
        print(f"missed: {expectation}")
    print(f"numbers: {folder / 'comparison.json'}")
    print(f"figures: {folder / 'figures' / 'sheet.png'}, and in the same folder:")
    print("  " + ", ".join(Path(path).name for path in result["figures"]))
    return 0


def compare(
    config: Config,
    folder: str | Path,
    *,
    accept_data_changes: bool = False,
    progress: bool = True,
    temperature: Temperature = (1.0, 1.0),
) -> dict[str, Any]:
    """Trains a β-VAE, on its features the pixel-wise and the global-local head, then `config` itself, the paper's
    recipe; measures them on test images and writes `folder/figures`.

    One after the other: two at once on a few cores take many times as long. A run that is there already is
    gone on with where it stopped, and left alone where it is complete. All hold out the same images.

    Returns: what `folder/comparison.json` holds: the numbers of all rows, and the expectations they missed; only
        `unfinished`, and the model's name, where Ctrl-C came in between.

    Raises: as `train`.
    """
    from ..tools import figures

    folder = Path(folder)
    beta = beside(config)
    wanted = {
        BETA: beta,
        PIXELWISE: of_run(beta, head="pixelwise", diagonal=PIXELWISE_START),
        GLOBAL_LOCAL: of_run(beta, neighbourhood=5),
        RECIPE: config,
    }
    places = {name: Run(folder / FOLDERS[name]) for name in wanted}
    for name, run in places.items():  # before hours are spent on the first
        if run.has_work():
            check_resumable(run, wanted[name])
        else:
            run.check_free()
    # What a run that is there holds out, the others hold out too.
    split = next((run.split for run in places.values() if run.has_work() and run.split is not None), None)
    for name, settings in wanted.items():
        run = places[name]
        if name in (PIXELWISE, GLOBAL_LOCAL):
            base, accept = places[BETA], accept_data_changes
            train_head(base, settings, run.folder, accept_data_changes=accept, progress=progress)
        else:
            resume = run.has_work()
            train(
                settings,
                run.folder,
                resume=resume,
                accept_data_changes=accept_data_changes,
                split=None if resume else split,
                progress=progress,
            )
        split = split or run.split
        if run.steps()[-1] < settings.training.steps:
            return {"unfinished": name}
    images = places[BETA].images(config.data, accept_changes=accept_data_changes)
    if split is not None and (changes := data.compare(images.split, places[RECIPE].split or split)):
        warnings.warn(f"the paper's recipe was trained on other images: {'; '.join(changes)}", stacklevel=2)
    models = {name: run.model() for name, run in places.items()}
    result = measured(models, images, progress)
    predictions = {name: figures.predict(models[name], 8, temperature=temperature) for name in SHOWN}
    written = figures.save_comparison(predictions, folder / "figures", table(result))
    part = result["part"]
    shown = {name: models[name] for name in SHOWN}
    path = folder / "figures" / "reconstructions.png"
    written.append(figures.save_reconstructions(shown, images.first(part, 8), path, temperature=temperature))
    result |= {"figures": [str(path.relative_to(folder)) for path in written], "torch": torch.__version__}
    Run(folder).write_json("comparison.json", result)
    return result


def measured(models: Mapping[str, VAE], images: Dataset, progress: bool) -> dict[str, Any]:
    """The numbers of every row on test images, and the expectations that they miss."""
    part = TEST if len(images.indices.get(TEST, ())) else "validation"
    pixels = images.images[images.indices[part]]
    some = counted.changing(images.images[images.train])
    chosen_on = images.first("validation", len(images.validation))
    rows: dict[str, bits.Model] = {ONE_SIGMA: baselines.one_sigma(models[BETA], chosen_on, some), **models}
    found: dict[str, dict[str, float]] = {}
    for name, model in rows.items():
        with _progress(f"measures {name}", len(pixels), progress) as advanced:
            found[name] = measure.measure(model, pixels, measure.Settings(CODES), counted=some, advanced=advanced)
        if isinstance(model, VAE):
            found[name] |= samples.quality(model, images.deviation())._asdict()
    return {
        "part": part,
        "images": len(pixels),
        "codes": CODES,
        "models": found,
        "data_deviation": images.deviation(),
        "missed": missed(found),
    }


def correlation(row: Mapping[str, float], of: str) -> float:
    """Pooled correlation between neighbours, the mean of both axes, of "samples" or of the "residual"."""
    return 0.5 * (row[f"horizontal_{of}"] + row[f"vertical_{of}"])


def missed(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Expectations of the global-local head that the numbers do not meet, in words."""
    row, found = rows[GLOBAL_LOCAL], []
    better = min(rows[name]["bits"] for name in (ONE_SIGMA, PIXELWISE, BETA)) - row["bits"]
    if not better >= BETTER:
        found.append(f"{better:.2f} bits better than the best of independent pixels, expected at least {BETTER}")
    if not SQUARES[0] <= row["squares"] <= SQUARES[1]:
        found.append(f"δᵀΣ⁻¹δ/N is {row['squares']:.2f}, expected {SQUARES[0]} to {SQUARES[1]}")
    for share in (0.5, 0.9):
        if not abs(row[f"inside_{share}"] - share) <= COVERED:
            found.append(
                f"{row[f'inside_{share}']:.1%} lie in intervals of {share:.0%}, expected {COVERED:.0%} at most off"
            )
    of_samples, own = correlation(row, "samples"), correlation(row, "residual")
    if not abs(of_samples - own) <= ALIKE:
        found.append(f"neighbours in samples correlate by {of_samples:.2f}, expected {own:.2f} within {ALIKE}")
    return [f"{GLOBAL_LOCAL}: {line}" for line in found]


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal, and for under the pictures."""
    head = ("log p", "bits", "of p(x|z)", "δᵀΣ⁻¹δ/N", "in 50 %", "in 90 %", "correlation", "residual's")
    lines = [f"{'':22}" + "".join(f"{name:>12}" for name in head), f"{'uniform':22}{'':12}{bits.UNIFORM:12.2f}"]
    for name, row in result["models"].items():
        values = [
            f"{row['log_likelihood']:.0f}",
            *(f"{row[key]:.2f}" for key in ("bits", "bits_likelihood", "squares")),
            *(f"{100 * row[key]:.0f} %" for key in ("inside_0.5", "inside_0.9")),
            *(f"{correlation(row, of):.2f}" for of in ("samples", "residual")),
        ]
        lines.append(f"{name:22}" + "".join(f"{value:>12}" for value in values))
    return [
        *lines,
        f"{result['images']} images of the {result['part']} part. log p: of x given the mean code, in nats an image. "
        f"bits: per dimension, by the importance-weighted bound of {result['codes']} codes.",
        "correlation: of neighbours in samples y − μ, pooled; beside it that in the residual x − μ, which is its right "
        "value.",
    ]


class _progress:
    """A bar over images, or nothing."""

    def __init__(self, title: str, total: int, shown: bool) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(total=total, unit="image", desc=title, disable=not shown)

    def __enter__(self) -> Callable[[int], Any]:
        advance: Callable[[int], Any] = self._bar.update
        return advance

    def __exit__(self, *_: object) -> None:
        self._bar.close()
