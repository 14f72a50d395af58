"""One normal over all images, without a network: by gradient, by EM and in closed form (paper, figure 7)."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from .. import data
from ..config import DataConfig, check_seed
from ..data.dataset import Dataset
from ..evaluation import normal
from ..evaluation.normal import Images, Normal
from ..training.run import Run
from .base import at_least, parse

USAGE = "DATA [options]"
SHOWN = 6  # components, and samples, of a row of the sheet


@dataclass(frozen=True)
class Options:
    """Fit μ, P and d of one normal N(μ, PPᵀ + D) to all training images, with one d and with one for each pixel.

    DATA is a source as --data.source of `sosvae train` (faces, digits, folder:PATH, celeba:PATH, brain:PATH), or a
    folder. Log-densities are of dequantised images; the last column is of test images. Writes numbers, the parameters
    and a sheet: for each fit its mean and principal components, at two standard deviations, and samples.
    """

    data: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)
    rank: int = 10
    """Columns R of P (count)."""
    floor: float = 1e-5
    """Least variance of a pixel (squared intensity)."""
    steps: int = 600
    """Of Adam, before L-BFGS (count)."""
    iterations: int = 2000
    """Of EM, at most (count)."""
    seed: int = 0
    """Of starts, order of images, noise of dequantisation and samples."""
    out: Path | None = None
    """Folder to write to; by default runs/normal-DATA (path)."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        at_least(1, rank=self.rank, steps=self.steps, iterations=self.iterations)
        check_seed(self.seed)
        if not 1e-12 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}, expected a variance from 1e-12 to 1")


def main(args: list[str]) -> int:
    source, args = _source(list(args))
    o = parse(Options, "fit-normal", args, Options(DataConfig(source=source)))
    images = data.load(o.data)
    folder = o.out or Path("runs") / f"normal-{o.data.source.partition(':')[0]}"
    result = fit_normal(images, o, folder)
    print(table(result))
    print(f"numbers: {folder / 'normal.json'}\nfigure: {folder / 'figures' / 'normal.png'}")
    return 0


def _source(args: list[str]) -> tuple[str, list[str]]:
    """What the arguments begin with, as a source, and the other ones."""
    if not args or args[0].startswith("-"):
        return DataConfig().source, args
    source, args = args[0], args[1:]
    known = source in ("faces", "digits") or ":" in source
    return (source if known or not Path(source).is_dir() else f"folder:{source}"), args


def fit_normal(images: Dataset, o: Options, folder: Path) -> dict[str, Any]:
    """Fits all of them; writes `normal.json`, `normal.safetensors` and the sheet into `folder`.

    Returns: what the JSON file holds.

    Raises:
        ValueError: the images are all the same, or too few for the rank.
    """
    train = Images(images.images, o.seed, images.train)
    normal.check_rank(o.rank, train)
    held_out = images.indices.get(data.split.TEST, np.empty(0, dtype=np.int64))
    test = None if len(held_out) < 2 else Images(images.images, o.seed + 1, held_out)
    fits: dict[str, Normal] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, reference: str | None, made: Callable[[], Normal]) -> None:
        start = time.perf_counter()
        fits[name] = found = made()
        log_prob = found.log_prob(train)
        rows[name] = {
            "log_prob": log_prob,
            "gap": None if reference is None else rows[reference]["log_prob"] - log_prob,
            "gap_to": reference,
            "test_log_prob": None if test is None else found.log_prob(test),
            "least_diagonal": float(found.diag.min()),
            "greatest_diagonal": float(found.diag.max()),
            "seconds": time.perf_counter() - start,
        }

    closed = "one d, closed form (PPCA)"
    add(closed, None, lambda: normal.in_closed_form(train, o.rank))
    for kind, per_pixel in (("one d", False), ("d per pixel", True)):
        em, gradient = f"{kind}, EM", f"{kind}, gradient"
        with _Bar(em, o.iterations, o.quiet) as told:
            fit = partial(normal.by_em, train, o.rank, per_pixel=per_pixel, floor=o.floor, seed=o.seed)
            add(em, None if per_pixel else closed, partial(fit, iterations=o.iterations, advanced=told))
        with _Bar(gradient, o.steps, o.quiet) as told:
            fit = partial(normal.by_gradient, train, o.rank, per_pixel=per_pixel, floor=o.floor, seed=o.seed)
            add(gradient, em if per_pixel else closed, partial(fit, steps=o.steps, advanced=told))
    add("PCA of scikit-learn", closed, lambda: normal.of_pca(train, o.rank))
    result = {
        "source": o.data.source,
        "image_shape": list(images.images.shape[1:]),
        "images": {"train": train.M, "test": 0 if test is None else test.M},
        "rank": o.rank,
        "floor": o.floor,
        "seed": o.seed,
        "fits": rows,
    }
    _write(folder, fits, result, images.images.shape[1:], o.seed)
    return result


class _Bar:
    """A progress bar that is told of each step, with the log-density so far."""

    def __init__(self, title: str, total: int, quiet: bool) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(total=total, desc=title, disable=quiet)

    def __call__(self, step: int, log_prob: float) -> None:
        self._bar.update()
        self._bar.set_postfix_str(f"log p {log_prob:.1f} nats", refresh=False)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _write(folder: Path, fits: dict[str, Normal], result: dict[str, Any], shape: tuple[int, ...], seed: int) -> None:
    from safetensors.torch import save

    from .. import files
    from ..tools import figures

    Run(folder).write_json("normal.json", result)
    parts = {f"{name}/{part}": t.contiguous() for name, fit in fits.items() for part, t in fit._asdict().items()}
    files.write_atomically(folder / "normal.safetensors", save(parts))
    rows, reference = [], None
    for name, fit in fits.items():
        label, found = name.replace(", ", "\n"), fit.components()
        reference = found if reference is None else reference
        found = found * torch.where((found * reference).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        shifted = fit.loc + 2 * found[: SHOWN - 1]
        rows.append((f"{label}\ncomponents", torch.cat([fit.loc[None], shifted]).float().unflatten(-1, shape)))
        noise = np.random.default_rng(seed)  # the same for all, in principal components: their samples compare
        omega_p, omega_d = (torch.from_numpy(noise.standard_normal((SHOWN, n))) for n in reversed(fit.factor.shape))
        y = fit.loc + omega_p @ found + fit.diag.sqrt() * omega_d
        rows.append((f"{label}\nsamples", y.float().unflatten(-1, shape)))
    figures.save_images(rows, folder / "figures" / "normal.png")


def table(result: dict[str, Any]) -> str:
    """For people."""
    channels, height, width = result["image_shape"]
    lines = [
        f"{result['source']}: {result['images']['train']} training images of {height}×{width}×{channels}, "
        f"{result['images']['test']} test images, rank {result['rank']}, d ≥ {result['floor']:g}; nats for each image",
        "",
        f"{'':<28}{'log p':>12}{'gap':>10}  {'to':<28}{'test log p':>12}{'d':>22}{'seconds':>9}",
    ]
    for name, row in result["fits"].items():
        gap = "–" if row["gap"] is None else f"{row['gap']:.2f}"
        test = "–" if row["test_log_prob"] is None else f"{row['test_log_prob']:.1f}"
        low, high = row["least_diagonal"], row["greatest_diagonal"]
        d = f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"
        lines.append(
            f"{name:<28}{row['log_prob']:>12.2f}{gap:>10}  {row['gap_to'] or '':<28}{test:>12}{d:>22}"
            f"{row['seconds']:>9.1f}"
        )
    lines += [
        "",
        "PCA of scikit-learn takes for d the rest of the variance over min(images, values) − R directions, and the "
        "closed form over values − R.",
    ]
    return "\n".join(line.rstrip() for line in lines)
