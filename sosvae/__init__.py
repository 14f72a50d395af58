"""Variational autoencoders with structured uncertainty in the observation space.

    run = sosvae.train(sosvae.PRESETS["faces"][1], "runs/mine")
    p = run.model().decode(torch.randn(1, 32))  # N(μ, PPᵀ + D) over the pixels
    images = run.model().unflatten(p.rsample((8,)))

Public names are imported when they are first used, which needs torch and numpy; figures, TensorBoard, safetensors and
the command line are imported where they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig, from_dict, to_dict
    from .data import ChangedDataError, Dataset, Split, load
    from .evaluation.samples import Quality, neighbour_correlation, quality
    from .models.observation import PixelwiseNormal
    from .models.uncertainty import StructuredUncertainty
    from .models.vae import VAE
    from .objective import Terms
    from .presets import PRESETS, beta_vae
    from .tools.observation import condition, interpolate, scale_components
    from .training.checkpoint import DamagedError
    from .training.head import train_head
    from .training.lock import InUseError
    from .training.loop import NonFiniteError, train
    from .training.run import Run

__all__ = [
    "PRESETS",
    "VAE",
    "ChangedDataError",
    "Config",
    "DamagedError",
    "DataConfig",
    "Dataset",
    "InUseError",
    "ModelConfig",
    "NonFiniteError",
    "ObjectiveConfig",
    "PixelwiseNormal",
    "Quality",
    "Run",
    "Split",
    "StructuredUncertainty",
    "Terms",
    "TrainingConfig",
    "beta_vae",
    "condition",
    "from_dict",
    "interpolate",
    "load",
    "neighbour_correlation",
    "quality",
    "scale_components",
    "to_dict",
    "train",
    "train_head",
]

# Modules of the names above; those that import quickly come first.
_HOMES = (
    *("config", "presets", "data", "models.vae", "models.observation", "models.uncertainty", "objective"),
    *("evaluation.samples", "tools.observation", "training.checkpoint", "training.lock", "training.run"),
    *("training.loop", "training.head"),
)


def __getattr__(name: str) -> Any:
    """A public name, or a module of this package.

    Nothing else is imported with the package itself: the command line has to answer Ctrl-C before torch is there.
    """
    if name in __all__:
        home = next(home for home in _HOMES if name in import_module(f"{__name__}.{home}").__all__)
        globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return globals()[name]
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
