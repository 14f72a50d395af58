"""A run's folder: `config.json`, `checkpoints/`, `metrics.jsonl`, `figures/`, and `tensorboard/`.

Everything is written to a temporary name and renamed, so that a kill at any moment leaves whole files. A
checkpoint is a folder `step_NNNNNNNN` with the weights and the state of training at one step; being renamed
as a whole, weights and state always belong together, and the newest folder is the latest checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import config as configuration
from .. import files
from ..config import Config
from ..models.vae import VAE

__all__ = ["Checkpoint", "Run"]

WEIGHTS, STATE = "weights.safetensors", "state.pt"


class Checkpoint(NamedTuple):
    """What was saved after `step` optimiser steps."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]  # optimiser, multipliers, random generators; see `state.State`


class Run:
    """A run's folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"
        self.metrics = self.folder / "metrics.jsonl"

    @classmethod
    def create(cls, folder: str | Path, config: Config) -> "Run":
        """A folder for a new run.

        Raises:
            FileExistsError: there is a run in it already.
        """
        run = cls(folder)
        if (run.folder / "config.json").exists():
            raise FileExistsError(
                f"{run.folder} holds a run already: continue it with --resume, or name another folder"
            )
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The folder of a run that was started before.

        Raises:
            FileNotFoundError: there is none.
        """
        run = cls(folder)
        if not (run.folder / "config.json").is_file():
            raise FileNotFoundError(f"{run.folder} is not the folder of a run: it has no config.json")
        return run

    @property
    def config(self) -> Config:
        return configuration.from_dict(json.loads((self.folder / "config.json").read_text(encoding="utf-8")))

    def write_config(self, config: Config) -> None:
        self.write_json("config.json", configuration.to_dict(config))

    def write_json(self, name: str, values: Any) -> Path:
        """`values` as the file `name` in this folder."""
        path = self.folder / name
        files.write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")
        return path

    def steps(self) -> list[int]:
        """Steps there are checkpoints of, ascending."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*"))

    def save(self, step: int, model: nn.Module, state: dict[str, Any], keep: int) -> Path:
        """Writes the checkpoint of `step` and removes all but the newest `keep`."""
        target = self.checkpoints / f"step_{step:08d}"
        if not target.exists():  # the same step of the same run is the same checkpoint
            temporary = self.checkpoints / f".writing_{step:08d}"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            from safetensors.torch import save_file  # of the extra `train`, like all that is imported where it is used

            weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            save_file(weights, temporary / WEIGHTS)
            torch.save(state, temporary / STATE)
            for name in (WEIGHTS, STATE):
                files.sync(temporary / name)
            files.publish(temporary, target)
        for old in self.steps()[:-keep]:
            # Away from the name that counts first: half a checkpoint must never look like one.
            away = (self.checkpoints / f"step_{old:08d}").rename(self.checkpoints / f".removing_{old:08d}")
            shutil.rmtree(away, ignore_errors=True)
        return target

    def load(self, step: int | None = None, device: torch.device | str = "cpu") -> Checkpoint:
        """The checkpoint of `step`, or the latest. No code is executed from the files.

        Raises:
            FileNotFoundError: there is none.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}, only of {steps}"
            raise FileNotFoundError(f"{self.folder} has {which}")
        from safetensors.torch import load_file

        step = steps[-1] if step is None else step
        folder = self.checkpoints / f"step_{step:08d}"
        # Random generators' states live on the CPU, so the state is read there; optimisers move their own.
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        return Checkpoint(step, load_file(folder / WEIGHTS, device=str(device)), state)

    def model(self, step: int | None = None, device: torch.device | str = "cpu") -> VAE:
        """The trained network of a checkpoint, ready for inference.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        checkpoint = self.load(step, device)
        vae = VAE(self.config)
        vae.load_state_dict(checkpoint.weights)
        return vae.to(device).eval()
