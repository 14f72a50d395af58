"""The training step that is measured, here and in the versions of `sosvae` that are compared with it.

No other file of `bench` knows inner modules of `sosvae`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sosvae

from .operators import Arrays, Case
from .peers import Job

# Not by `try`: an editable installation of another version would lend this one the modules that it lacks.
if (Path(str(sosvae.__file__)).parent / "planning").is_dir():
    from sosvae.planning import fit, memory
    from sosvae.training.loop import train_step
    from sosvae.training.state import State
else:  # versions up to 0.1
    from sosvae import fit, memory, objective, trainer

    State = trainer.State

    def train_step(state: Any, x: Tensor, config: sosvae.Config) -> tuple[Any, str | None]:
        return trainer.train_step(state, x, objective.limits(config), config)


__all__ = ["TrainingJob", "fit", "memory", "start"]


def start(config: sosvae.Config, device: str, formulation: str = "linear") -> tuple[Any, Callable[[Tensor], Any]]:
    """A fresh state of training, and its step: images [B, channels, H, W] -> the objective's terms."""
    state = State(config, torch.device(device))
    if formulation != "linear":
        torch.manual_seed(config.training.seed)
        state.model = memory.formulated(config, formulation).to(device)
        state.optimizer = torch.optim.Adam(state.model.parameters(), lr=config.training.lr, fused=True)

    def step(x: Tensor) -> Any:
        terms, fault = train_step(state, x, config)
        assert fault is None, f"the training step was not finite: {fault}"
        return terms

    return state, step


class TrainingJob(Job):
    """One optimiser step of SOS-VAE's network, of the β-VAE's, or of SOS-VAE's with torch's class."""

    def __init__(self, case: Case, inputs: Arrays, device: str, peer: str) -> None:
        config = sosvae.Config(
            data=sosvae.DataConfig(height=case.height, width=case.width, channels=3 if case.channels == 3 else 1),
            model=sosvae.ModelConfig(rank=case.rank, diagonal=1e-3),
            training=sosvae.TrainingConfig(mean_only_steps=0, batch=case.batch),
        )
        if peer == "betavae":
            config = sosvae.beta_vae(config)
        state, self.step = start(config, device, "reference" if peer == "torch" else "linear")
        self.model = state.model
        # As they start, heads give no covariance to speak of; after a while of training they do.
        generator = torch.Generator(device).manual_seed(1)
        for p in self.model.head.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator, device=device)
        self.z = torch.randn(case.batch, config.model.latents, generator=generator, device=device)
        self.x = torch.from_numpy(inputs["x"]).to(device)

    def call(self) -> Any:
        return self.step(self.x)

    def outputs(self) -> Arrays:
        self.call()
        self.model.eval()  # the next step goes back
        with torch.no_grad():
            p = self.model.decode(self.z)
            log_prob, entropy = p.log_prob_and_entropy(self.x.flatten(1))
            outputs = {"log_prob": log_prob, "entropy": entropy, "loc": p.loc, "d": p.cov_diag.expand_as(p.loc)}
            if hasattr(p, "cov_factor"):
                outputs["P"] = p.cov_factor
        return {name: t.cpu().numpy() for name, t in outputs.items()}
