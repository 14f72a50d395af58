"""The state that training carries from step to step."""

from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..models.vae import VAE
from ..objective import Constraints

__all__ = ["State"]


class State:
    """All that changes from step to step, which is what a checkpoint holds.

    The order of the data is not among it: it follows from `step` (see `data.Dataset.batch`).
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(config.training.seed)
        self.step = 0  # optimiser steps taken
        self.skipped = 0  # of them left out for a loss or gradient that was not finite
        self.model = VAE(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.training.lr, fused=True)
        self.constraints = Constraints.of(config, device)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, in types that `torch.load(weights_only=True)` reads."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "multipliers": dict(self.constraints.multipliers),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Goes on from what was saved."""
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.constraints.load(state["multipliers"])
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
