"""How good runs are: bits per dimension, calibration, speckle, and distances of samples from real images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .. import devices
from ..config import check_seed
from ..evaluation import evaluate, features, report, subject
from ..evaluation.ledger import Advanced
from .base import at_least, parse

USAGE = "RUN [RUN ...] [options]"


@dataclass(frozen=True)
class Options:
    """Measure runs on test images: bits per dimension, calibration, speckle, and distances of means and samples.

    Writes JSON, CSV, a Markdown table, and a picture of the distance against the temperatures. Stopped, the same
    command goes on where it was. `docs/evaluation.md` says what each number means.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Folders of runs (path)."""
    out: Path | None = None
    """Folder to write to; by default evaluation/ in the run, or beside the first of several (path)."""
    features: str = "efficientnet-lite0"
    """Network in whose features images are compared: efficientnet-lite0, inception (for FID), pixels, or none."""
    weights: Path | None = None
    """File of Inception's weights, pt_inception-2015-12-05 (path)."""
    images: int | None = None
    """Test images, and generated ones; by default all of the test part (count)."""
    codes: int = 64
    """Codes of the importance-weighted bound (count)."""
    samples: int = 8
    """Samples of each image, for energy score and speckle (count)."""
    repeats: int = 3
    """Of distances, for their spread (count)."""
    temperatures_global: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """t_P of the curves, tried on selection images; none: no curves (factor)."""
    temperatures_local: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """t_L of the curves (factor)."""
    least_global: float = 0.5
    """Least t_P of the temperatures that are reported as selected, beside the best of all (factor)."""
    no_baselines: bool = False
    """Leave out the rows of one σ and of the pixel-wise head refitted."""
    refit_steps: int = 800
    """Of the pixel-wise head that is refitted on each network's features (count)."""
    rank: int | None = None
    """Of the rows PCA, PPCA and factor analysis; by default there are none (count)."""
    step: int | None = None
    """Of the checkpoint; by default the newest whole one (steps)."""
    source: str | None = None
    """Where the runs' images are, if they have moved, like --data.source of `sosvae train`."""
    accept_data_changes: bool = False
    """Go on, although images have come, gone or changed since a run was trained."""
    seed: int = 0
    """Of all noise."""
    batch: int = 32
    """Images that go through the feature network at once: the same numbers, another amount of memory (count)."""
    device: str = "cpu"
    """`auto` (a GPU where there is one), or any name that torch knows."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        at_least(1, codes=self.codes, repeats=self.repeats, refit_steps=self.refit_steps, batch=self.batch)
        at_least(2, samples=self.samples)
        if self.images is not None:
            at_least(2, images=self.images)
        if self.rank is not None:
            at_least(1, rank=self.rank)
        for name in ("temperatures_global", "temperatures_local"):
            if any(not 0 <= t < float("inf") for t in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected numbers of at least 0, finite")
        check_seed(self.seed)


def main(args: list[str]) -> int:
    o = parse(Options, "evaluate", args)
    device = devices.find(o.device)
    network = None if o.features == "none" else features.find(o.features, o.weights, device)
    found = [
        subject.opened(run, step=o.step, source=o.source, accept_changes=o.accept_data_changes, device=device)
        for run in o.runs
    ]
    folder = o.out or (o.runs[0] if len(o.runs) == 1 else o.runs[0].resolve().parent) / "evaluation"
    plan = evaluate.Plan(
        network,
        count=o.images,
        codes=o.codes,
        samples=o.samples,
        repeats=o.repeats,
        grid=tuple((t_P, t_L) for t_P in o.temperatures_global for t_L in o.temperatures_local),
        least_global=o.least_global,
        baselines=not o.no_baselines,
        refit_steps=o.refit_steps,
        rank=o.rank,
        seed=o.seed,
        batch=o.batch,
    )

    result = evaluate.evaluate(subject.named(found), plan, folder, progress_bars(o.quiet))
    written = report.write(folder, result)
    print(report.markdown(result))
    print("\n".join(map(str, written)))
    return 0


def progress_bars(quiet: bool) -> evaluate.Bars:
    """A bar for each piece of work, gone when it is done."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Advanced]:
        with tqdm(total=total, desc=title, disable=quiet, leave=False) as shown:
            yield shown.update

    return bar
