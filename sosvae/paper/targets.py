"""What each of the paper's figures shows here, and what its table says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..training.run import Run

__all__ = ["FIGURES", "PUBLISHED", "Figure"]

# Published FID (Inception features), means and samples.
PUBLISHED = {
    "celeba": {"beta-vae": (121.65, 196.40), "sos-vae": (132.93, 104.62)},
    "brain": {"beta-vae": (211.24, 332.89), "sos-vae": (141.87, 79.71)},
    "celeba-64-grey": {"beta-vae": (90.97, 257.11), "precision-5": (73.44, 77.72), "sos-vae": (70.43, 74.66)},
}

FACTORS = torch.linspace(-5, 5, 11)

Draw = Callable[[Sequence[Run], Path, int], list[Path]]


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        data: of the runs.
        runs: that it needs.
        draw: makes it from the runs, into a folder, with a seed.
        shows: what is in it.
    """

    data: str
    runs: tuple[str, ...]
    draw: Draw
    shows: str


@torch.no_grad()
def _samples(runs: Sequence[Run], folder: Path, seed: int) -> list[Path]:
    """Means and samples of each run, at the same codes."""
    from ..tools import figures

    rows: list[tuple[str, Tensor]] = []
    for run in runs:
        vae = run.model()
        torch.manual_seed(seed)
        p = vae.decode(torch.randn(8, vae.latents))
        rows.append((f"{run.folder.name}\nmean", vae.unflatten(p.loc)))
        rows += [(f"{run.folder.name}\nsample", vae.unflatten(p.rsample())) for _ in range(2)]
    return [figures.save_images(rows, folder / "samples.png")]


def _comparison(runs: Sequence[Run], folder: Path, seed: int) -> list[Path]:
    from ..tools import figures

    predictions = {run.folder.name: figures.predict(run.model(), 8, seed) for run in runs}
    return figures.save_comparison(predictions, folder)


@torch.no_grad()
def _grid(runs: Sequence[Run], folder: Path, seed: int) -> list[Path]:
    from ..tools import figures, sheets

    vae = runs[0].model()
    torch.manual_seed(seed)
    p, corners, omega_d = sheets.drawn(vae.decode(torch.randn(1, vae.latents)), 4, str(runs[0].folder))
    images = vae.unflatten(sheets.grid(p, corners, omega_d, 7))
    return [figures.save_images([("", row) for row in images.split(7)], folder / "interpolation.png")]


def _components(code: int) -> Draw:
    @torch.no_grad()
    def draw(runs: Sequence[Run], folder: Path, seed: int) -> list[Path]:
        from ..tools import figures, sheets

        vae = runs[0].model()
        torch.manual_seed(seed + code)
        p, omega_p, omega_d = sheets.drawn(vae.decode(torch.randn(1, vae.latents)), 1, str(runs[0].folder))
        images = sheets.components(p, omega_p[0], omega_d, FACTORS, min(5, p.rank()))
        rows = [(f"component {k + 1}", row) for k, row in enumerate(vae.unflatten(images))]
        return [figures.save_images(rows, folder / "components.png")]

    return draw


def _edits(name: str) -> Draw:
    @torch.no_grad()
    def draw(runs: Sequence[Run], folder: Path, seed: int) -> list[Path]:
        """Of samples from the prior, never of the data's own images: these are not ours to show."""
        from ..tools import figures, sheets, strokes

        vae = runs[0].model()
        torch.manual_seed(seed)
        rows = []
        for code in range(3):
            p = vae.decode(torch.randn(1, vae.latents))
            before = vae.unflatten(p.rsample())[0]
            painted, mask = strokes.paint(
                before, strokes.read(Path(__file__).parent / "edits" / f"{name}.json", vae.image_shape[1:])
            )
            mean, drawn = sheets.edit(p, painted, mask, 4)
            after = vae.unflatten(torch.cat([mean[None], drawn]))
            rows.append((f"code {code + 1}", torch.cat([before[None], painted[None], after])))
        return [figures.save_images(rows, folder / "edits.png")]

    return draw


SOS = ("sos-vae",)
BOTH = ("beta-vae", "sos-vae")
ABLATION = ("sos-vae", "without-entropy-constraint", "without-mean-phase")

FIGURES = {
    "fig1": Figure("celeba", BOTH, _samples, "means and samples at the same codes"),
    "fig2": Figure("celeba", BOTH, _comparison, "mean, sample, difference, variance, covariance to the central pixel"),
    "fig3": Figure("brain", BOTH, _comparison, "the same for brain slices"),
    "fig4": Figure("celeba", SOS, _grid, "a grid between four samples of one prediction"),
    "fig5": Figure("celeba", SOS, _components(0), "components scaled by −5 … 5"),
    "fig6": Figure("celeba", SOS, _edits("fig6"), "an edit, and what follows from it"),
    "fig8": Figure("celeba-64-grey", ABLATION, _comparison, "the recipe without one of its parts"),
    "fig9": Figure("celeba", SOS, _components(1), "components at another code"),
    "fig10": Figure("brain", SOS, _components(0), "components of a brain slice"),
    "fig11": Figure("celeba", SOS, _edits("fig11"), "edits of hair and background"),
    "fig12": Figure("celeba", SOS, _edits("fig12"), "edits of eyes"),
    "fig13": Figure("brain", SOS, _edits("fig13"), "edits of the ventricles"),
    "fig14": Figure("brain", SOS, _edits("fig14"), "edits of the cortex"),
}
"""All but figure 7, which is `sosvae fit-normal`: one normal over the images, without a network."""
