"""Variational autoencoders with structured uncertainty in the observation space.

    run = sosvae.train(sosvae.PRESETS["faces"][1], "runs/mine")
    p = run.model().decode(torch.randn(1, 32))  # N(μ, PPᵀ + D) over the pixels
    images = run.model().unflatten(p.rsample((8,)))

Figures, TensorBoard, safetensors and the command line are imported where they are used: `import sosvae` needs torch
and numpy only.
"""

from .config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainingConfig, from_dict, to_dict
from .data import Dataset, load
from .evaluation.samples import Quality, neighbour_correlation, quality
from .models.observation import PixelwiseNormal
from .models.vae import VAE
from .objective import Terms
from .presets import PRESETS, beta_vae
from .tools.observation import condition, interpolate, scale_components
from .training.loop import NonFiniteError, train
from .training.run import Run

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
