"""Which runs the paper's table and figures need, at its own scale and at one that two cores manage.

At the small scale images are 64×64 and grey, and the network has a quarter of the features. One β-VAE is trained until
selection images say that it has converged; on its features, frozen, heads are fitted. The paper's recipe is trained
whole, for a fixed number of steps: its likelihood falls while it trains (docs/paper.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import data
from ..config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from ..data.split import TEST, Split
from ..presets import PRESETS, beta_vae
from ..training.head import of_run

__all__ = ["DATA", "SCALES", "Plan", "last_by_name", "plans"]

SCALES = ("paper", "small")
DATA = ("celeba", "brain", "celeba-64-grey")

HELD_OUT = 1500  # images, the last by name for the test and as many before them for selection, of a folder of CelebA


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        name: of its folder.
        config: of the run; where `base` is given, of a head on that run's features.
        base: name of the run whose network it takes.
        patience: rounds of `config.training.evaluate_every` steps without a better bound on selection images, after
            which training ends; 0: it takes all of its steps.
    """

    name: str
    config: Config
    base: str | None = None
    patience: int = 0


def plans(scale: str, name: str, path: Path) -> list[Plan]:
    """The runs of a data set.

    Args:
        name: one of `DATA`.
        path: folder of CelebA (official layout, or images alone), or of brain slices.

    Raises:
        ValueError: an unknown scale or data set.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    if name not in DATA:
        raise ValueError(f"there are no data called {name!r}, expected one of {', '.join(DATA)}")
    return _paper(name, path) if scale == "paper" else _small(name, path)


def source(name: str, path: Path) -> str:
    """Of a configuration: CelebA without its official list is a folder like any other."""
    if name == "brain":
        return f"brain:{path}"
    return f"{'celeba' if (path / 'list_eval_partition.txt').is_file() else 'folder'}:{path}"


def last_by_name(config: DataConfig) -> Split | None:
    """The split of a folder of CelebA: its last images by name; none where a source has parts or people of its own.

    Raises:
        ValueError: there are too few images.
    """
    if not config.source.startswith("folder:"):
        return None
    split = data.load(config).split
    images = {name: digest for part in split.parts.values() for name, digest in part.items()}
    names = sorted(images)
    if len(names) < 4 * HELD_OUT:
        raise ValueError(f"{config.source} has {len(names)} images, expected at least {4 * HELD_OUT}")
    cuts = {"train": names[: -2 * HELD_OUT], "validation": names[-2 * HELD_OUT : -HELD_OUT], TEST: names[-HELD_OUT:]}
    parts: Mapping[str, Mapping[str, str]] = {part: {n: images[n] for n in chosen} for part, chosen in cuts.items()}
    return Split("published", split.decoding, parts)


def _paper(name: str, path: Path) -> list[Plan]:
    recipe = PRESETS[name][1].replace(data={"source": source(name, path)})
    found = [Plan("sos-vae", recipe), Plan("beta-vae", beta_vae(recipe))]
    return found + _heads(found[1].config, 25) + (_ablation(recipe) if name == "celeba-64-grey" else [])


def _small(name: str, path: Path) -> list[Plan]:
    brain = name == "brain"
    recipe = Config(
        data=DataConfig(
            source=source(name, path),
            height=64,
            width=64,
            channels=1,
            flip=not brain,
            validation=0.25 if brain else 0.1,
        ),
        model=ModelConfig(rank=25, latents=64, width=0.25, depth=1, upsampling="bilinear", diagonal=1e-5),
        objective=ObjectiveConfig(kl_slack=15.0 if brain else 45.0, entropy_slack=-17_630.0),
        training=TrainingConfig(
            steps=6000,
            mean_only_steps=2000,
            batch=32,
            lr=5e-4,
            evaluate_every=1000,
            evaluate_batches=16,
            save_every=500,
            keep=2,
        ),
    )
    # Checkpoints of the rounds without a better bound, and of the best one before them, are kept.
    base = beta_vae(recipe).replace(
        training={"steps": 20_000, "mean_only_steps": 1000, "dequantise": True, "save_every": 1000, "keep": 4}
    )
    found = [Plan("beta-vae", base, patience=3), Plan("sos-vae", recipe)]
    return found + _heads(base, 25) + (_ablation(recipe) if not brain else [])


def _heads(base: Config, rank: int) -> list[Plan]:
    """Structured precisions alone, and under a low-rank part, on the features of the β-VAE."""
    head = of_run(base).replace(training={"steps": 1500})
    return [
        Plan("precision-3", head.replace(model={"head": "precision", "neighbourhood": 3}), "beta-vae"),
        Plan("precision-5", head.replace(model={"head": "precision", "neighbourhood": 5}), "beta-vae"),
        Plan(
            "global-local", head.replace(model={"head": "global-local", "neighbourhood": 3, "rank": rank}), "beta-vae"
        ),
    ]


def _ablation(recipe: Config) -> list[Plan]:
    """The recipe without one of its parts."""
    return [
        Plan("without-entropy-constraint", recipe.replace(objective={"entropy_constraint": False})),
        Plan("without-mean-phase", recipe.replace(training={"mean_only_steps": 0})),
    ]
