"""Figures: what a model predicts at codes from the prior, and how it reconstructs held-out images.

Pictures are in the layout of the paper's figure 2: mean, sample, difference, variance, and the positive and
negative covariance of every pixel with the central one. Nothing here needs a display, and nothing touches
pyplot's state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .. import devices, files
from ..models.observation import Temperature, own_variance, variance
from ..models.vae import VAE

__all__ = ["Prediction", "panels", "predict", "save_comparison", "save_images", "save_reconstructions"]


class Prediction(NamedTuple):
    """p(x|z) at codes from the prior, each [B, channels, H, W]."""

    mean: Tensor
    sample: Tensor
    common: Tensor  # the same sample at temperature (1, 0): what is global alone
    difference: Tensor  # sample − mean
    variance: Tensor
    covariance: Tensor  # of every pixel with the central one, within each channel's own plane
    how: str = "exact"  # the variance was come by, or an estimate from so many samples


TITLES = {
    "mean": "mean",
    "sample": "sample",
    "common": "the same sample,\nits global part alone",
    "difference": "sample − mean",
    "variance": "variance",
    "positive": "positive covariance to the central pixel",
    "negative": "negative covariance to the central pixel",
}


@torch.no_grad()
def predict(vae: VAE, count: int, seed: int = 0, temperature: Temperature = (1.0, 1.0)) -> Prediction:
    """Predictions at `count` codes z ~ N(0, I), one at a time. The generator of the caller is left as it was."""
    device = next(vae.parameters()).device
    with devices.seeded(device, seed):
        codes = torch.randn(count, vae.latents, device=device)
        parts = [_predicted(vae.eval(), z, temperature) for z in codes.split(1)]
    pictures = [torch.cat(column) for column in list(zip(*parts, strict=True))[:-1]]
    return Prediction._make([*pictures, parts[0].how])


def _predicted(vae: VAE, z: Tensor, temperature: Temperature) -> Prediction:
    p = vae.decode(z)
    seed = int(torch.randint(2**62, ()))
    with devices.seeded(z.device, seed):
        y = p.rsample(temperature=temperature)
    with devices.seeded(z.device, seed):
        common = p.rsample(temperature=(1.0, 0.0))
    channels, height, width = vae.image_shape
    centre = height // 2 * width + width // 2
    rows = [vae.unflatten(p.covariance_row(c * height * width + centre))[:, c] for c in range(channels)]
    covariance = torch.stack(rows, dim=1)
    # Σₙₙ of the central pixel itself holds d and would set the scale of the picture.
    covariance[..., height // 2, width // 2] -= vae.unflatten(own_variance(p))[..., height // 2, width // 2]
    spread, how = variance(p)
    flat = p.loc, y, common, y - p.loc, spread
    pictures = [*map(vae.unflatten, flat), covariance]
    return Prediction._make([*(picture.cpu() for picture in pictures), how])


@torch.no_grad()
def reconstruct(
    vae: VAE, x: Tensor, samples: int, seed: int = 0, temperature: Temperature = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Mean [B, channels, H, W] and samples [samples, B, channels, H, W] of p(x|z) at the mean code of images `x`, one
    image at a time."""
    device = next(vae.parameters()).device
    means, drawn = [], []
    with devices.seeded(device, seed):
        for image in x.split(1):
            p = vae.eval().decode(vae.encode(image.to(device)).loc)
            means.append(vae.unflatten(p.loc).cpu())
            drawn.append(vae.unflatten(p.rsample((samples,), temperature=temperature)).cpu())
    return torch.cat(means), torch.cat(drawn, 1)


def panels(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    """Strips of pictures for TensorBoard, [3, height, width] from 0 to 1, by name."""
    mean, samples = reconstruct(vae, x, 2)
    prior = predict(vae, len(x))
    spread = prior.variance.sqrt()
    white = spread.max().clamp_min(torch.finfo(spread.dtype).tiny)
    return {
        "reconstructions: data, mean, two samples": _strip([x, mean, *samples]),
        "prior: mean, sample, standard deviation": _strip([prior.mean, prior.sample, spread / white]),
    }


def save_comparison(predictions: Mapping[str, Prediction], folder: Path, table: Sequence[str] = ()) -> list[Path]:
    """One file for each kind of picture, a row per model, and `sheet.png` with everything.

    Args:
        predictions: by the name of the model, of the same number of codes.
        table: lines of text to stand under the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scales = _scales(predictions)
    paths = []
    for kind, title in _titles(predictions).items():
        count = len(next(iter(predictions.values())).mean)
        figure = _figure(len(predictions), count)
        for r, (name, prediction) in enumerate(predictions.items()):
            for i in range(count):
                axes = _axes(figure, len(predictions), count, r * count + i, label=name if i == 0 else None)
                _show(axes, kind, prediction, i, scales[kind][name])
        figure.suptitle(title)
        paths.append(_save(figure, folder / f"{kind}.png"))
    return [*paths, _save_sheet(predictions, scales, folder / "sheet.png", table)]


def save_reconstructions(
    models: Mapping[str, VAE], x: Tensor, path: Path, samples: int = 3, temperature: Temperature = (1.0, 1.0)
) -> Path:
    """Held-out images `x` [B, channels, H, W]; below each, per model, the mean and samples at its code."""
    rows: list[tuple[str, Tensor]] = [("data", x)]
    for name, vae in models.items():
        mean, drawn = reconstruct(vae, x, samples, temperature=temperature)
        rows += [(f"{name}\nmean", mean), *((f"{name}\nsample", y) for y in drawn)]
    return save_images(rows, path)


def save_images(rows: Sequence[tuple[str, Tensor]], path: Path) -> Path:
    """Rows of images [B, channels, H, W], intensities from 0 to 1, each with its label."""
    count = max(len(images) for _, images in rows)
    figure = _figure(len(rows), count)
    for r, (label, images) in enumerate(rows):
        for i, image in enumerate(images):
            axes = _axes(figure, len(rows), count, r * count + i, label=label if i == 0 else None)
            axes.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return _save(figure, path)


def _save_sheet(
    predictions: Mapping[str, Prediction], scales: dict[str, dict[str, float]], path: Path, table: Sequence[str]
) -> Path:
    """A column per kind of picture; for each model, a row per code."""
    shown = min(3, *(len(prediction.mean) for prediction in predictions.values()))
    figure = _figure(shown * len(predictions), len(TITLES))
    rows = [(name, i) for name in predictions for i in range(shown)]
    for r, (name, i) in enumerate(rows):
        for k, (kind, title) in enumerate(_titles(predictions).items()):
            label = name if k == 0 and i == 0 else None
            axes = _axes(figure, len(rows), len(TITLES), r * len(TITLES) + k, label=label)
            _show(axes, kind, predictions[name], i, scales[kind][name])
            if r == 0:
                axes.set_title(title.replace(" covariance to", "\ncovariance to\n"), fontsize=7)
    if table:
        figure.supxlabel("\n".join(table), x=0.01, ha="left", family="monospace", fontsize=5)
    return _save(figure, path)


def _titles(predictions: Mapping[str, Prediction]) -> dict[str, str]:
    estimates = sorted({p.how for p in predictions.values()} - {"exact"})
    return {**TITLES, "variance": " ".join([TITLES["variance"], *(f"({how})" for how in estimates)])}


def _show(axes: Axes, kind: str, prediction: Prediction, i: int, scale: float) -> None:
    if kind in ("mean", "sample", "common"):
        axes.imshow(_picture(getattr(prediction, kind)[i]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        return
    if kind == "positive":
        values = prediction.covariance[i].clamp_min(0)
    elif kind == "negative":
        values = (-prediction.covariance[i]).clamp_min(0)
    else:
        values = getattr(prediction, kind)[i]
    plane = values.mean(0).numpy()  # channels together: these pictures are about where, not about which colour
    if kind == "difference":
        axes.imshow(plane, cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
    else:
        axes.imshow(plane, cmap="magma", vmin=0, vmax=scale, interpolation="nearest")


def _scales(predictions: Mapping[str, Prediction]) -> dict[str, dict[str, float]]:
    """The end of the colour scale of each kind of picture, by kind and model.

    A difference is shown on one scale for all models, so that they can be compared; variances and covariances
    each on its own model's, since the point is where they are. The two signs of a covariance share theirs.
    """
    differences = torch.cat([p.difference.abs().mean(1).flatten() for p in predictions.values()])
    shared = _high(differences)
    scales: dict[str, dict[str, float]] = {kind: dict.fromkeys(predictions, shared) for kind in TITLES}
    for name, p in predictions.items():
        scales["variance"][name] = _high(p.variance.mean(1))
        scales["positive"][name] = scales["negative"][name] = _high(p.covariance.abs().mean(1))
    return scales


def _high(values: Tensor) -> float:
    """The largest but for one pixel in 200: a single one must not darken a whole picture."""
    ordered = values.flatten().sort().values
    return float(ordered[int(0.995 * (len(ordered) - 1))].clamp_min(1e-12))


def _figure(rows: int, columns: int) -> Figure:
    return Figure(figsize=(1.1 * columns + 0.6, 1.32 * rows + 0.4), dpi=150, layout="constrained")


def _axes(figure: Figure, rows: int, columns: int, index: int, label: str | None) -> Axes:
    axes = figure.add_subplot(rows, columns, index + 1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if label is not None:
        axes.set_ylabel(label, fontsize=8)
    return axes


def _save(figure: Figure, path: Path) -> Path:
    with files.atomic_writer(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    return path


def _picture(image: Tensor) -> np.ndarray:
    """[channels, H, W] as what imshow takes, intensities clipped to what can be shown."""
    image = image.clamp(0, 1)
    return (image[0] if len(image) == 1 else image.movedim(0, -1)).numpy()


def _strip(rows: Sequence[Tensor]) -> Tensor:
    """Batches [B, channels, H, W] below each other, the images of each side by side: [3, rows · H, B · W]."""
    grid = torch.cat([torch.cat(list(images), dim=-1) for images in rows], dim=-2).clamp(0, 1)
    return grid.expand(3, -1, -1)
