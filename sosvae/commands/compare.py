"""SOS-VAE and β-VAE on the same data: figures side by side, and numbers."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..config import Config
from ..evaluation import samples
from ..presets import beta_vae
from ..training.loop import train
from ..training.run import Run
from ..training.start import check_resumable
from .base import Settings, parse, preset

USAGE = "[PRESET] [options]"

# What a picture of a working method shows, in numbers: samples smooth where Σ is structured and speckled
# where it is diagonal, and as spread out as the data (an exploded variance is smooth too).
SMOOTH, SPECKLED = 0.8, 0.05  # correlation of horizontal neighbours in sample − mean
DEVIATION = (0.7, 1.4)  # standard deviation of samples over that of the data


@dataclass(frozen=True)
class Options:
    """Train a SOS-VAE and the β-VAE of equal decoder, one after the other, and set them side by side."""

    config: Settings = field(default_factory=Config)
    folder: Path | None = None
    """Folder for both runs and the figures; what is complete there is not trained again; by default runs/PRESET (path).
    """
    accept_data_changes: bool = False
    """Go on with runs that are there, although images have come, gone or changed."""
    quiet: bool = False
    """No progress bar."""


def main(args: list[str]) -> int:
    name, config, args = preset(args)
    o = parse(Options, "compare", args, Options(config))
    folder = o.folder or Path("runs") / name
    result = compare(o.config, folder, accept_data_changes=o.accept_data_changes, progress=not o.quiet)
    if "unfinished" in result:
        print("the same command goes on from there, and with what is left to train")
        return 130  # as a shell counts Ctrl-C
    print(f"\n{'':10}{'neighbour correlation':>24}{'deviation over data':>22}")
    for model, values in result["models"].items():
        print(f"{model:10}{values['neighbour_correlation']:>24.3f}{values['deviation']:>22.2f}")
    print("correlation of sample − mean between horizontal neighbours: 1 smooth, 0 speckled\n")
    for expectation in result["missed"]:
        print(f"missed: {expectation}")
    print(f"numbers: {folder / 'comparison.json'}")
    print(f"figures: {folder / 'figures' / 'sheet.png'}, and in the same folder:")
    print("  " + ", ".join(Path(path).name for path in result["figures"]))
    return 0


def compare(
    config: Config, folder: str | Path, *, accept_data_changes: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains `config` in `folder/sos-vae`, then its β-VAE in `folder/beta-vae`, and writes `folder/figures`.

    One after the other: two at once on a few cores take many times as long. A run that is there already is
    gone on with where it stopped, and left alone where it is complete. Both hold out the same images.

    Returns: what `folder/comparison.json` holds: the numbers of both models, and the expectations they
        missed; only `unfinished`, and the model's name, where Ctrl-C came in between.

    Raises: as `train`.
    """
    from ..tools import figures

    folder = Path(folder)
    wanted = {"SOS-VAE": (config, Run(folder / "sos-vae")), "β-VAE": (beta_vae(config), Run(folder / "beta-vae"))}
    for settings, run in wanted.values():  # before hours are spent on the first
        if run.has_work():
            check_resumable(run, settings)
        else:
            run.check_free()
    runs: dict[str, Run] = {}
    split = None
    for name, (settings, run) in wanted.items():
        resume = run.has_work()
        runs[name] = train(
            settings,
            run.folder,
            resume=resume,
            accept_data_changes=accept_data_changes,
            split=None if resume else split,
            progress=progress,
        )
        split = run.split
        if run.steps()[-1] < settings.training.steps:
            return {"unfinished": name}
    images = runs["SOS-VAE"].images(config.data, accept_changes=accept_data_changes)
    if split is not None and (changes := data.compare(images.split, split)):
        warnings.warn(f"the β-VAE was trained on other images: {'; '.join(changes)}", stacklevel=2)
    models = {name: run.model() for name, run in runs.items()}
    qualities = {name: samples.quality(vae, images.deviation()) for name, vae in models.items()}
    predictions = {name: figures.predict(vae, 8) for name, vae in models.items()}
    written = figures.save_comparison(predictions, folder / "figures")
    held_out = images.first("validation", 8)
    written.append(figures.save_reconstructions(models, held_out, folder / "figures" / "reconstructions.png"))
    result = {
        "models": {name: quality._asdict() for name, quality in qualities.items()},
        "data_deviation": images.deviation(),
        "missed": missed(qualities["SOS-VAE"], qualities["β-VAE"]),
        "figures": [str(path.relative_to(folder)) for path in written],
        "torch": torch.__version__,
    }
    Run(folder).write_json("comparison.json", result)
    return result


def missed(sos: samples.Quality, beta: samples.Quality) -> list[str]:
    """Expectations that the numbers do not meet, in words; none where the comparison shows what it is for."""
    found = []
    if not sos.neighbour_correlation > SMOOTH:
        found.append(f"SOS-VAE: neighbour correlation {sos.neighbour_correlation:.3f}, expected above {SMOOTH}")
    if not abs(beta.neighbour_correlation) < SPECKLED:
        found.append(f"β-VAE: neighbour correlation {beta.neighbour_correlation:.3f}, expected below {SPECKLED}")
    for name, quality in (("SOS-VAE", sos), ("β-VAE", beta)):
        if not DEVIATION[0] <= quality.deviation <= DEVIATION[1]:
            found.append(f"{name}: deviation ratio {quality.deviation:.2f}, expected {DEVIATION[0]} to {DEVIATION[1]}")
    return found
