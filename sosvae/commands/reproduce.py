"""The paper's table and figures, made again from data at a given path."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .. import data, devices, files
from ..config import DataConfig, check_seed
from ..data.split import TEST
from ..evaluation import evaluate, features, report, subject
from ..paper import plans, runs, targets
from ..training.run import Run
from . import fit_normal
from .base import at_least, parse
from .evaluate import progress_bars

USAGE = "table1|fig1|…|fig14|all [--scale paper|small] [options]"
TARGETS = ("table1", *(f"fig{i}" for i in range(1, 15)))
TABLE: dict[str, dict[str, tuple[str, ...]]] = {  # the data sets of the table at each scale, and their rows
    "paper": {
        "celeba": ("beta-vae", "sos-vae"),
        "brain": ("beta-vae", "sos-vae"),
        "celeba-64-grey": ("beta-vae", "precision-5", "sos-vae"),
    },
    "small": {
        "celeba": ("beta-vae", "sos-vae", "precision-3", "precision-5", "global-local"),
        "brain": ("beta-vae", "sos-vae", "precision-3", "precision-5", "global-local"),
    },
}


@dataclass(frozen=True)
class Options:
    """Make table 1, or a figure, of the paper, training what is missing first.

    The same command goes on where it was stopped, and does nothing twice. At the scale `small` images are 64×64 and
    grey and the network has a quarter of the width: hours on two cores. `docs/paper.md` shows what comes out beside
    what was published.
    """

    targets: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TARGET [TARGET ...]")]]
    """table1, fig1 to fig14, or all."""
    scale: Literal["paper", "small"] = "small"
    """The paper's settings, or those that two cores manage."""
    celeba: Path | None = None
    """Folder of CelebA: the official layout, or aligned images alone (path)."""
    brain: Path | None = None
    """Folder of brain slices, PERSON_SLICE.jpg (path)."""
    out: Path = Path("runs/paper")
    """Folder for runs, table and figures; the scale is a folder in it (path)."""
    features: str = ""
    """Of the table: by default inception at the paper's scale, efficientnet-lite0 at the small one."""
    weights: Path | None = None
    """File of Inception's weights (path)."""
    images: int | None = None
    """Of the table: test images, and as many generated ones; by default all (count)."""
    repeats: int = 3
    """Of distances (count)."""
    codes: int = 64
    """Of the table: codes of the importance-weighted bound (count)."""
    refit_steps: int = 1500
    """Of the table: of the pixel-wise heads that are refitted, as many as structured heads have (count)."""
    rank: int = 25
    """Of the one normal of figure 7 (count)."""
    seed: int = 0
    """Of all that is drawn here; runs have their own."""
    device: str = "cpu"
    """For the table; runs train where their configuration says."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f"no target was given, expected some of {', '.join(TARGETS)}, or all")
        unknown = [name for name in self.targets if name not in (*TARGETS, "all")]
        if unknown:
            raise ValueError(f"unknown target {', '.join(unknown)}, expected {', '.join(TARGETS)}, or all")
        at_least(1, repeats=self.repeats, rank=self.rank, codes=self.codes, refit_steps=self.refit_steps)
        check_seed(self.seed)

    @property
    def wanted(self) -> tuple[str, ...]:
        return TARGETS if "all" in self.targets else tuple(dict.fromkeys(self.targets))

    def path(self, name: str) -> Path:
        """Of a data set.

        Raises:
            ValueError: it was not given. FileNotFoundError: it is no folder.
        """
        option = "brain" if name == "brain" else "celeba"
        path: Path | None = getattr(self, option)
        if path is None:
            raise ValueError(f"--{option} is not given, expected the folder with its images: they cannot be shipped")
        if not path.is_dir():
            raise FileNotFoundError(f"--{option} is {path}, which is not a folder")
        return path


def main(args: list[str]) -> int:
    o = parse(Options, "reproduce", args)
    for name in _data_of(o):  # before hours are spent on what comes first
        o.path(name)
    chosen = o.features or ("inception" if o.scale == "paper" else "efficientnet-lite0")
    network = features.find(chosen, o.weights, devices.find(o.device)) if "table1" in o.wanted else None
    for target in o.wanted:
        start = time.monotonic()
        folder = o.out / o.scale / target
        if target == "fig7":
            written: list[Path] | None = _normal(o, folder)
        elif target == "table1":
            assert network is not None
            written = _table(o, network, folder)
        else:
            written = _figure(o, targets.FIGURES[target], folder)
        if written is None:
            print("stopped; the same command goes on from there")
            return 130  # as a shell counts Ctrl-C
        print(f"{target} ({time.monotonic() - start:.0f} s): " + ", ".join(map(str, written)))
    return 0


def _data_of(o: Options) -> list[str]:
    """The data sets that the targets need."""
    found: list[str] = []
    for target in o.wanted:
        if target == "table1":
            found += TABLE[o.scale]
        else:
            found.append("celeba" if target == "fig7" else targets.FIGURES[target].data)
    return list(dict.fromkeys(found))


def _trained(o: Options, name: str, wanted: Sequence[str]) -> list[Run] | None:
    """Runs of a data set, which at the small scale is 64×64 and grey in any case."""
    name = "celeba" if o.scale == "small" and name == "celeba-64-grey" else name
    made = plans.plans(o.scale, name, o.path(name))
    return runs.trained(made, wanted, o.out / o.scale / name, progress=not o.quiet)


def _figure(o: Options, figure: targets.Figure, folder: Path) -> list[Path] | None:
    found = _trained(o, figure.data, figure.runs)
    if found is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return figure.draw(found, folder, o.seed)


def _normal(o: Options, folder: Path) -> list[Path]:
    """Figure 7. Its split is that of the runs."""
    plan = plans.plans(o.scale, "celeba", o.path("celeba"))[0]
    config: DataConfig = plan.config.data
    images = data.load(config, split=plans.last_by_name(config))
    settings = fit_normal.Options(config, rank=o.rank, seed=o.seed, quiet=o.quiet)
    text = fit_normal.table(fit_normal.fit_normal(images, settings, folder))
    files.write_atomically(folder / "normal.txt", text.encode() + b"\n")
    return [folder / "figures" / "normal.png", folder / "normal.txt"]


def _table(o: Options, network: features.Features, folder: Path) -> list[Path] | None:
    """Table 1, and with it all that `sosvae evaluate` measures, for each data set."""
    bars = progress_bars(o.quiet)
    lines, written = [], []
    for name, rows in TABLE[o.scale].items():
        found = _trained(o, name, rows)
        if found is None:
            return None
        device = devices.find(o.device)
        subjects = [subject.opened(run.folder, step=runs.best_step(run), device=device) for run in found]
        grid = tuple((t_P, t_L) for t_P in (0.0, 0.25, 0.5, 0.75, 1.0) for t_L in (0.0, 0.25, 0.5, 1.0))
        plan = evaluate.Plan(
            network,
            count=o.images,
            codes=o.codes,
            repeats=o.repeats,
            grid=grid,
            rank=o.rank,
            seed=o.seed,
            refit_steps=o.refit_steps,
        )
        result = evaluate.evaluate(subject.named(subjects), plan, folder / name, bars)
        written += report.write(folder / name, result)
        lines += _beside(name, o.scale, result, subjects[0])
    path = folder / "table1.md"
    files.write_atomically(path, "\n".join(lines).encode())
    return [path, *written]


def _beside(name: str, scale: str, result: dict[str, Any], first: subject.Subject) -> list[str]:
    """Distances of means and samples beside what was published."""
    called = result["samples"][0]["called"]
    published = targets.PUBLISHED["celeba-64-grey" if scale == "small" and name == "celeba" else name]
    count = len(first.indices(TEST))
    lines = [
        f"## {name}, {'×'.join(map(str, first.vae.image_shape[1:]))}, {count} test images",
        "",
        f"| run | {called} of means | of samples at (1, 1) | at those selected | published FID: means, samples |",
        "|---|---|---|---|---|",
    ]
    for run in dict.fromkeys(row["run"] for row in result["samples"]):
        rows = [row for row in result["samples"] if row["run"] == run]

        def cell(label: str, rows: list[dict[str, Any]] = rows) -> str:
            row = next((row for row in rows if label in row["row"]), None)
            if row is None:
                return "–"
            return f"{row['distance']:.2f} ± {row['distance_spread'] or 0:.2f} ({row['t_P']:g}, {row['t_L']:g})"

        of_paper = published.get(run.rpartition("/")[2])
        shown = "–" if of_paper is None else f"{of_paper[0]}, {of_paper[1]}"
        lines.append(f"| {run} | {cell('means')} | {cell('samples')} | {cell('best with')} | {shown} |")
    if called != "FID":
        lines += ["", "Distances in other features than Inception's are not FID and do not compare with it."]
    return [*lines, ""]
