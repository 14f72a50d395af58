"""Runs evaluated: rows of likelihood and calibration, rows of distances, and the distance against the temperatures.

Everything is chosen on selection images (the part `validation`) and reported on test images. Work is kept image by
image in a ledger, so that the same call goes on where it was stopped.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.cache import cache_folder
from ..data.split import TEST
from ..models.observation import Observation, Temperature, variance
from . import baselines, bits, distance, measure, normal
from .baselines import OneSigma
from .bits import Model
from .features import ROUNDING, Features
from .generated import Generator, has_global, of_data
from .ledger import Advanced, Ledger
from .moments import Moments
from .subject import Subject

__all__ = ["Plan", "evaluate"]

SELECTION = "validation"
FITTED = 256  # selection images that one σ is fitted to, at most

# A bar over so many images, as a context that is told how many are done.
Bars = Callable[[str, int], AbstractContextManager[Advanced]]
Fit = Callable[[normal.Images, int], normal.Normal]


@dataclass(frozen=True)
class Plan:
    """What is measured, and with how much noise.

    Attributes:
        network: in whose features images are compared; none: no distances.
        count: test images, and as many generated ones; none: all.
        codes: of the importance-weighted bound.
        samples: of p(x|z), for the energy score and for speckle.
        repeats: of distances, each with a seed of its own.
        grid: temperatures (t_P, t_L) that are compared on selection images.
        least_global: of the temperatures among which the best is reported as "selected", beside the best of all.
        baselines: rows of one σ and of the pixel-wise head refitted.
        refit_steps: of that head.
        rank: of PCA, PPCA and factor analysis; none: no such rows.
        seed: of all noise.
        batch: images that go through the feature network at once.
    """

    network: Features | None
    count: int | None = None
    codes: int = 64
    samples: int = 8
    repeats: int = 3
    grid: tuple[Temperature, ...] = ()
    least_global: float = 0.5
    baselines: bool = True
    refit_steps: int = 800
    rank: int | None = None
    seed: int = 0
    batch: int = 32


def evaluate(subjects: Sequence[Subject], plan: Plan, folder: Path, bars: Bars) -> dict[str, Any]:
    """All rows. What is kept lies in `folder/work`, and beside the data's cache what is of the data alone.

    Raises:
        ValueError: fewer images than a measure needs.
    """
    for subject in subjects:  # before hours are spent on the first
        _check(subject, plan)
    ledger = Ledger(folder / "work")
    likelihood: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[str, str]] = set()
    for subject in subjects:
        likelihood.append(_likelihood(subject, plan, ledger, bars, subject.head, "", subject.vae))
        network = subject.network, subject.digest(TEST, plan.count)
        if plan.baselines and network not in seen:
            likelihood += _baselines(subject, plan, ledger, bars)
        seen.add(network)
    likelihood += _of_data(subjects, plan, ledger, bars)
    if plan.network is not None:
        for subject in subjects:
            rows, curve = _Distances(subject, plan, plan.network, ledger, bars).rows()
            samples += rows
            curves[subject.name] = curve
    return {"likelihood": likelihood, "samples": samples, "curves": curves, "torch": torch.__version__}


def _check(subject: Subject, plan: Plan) -> None:
    """Raises: ValueError: fewer images than a measure needs; it says which, and how many."""
    least = 2 if plan.network is None else 4
    for part, count in ((TEST, plan.count), (SELECTION, None)):
        found = len(subject.indices(part, count))
        if found < least:
            why = "a standard error" if plan.network is None else "distances of two halves"
            raise ValueError(f"{subject.name} has {found} {part} images, expected at least {least}, for {why}")
    if plan.rank is not None:
        train = len(subject.images.train)
        if plan.rank > min(train, subject.config.pixels) - 2:
            raise ValueError(f"rank is {plan.rank}, expected at most {train - 2} for {train} training images")


# --- Likelihood and calibration -----------------------------------------------------------------------------------


def _baselines(subject: Subject, plan: Plan, ledger: Ledger, bars: Bars) -> Iterator[dict[str, Any]]:
    """One σ on a network's means, and the pixel-wise head refitted on its features."""
    device = next(subject.vae.parameters()).device
    few = min(FITTED, len(subject.indices(SELECTION)))
    chosen = bits.dequantised(subject.images.images[subject.indices(SELECTION, few)], plan.seed).to(device)
    with bars(f"{subject.name}: one σ", len(chosen)) as advanced:
        row: OneSigma = baselines.one_sigma(subject.vae, chosen, subject.counted, advanced)
    yield _likelihood(subject, plan, ledger, bars, "one σ for all pixels", f"σ² {row.variance:.9g}", row)
    with bars(f"{subject.name}: pixel-wise head refitted", plan.refit_steps) as advanced:

        def refitted() -> Model:
            batch = min(32, len(subject.images.train))
            how = {"steps": plan.refit_steps, "batch": batch, "seed": plan.seed}
            told = lambda step: advanced(1)  # noqa: E731
            return baselines.refitted(subject.vae, subject.config, subject.images, advanced=told, **how)

        later = _Later(subject.vae.image_shape, subject.vae.latents, refitted)
        key = f"{plan.refit_steps} steps, {plan.seed}"
        yield _likelihood(subject, plan, ledger, bars, "pixel-wise head refitted", key, later)


class _Later:
    """A model that is fitted when it is first needed: where the ledger has its numbers, it never is."""

    def __init__(self, image_shape: tuple[int, int, int], latents: int, make: Callable[[], Model]) -> None:
        self.image_shape, self.latents = image_shape, latents
        self._make = make

    @cached_property
    def _model(self) -> Model:
        return self._make()

    def encode(self, x: Tensor) -> torch.distributions.Normal:
        return self._model.encode(x)

    def decode(self, z: Tensor) -> Observation:
        return self._model.decode(z)


def _likelihood(
    subject: Subject, plan: Plan, ledger: Ledger, bars: Bars, name: str, key: str, model: Model
) -> dict[str, Any]:
    """One row: test images through `measure`, chunk by chunk."""
    device = next(subject.vae.parameters()).device
    indices = subject.indices(TEST, plan.count)
    settings = measure.Settings(plan.codes, plan.samples, plan.seed)
    how = variance(model.decode(torch.zeros(1, model.latents, device=device)))[1] if not key else "exact"

    def make(start: int, stop: int) -> dict[str, Any]:
        images = subject.images.images[indices[start:stop]]
        parts = [
            measure.of_block(model, images[b], start + b.start, settings, subject.counted, device)
            for b in measure.blocks(len(images))
        ]
        return {each: np.concatenate([part[each].numpy() for part in parts]) for each in parts[0]}

    what = {
        "model": subject.weights,
        "row": key,
        "images": subject.digest(TEST, plan.count),
        "settings": list(settings),
        "counted": None if subject.counted is None else int(subject.counted.sum()),
    }
    with bars(f"{subject.name}: {name}, likelihood", len(indices)) as advanced:
        values = ledger.done(what, len(indices), make, advanced)
    N = math.prod(model.image_shape) if subject.counted is None else int(subject.counted.sum())
    found = measure.summary({each: torch.from_numpy(value) for each, value in values.items()}, N)
    return {
        "run": subject.name,
        "row": name,
        "step": subject.step,
        "weights": subject.weights,
        "codes": plan.codes,
        "samples": plan.samples,
        "seed": plan.seed,
        "variance": how,
        "pixels_left_out": math.prod(model.image_shape) - N,
        "data": subject.digest(TEST, plan.count),
        **found,
    }


def _of_data(subjects: Sequence[Subject], plan: Plan, ledger: Ledger, bars: Bars) -> Iterator[dict[str, Any]]:
    """Rows that need no network, once for each set of test images: uniform, and one normal over all."""
    seen = set()
    for subject in subjects:
        digest = subject.digest(TEST, plan.count)
        if digest in seen:
            continue
        seen.add(digest)
        count = len(subject.indices(TEST, plan.count))
        yield {"run": "", "row": "uniform", "data": digest, "images": count, "bits": bits.UNIFORM}
        if plan.rank is None:
            continue
        for name, fit in (
            ("PCA", normal.of_pca),
            ("PPCA, closed form", normal.in_closed_form),
            ("factor analysis, EM", lambda images, rank: normal.by_em(images, rank, per_pixel=True)),
        ):
            shape, device = subject.vae.image_shape, next(subject.vae.parameters()).device

            def constant(fit: Fit = fit, subject: Subject = subject) -> Model:
                images = normal.Images(subject.images.images, plan.seed, subject.images.train)
                return normal.Constant(fit(images, plan.rank or 1), shape, device)  # noqa: B023

            title, later = f"{name}, rank {plan.rank}", _Later(shape, normal.Constant.latents, constant)
            row = _likelihood(subject, plan, ledger, bars, title, f"{title}, {plan.seed}", later)
            yield row | {"run": "", "step": None, "weights": ""}


# --- Distances ----------------------------------------------------------------------------------------------------


class _Distances:
    """Distances of one run's means and samples from real images."""

    def __init__(self, subject: Subject, plan: Plan, network: Features, ledger: Ledger, bars: Bars) -> None:
        self._subject, self._plan, self._network, self._bars = subject, plan, network, bars
        self._generator = Generator(subject.vae, subject.weights, ledger, network, plan.batch)
        self._cache = cache_folder(subject.config.data) / "features"
        self._global = has_global(subject.vae, network.device)

    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows on test images, and the curve on selection images."""
        real = self._real(TEST, self._plan.count)
        floor = self._floor(real)
        curve = self._curve()
        best = min(curve, key=lambda point: point["distance"], default=None)
        allowed = [point for point in curve if point["t_P"] >= self._plan.least_global]
        selected = min(allowed, key=lambda point: point["distance"], default=None)
        settings: dict[Temperature, list[str]] = {(0.0, 0.0): ["means"], (1.0, 1.0): ["samples"]}
        for label, point in (("best temperatures", best), (f"best with t_P ≥ {self._plan.least_global:g}", selected)):
            if point is not None:
                # Without a global part (1, 0) is the mean too.
                is_mean = not self._global and point["t_L"] == 0
                settings.setdefault((0.0, 0.0) if is_mean else (point["t_P"], point["t_L"]), []).append(label)
        rows = [self._row(", ".join(labels), t, real, floor) for t, labels in settings.items()]
        return [*rows, self._train(real, floor)], curve

    def _curve(self) -> list[dict[str, Any]]:
        """Distance from selection images at each pair of temperatures, with one seed."""
        grid = self._plan.grid
        if not self._global:
            grid = tuple(dict.fromkeys((1.0, t_L) for _, t_L in grid))  # t_P changes nothing
        if not grid:
            return []
        real = self._real(SELECTION, None)
        reference = distance.Reference(Moments.of(real))
        points = []
        for t_P, t_L in grid:
            made = self._made((t_P, t_L), len(real), self._plan.seed)
            found = {"distance": reference.frechet(Moments.of(made)), "kernel": distance.kernel(real, made)}
            points.append({"t_P": t_P, "t_L": t_L, "images": len(real), **found})
        return points

    def _row(self, name: str, temperature: Temperature, real: Tensor, floor: dict[str, Any]) -> dict[str, Any]:
        reference = distance.Reference(Moments.of(real))
        found, kernels = [], []
        for repeat in range(self._plan.repeats):
            made = self._made(temperature, len(real), self._plan.seed + 1 + repeat)
            found.append(reference.frechet(Moments.of(made)))
            kernels.append(distance.kernel(real, made))
        return self._described(name, len(real), len(real), found, kernels, floor) | {
            "t_P": temperature[0],
            "t_L": temperature[1],
            "seed": self._plan.seed + 1,
        }

    def _train(self, real: Tensor, floor: dict[str, Any]) -> dict[str, Any]:
        """As many training images in place of generated ones: what a perfect model would come to, at equal counts."""
        count = min(len(real), len(self._subject.images.train))
        train = self._real("train", count)
        found = distance.frechet(Moments.of(real), Moments.of(train))
        row = self._described("training images", len(real), count, [found], [distance.kernel(real, train)], floor)
        return row | {"t_P": None, "t_L": None, "seed": None, "repeats": 1}

    def _floor(self, real: Tensor) -> dict[str, Any]:
        """Two random halves of the real images."""
        found, kernels = [], []
        for repeat in range(self._plan.repeats):
            order = torch.from_numpy(np.random.default_rng((self._plan.seed, repeat, 5)).permutation(len(real)))
            a, b = real[order].split(-(-len(real) // 2))
            found.append(distance.frechet(Moments.of(a), Moments.of(b)))
            kernels.append(distance.kernel(a, b))
        images = f"{-(-len(real) // 2)}, {len(real) // 2}"
        return {"floor": _mean(found), "floor_kernel": _mean(kernels), "floor_images": images}

    def _described(
        self, name: str, real: int, made: int, found: list[float], kernels: list[float], floor: dict[str, Any]
    ) -> dict[str, Any]:
        network = self._network
        notes = []
        if min(real, made) <= network.size:
            notes.append(f"fewer images than the {network.size} features: compare at equal counts alone")
        return {
            "run": self._subject.name,
            "row": name,
            "step": self._subject.step,
            "weights": self._subject.weights,
            "data": self._subject.digest(TEST, self._plan.count),
            "features": network.name,
            "feature_weights": network.weights,
            "resize": network.resize,
            "rounding": ROUNDING,
            "real_images": real,
            "generated_images": made,
            "called": network.distance,
            "distance": _mean(found),
            "distance_spread": _spread(found),
            "kernel": _mean(kernels),
            "kernel_spread": _spread(kernels),
            "repeats": self._plan.repeats,
            **floor,
            "notes": "; ".join(notes),
        }

    def _made(self, temperature: Temperature, count: int, seed: int) -> Tensor:
        t_P, t_L = temperature
        with self._bars(f"{self._subject.name}: ({t_P:g}, {t_L:g}), seed {seed}", count) as advanced:
            return self._generator.features(temperature, count, seed, advanced)

    def _real(self, part: str, count: int | None) -> Tensor:
        subject = self._subject
        indices = subject.indices(part, count)
        with self._bars(f"{part} images", len(indices)) as advanced:
            return of_data(
                self._cache,
                subject.digest(part, count),
                lambda start, stop: subject.images.images[indices[start:stop]],
                len(indices),
                self._network,
                advanced,
                self._plan.batch,
            )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(values: list[float]) -> float | None:
    """Standard deviation over repeats."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
