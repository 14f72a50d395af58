"""Variational autoencoders with structured uncertainty in the observation space.

    run = sosvae.train(sosvae.PRESETS["faces"][1], "runs/mine")
    p = run.model().decode(torch.randn(1, 32))  # N(μ, PPᵀ + D) over the pixels
    images = run.model().unflatten(p.rsample((8,)))

Figures, TensorBoard, safetensors and the command line are imported where they are used: `import sosvae` needs torch
and numpy only.
"""

from .config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainingConfig,
    beta_vae,
    from_dict,
    to_dict,
)
from .data import Dataset, load
from .measure import Quality, neighbour_correlation, quality
from .model import VAE, PixelwiseNormal
from .objective import Terms
from .run import Run
from .tools import condition, interpolate, scale_components
from .trainer import NonFiniteError, train

__all__ = [
    "PRESETS",
    "VAE",
    "Config",
    "DataConfig",
    "Dataset",
    "ModelConfig",
    "NonFiniteError",
    "ObjectiveConfig",
    "PixelwiseNormal",
    "Quality",
    "Run",
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
]
