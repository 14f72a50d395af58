"""Every setting of a run, as frozen dataclasses: what the command line, `config.json` and the presets are made of.

The text under a field is its help on the command line; it ends with the unit.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .models import heads

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "TrainingConfig",
    "differences",
    "from_dict",
    "incompatible",
    "of_file",
    "to_dict",
]

if TYPE_CHECKING:
    HeadName = str
else:
    HeadName = Literal[heads.NAMES]  # for the command line's choices

VARIANCES = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the smallest normal number of float32, and the largest
SEEDS = 2**64  # that torch takes


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _text(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    return getattr(hint, "__name__", None) or str(hint)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000  # fits into a float
        return isinstance(value, float) or whole
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _check_types(section: Any) -> None:
    for name, hint in get_type_hints(type(section)).items():
        _require(_fits(getattr(section, name), hint), f"{name} is {getattr(section, name)!r}, expected {_text(hint)}")


def _at_least(bound: float, section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        finite = ", finite" if isinstance(value, float) else ""
        _require(value is None or bound <= value < math.inf, f"{name} is {value}, expected at least {bound}{finite}")


def _finite(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value is None or abs(value) < math.inf, f"{name} is {value}, expected a finite number")


def check_seed(seed: int) -> None:
    """Raises: ValueError: torch takes no such seed."""
    _require(0 <= seed < SEEDS, f"seed is {seed}, expected 0 to 2⁶⁴ − 1")


@dataclass(frozen=True)
class DataConfig:
    """What to learn from. Images are decoded once, into a memory-mapped cache of bytes."""

    source: str = "faces"
    """`faces`, `digits`, `folder:PATH`, `celeba:PATH` or `brain:PATH`."""
    height: int = 48
    """Height that images are brought to, at least 16 (pixels)."""
    width: int = 40
    """Width that images are brought to, at least 16 (pixels)."""
    channels: Literal[1, 3] = 1
    """1: grey, 3: colour (count)."""
    fit: Literal["crop", "pad"] = "crop"
    """How another aspect ratio is met: cut the longer side, or add black at the shorter one."""
    flip: bool = False
    """Mirror every other training image, left to right, at random."""
    shift: int = 0
    """Move training images by up to so many pixels along each axis, at random; edges are repeated (pixels)."""
    validation: float = 0.1
    """People (or files) held out, where the source does not say which (fraction)."""
    cache: str | None = None
    """Folder of the cache; by default `sosvae` in $XDG_CACHE_HOME or ~/.cache (path)."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(
            min(self.height, self.width) >= 16,
            f"height and width are {self.height}×{self.width}, expected at least 16×16",
        )
        _require(
            0 <= self.shift < min(self.height, self.width),
            f"shift is {self.shift}, expected at least 0 and less than height and width",
        )
        _require(0 < self.validation < 1, f"validation is {self.validation}, expected a fraction between 0 and 1")


@dataclass(frozen=True)
class ModelConfig:
    """The network (the paper's, where a field is left alone)."""

    head: HeadName = "structured"
    """Observation model: independent pixels with a learned variance (pixelwise, the β-VAE), N(μ, PPᵀ + D) (structured,
    the paper's), a sparse precision (precision), or a low-rank part over a sparse precision (global-local)."""
    rank: int = 25
    """Columns R of the low-rank factor P (count)."""
    factor: Literal["linear", "materialised"] = "linear"
    """Take log p, H and gradients from the decoder's features, or make P as a tensor first: the same numbers."""
    latents: int = 128
    """Size of the latent code z (count)."""
    width: float = 1.0
    """Multiplies the features 64-64-128-256-512 of the stages (factor)."""
    depth: int = 2
    """Residual blocks at each of the four resolutions (count)."""
    upsampling: Literal["transposed", "bilinear"] = "transposed"
    """Transposed convolution as in the paper, or bilinear and a 3×3 convolution (no checkerboard when small)."""
    diagonal: float = 1e-5
    """The fixed diagonal d of D (the paper's ε), or where a learned one starts (squared intensity, white is 1)."""
    fixed_diagonal: bool = True
    """Hold D at d·I; otherwise the structured head learns one variance per pixel."""
    neighbourhood: Literal[3, 5] = 3
    """Side of the window in which a sparse precision ties pixels (heads precision and global-local) (pixels)."""
    head_layers: int = 0
    """3×3 convolutions between the decoder's features and the covariance's own; the mean has none (count)."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(1, self, "rank", "latents", "depth")
        _at_least(0, self, "head_layers")
        _require(0 < self.width < math.inf, f"width is {self.width}, expected a positive factor, finite")
        low, high = VARIANCES
        _require(
            low <= self.diagonal <= high,
            f"diagonal is {self.diagonal}, expected a positive variance from {low:.2g} to {high:.2g}, as float32 holds",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """Equation 3 of the paper: −log p(x|z) under constraints on KL(q(z|x) ‖ p(z)) and on the entropy H."""

    kl_slack: float | None = 45.0
    """ξ_KL: the KL is constrained to it; `None`: the KL is weighted with `beta` instead (nats)."""
    beta: float = 1.0
    """Weight of the KL where `kl_slack` is `None` (factor)."""
    entropy_constraint: bool = True
    """Constrain the entropy of p(x|z); only the structured head is ever constrained."""
    nats_per_rank: float = 7.6
    """ξ_H = N/2 · (1 + log 2πd) + this · R: what each column of P may add to the fixed diagonal's (nats)."""
    entropy_slack: float | None = None
    """ξ_H itself, in place of `nats_per_rank` (nats)."""
    mean: Literal["free", "held", "frozen"] = "free"
    """After the mean-only steps the mean moves with everything else; or ‖x − μ‖² is held at the level that those steps
    reached; or network and mean stay as they are, and the rest of the head is fitted to their detached features."""
    damping: float = 10.0
    """Damping of the modified differential method of multipliers (1/nat)."""
    multiplier_lr: float = 1.0
    """Step of the multipliers' gradient ascent (1/nat)."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(0, self, "kl_slack", "beta", "damping", "multiplier_lr")
        _finite(self, "nats_per_rank", "entropy_slack")

    def entropy_limit(self, pixels: int, rank: int, diagonal: float) -> float:
        """ξ_H in nats for images of `pixels` values (H · W · channels)."""
        if self.entropy_slack is not None:
            return self.entropy_slack
        return 0.5 * pixels * (1 + math.log(2 * math.pi * diagonal)) + self.nats_per_rank * rank


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    steps: int = 100_000
    """Optimiser steps in all (count)."""
    mean_only_steps: int = 20_000
    """First steps, in which the covariance head is frozen and x ~ N(μ, d·I); 0 leaves this phase out (count)."""
    batch: int = 32
    """Images per step (count)."""
    lr: float = 1e-4
    """Adam's step size (per step)."""
    decay: float = 0.0
    """Last part of the steps over which the step size goes down to nothing, along a cosine (fraction)."""
    clip: float | None = None
    """Largest norm of the gradient, `None` for none (nats per unit of weight)."""
    seed: int = 0
    """Seed of the weights, the data's order and all noise."""
    skip_limit: int = 10
    """Steps with a non-finite loss or gradient that are left out before the run stops (count)."""
    log_every: int = 50
    """Between two rows of metrics (steps)."""
    evaluate_every: int = 1000
    """Between two passes over validation images, with pictures for TensorBoard (steps)."""
    evaluate_batches: int = 8
    """Batches in such a pass, at most (count)."""
    save_every: int = 1000
    """Between two checkpoints (steps)."""
    keep: int = 2
    """Checkpoints kept, the newest (count)."""
    tensorboard: bool = True
    """Write scalars and pictures for TensorBoard into the run's folder."""
    dequantise: bool = False
    """Add noise to training images, uniform over one grey level, as a learned variance needs: bytes have densities
    without bound otherwise."""
    accumulate: int = 1
    """Micro-batches of a step, which go through the network one after the other: the memory of one, the gradient of
    all. Batch norm sees one micro-batch at a time, which is the only difference. Damping needs the whole batch: an
    extra pass without gradients computes it, for about a third more time. Divides the batch (count)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of encoder and decoder while training, by autocast: bfloat16 halves what they keep. Weights,
    likelihood, KL, multipliers and all evaluation stay in float32."""
    memory_format: Literal["channels_last", "channels_first"] = "channels_last"
    """How images lie in memory inside encoder and decoder: the same numbers to rounding. Convolutions are mostly
    faster with channels last."""
    checkpointing: Literal["none", "blocks", "stages"] = "none"
    """Activations that the backward pass computes again, for less memory, more time and the same weights: none; those
    inside each residual block; those inside each resolution, and inside its blocks once more."""
    device: str = "auto"
    """`auto` (a GPU where there is one), or any name that torch knows."""

    def __post_init__(self) -> None:
        _check_types(self)
        _at_least(1, self, "steps", "batch", "accumulate", "log_every", "evaluate_every", "evaluate_batches")
        _at_least(1, self, "save_every", "keep")
        _at_least(0, self, "mean_only_steps", "skip_limit")
        _require(
            self.batch % self.accumulate == 0,
            f"accumulate is {self.accumulate} and does not divide the batch of {self.batch} images",
        )
        _require(0 <= self.decay <= 1, f"decay is {self.decay}, expected a fraction between 0 and 1")
        _require(0 < self.lr < math.inf, f"lr is {self.lr}, expected a positive step size, finite")
        _require(
            self.clip is None or 0 < self.clip < math.inf, f"clip is {self.clip}, expected a positive norm, finite"
        )
        check_seed(self.seed)

    @property
    def micro_batch(self) -> int:
        """Images that go through the network at once."""
        return self.batch // self.accumulate


@dataclass(frozen=True)
class Config:
    """One run: data, network, objective and loop."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        _require(
            self.objective.mean != "held" or self.training.mean_only_steps > 0,
            "objective.mean is 'held' and training.mean_only_steps is 0, expected steps that reach a level to hold",
        )

    def replace(self, **sections: dict[str, Any]) -> "Config":
        """This with other values: `config.replace(model={"rank": 5}, training={"steps": 10})`."""
        new = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **new)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, H, W); an event of the likelihood is such an image, flattened in this order."""
        return self.data.channels, self.data.height, self.data.width

    @property
    def pixels(self) -> int:
        """N = channels · H · W (the paper's S)."""
        return math.prod(self.image_shape)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, fit for JSON.

    Raises:
        TypeError: no configuration.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config is {config!r}, expected a Config")
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`; a key that is left out takes its default. Reads what earlier versions wrote.

    Raises:
        ValueError: an unknown key (all of them are named), or a value of the wrong type or out of range.
    """
    config: Config = _build(Config, values, "")
    return config


def of_file(values: Any, path: Path) -> Config:
    """`from_dict` of what a file holds: the errors name it."""
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path} holds no configuration of this version: {error}") from None


def differences(a: Config, b: Config) -> list[str]:
    """Lines `section.field: value in a, value in b` for all fields that differ."""
    left, right = to_dict(a), to_dict(b)
    return [
        f"{section}.{name}: {value!r}, {right[section][name]!r}"
        for section in left
        for name, value in left[section].items()
        if value != right[section][name]
    ]


# A run does not compare where images lie or which are held out, but their content, with the record of its split.
OF_DATA = {"data.source", "data.cache", "data.validation"}
MOVING = {"mean_only_steps", "batch", "lr", "decay", "clip", "seed", "accumulate", "precision", "memory_format"}
MOVING |= {"dequantise"}


def incompatible(a: Config, b: Config) -> list[str]:
    """Differences that would move the weights otherwise, as lines like those of `differences`.

    They are those of network, objective and image format, and some of training.
    """
    moving = MOVING | ({"steps"} if a.training.decay else set())  # the step size follows from how far the end is

    def matters(line: str) -> bool:
        field = line.partition(":")[0]
        section, _, name = field.partition(".")
        return name in moving if section == "training" else field not in OF_DATA

    return [line for line in differences(a, b) if matters(line)]


# What was written by earlier versions, and what it is called now.
_FORMER = {"training.checkpointing": {False: "none", True: "blocks"}}


def _build(kind: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path.removesuffix('.') or 'the configuration'} is {values!r}, expected an object")
    hints = get_type_hints(kind)
    unknown = [path + key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"unknown configuration key {', '.join(unknown)}; known here: {', '.join(hints)}")
    arguments = {}
    for key, value in values.items():
        if isinstance(value, bool):
            value = _FORMER.get(path + key, {}).get(value, value)
        arguments[key] = _build(hints[key], value, f"{path}{key}.") if dataclasses.is_dataclass(hints[key]) else value
    try:
        return kind(**arguments)
    except ValueError as error:  # of a section, and names the field
        raise ValueError(f"{path}{error}") from None
