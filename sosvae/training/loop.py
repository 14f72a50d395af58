"""Training: one loop, the state that it carries, and what happens between its steps.

run = train(PRESETS["faces"][1], "runs/faces")
train(run.config, "runs/faces", resume=True)  # goes on bit for bit where the last checkpoint was written
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from .. import data, devices
from ..config import Config, TrainingConfig, differences
from ..evaluation import samples
from ..models.vae import VAE
from ..objective import Constraints, Terms, evaluate_terms, objective
from .run import Checkpoint, Run
from .state import State
from .stopping import stop_on_signals
from .watch import Watch

__all__ = ["NonFiniteError", "train"]

EVALUATED_VALUES = 1 << 20  # of the validation images that go through the network at once


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or a gradient that is not finite; the last good checkpoint is kept."""


def train(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True) -> Run:
    """Trains `config` in `folder` and returns the run; after Ctrl-C it does so early, the state saved.

    Ctrl-C is heeded between two steps, so that what is saved is whole; a second one stops at once, without
    saving.

    Args:
        resume: go on from the latest checkpoint there. Data, network and objective have to be the run's own;
            `steps` may be raised, and everything changed that does not move the weights.
        progress: show a bar with the terms of the objective in nats, images per second and the time left.

    Raises:
        FileExistsError: `folder` holds a run and `resume` is not given.
        FileNotFoundError: `resume` is given and there is no run or no checkpoint.
        ValueError: `resume` with a configuration that differs from the run's; the fields are named. Or a device that
            torch does not know, or has not.
        NonFiniteError: more than `skip_limit` steps were not finite; the term that went first is named.
    """
    t, device = config.training, devices.find(config.training.device)
    run, checkpoint = _resumed(folder, config, device) if resume else (Run.create(folder, config), None)
    images = data.load(config.data)
    if t.batch > len(images.train):
        raise ValueError(f"a batch of {t.batch} is more than the {len(images.train)} training images")
    state, first_fault = State(config, device), None
    if checkpoint is None:
        run.save(0, state.model, state.state_dict(), t.keep)
    else:
        state.load(checkpoint.weights, checkpoint.state)
    with stop_on_signals() as stop, Watch(run, config, images, state, progress) as watch:
        while state.step < t.steps and not stop.requested:
            x = images.batch(state.step, t.batch, t.seed).to(device)
            terms, fault = train_step(state, x, config)
            state.step += 1
            state.skipped += fault is not None
            first_fault = first_fault or fault
            watch.step(None if fault else terms)
            if fault and state.skipped > t.skip_limit:
                raise NonFiniteError(
                    f"{state.skipped} steps were not finite, allowed are {t.skip_limit}; "
                    f"the term that went first was {first_fault}. The last good checkpoint is kept."
                )
            if state.step % t.evaluate_every == 0 or state.step == t.steps:
                state.optimizer.zero_grad()  # evaluation needs the gradients' bytes
                watch.evaluated(evaluate(state.model, images, config, device))
            if state.step % t.save_every == 0 or state.step == t.steps or stop.requested:
                run.save(state.step, state.model, state.state_dict(), t.keep)
    if stop.requested:
        print(f"stopped at step {state.step} and saved; go on with: sosvae train --resume {run.folder}")
    return run


def train_step(state: State, x: Tensor, config: Config) -> tuple[Terms, str | None]:
    """One step on images `x` [B, channels, H, W]: the terms, and the name of the first that was not finite.

    A step with such a term, or such a gradient, moves neither weights nor multipliers nor batch statistics.
    """
    t = config.training
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = t.lr * _step_size(state.step, t)
    buffers = list(state.model.buffers())
    before = torch._foreach_add(buffers, 0)
    state.optimizer.zero_grad()
    terms, loss = differentiate(state.model, x, state.constraints, config, state.step < t.mean_only_steps)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if t.clip is None else t.clip)
    fault = _fault(terms, loss, norm)
    if fault is None:
        state.optimizer.step()
        state.constraints.ascend(terms)
    else:
        torch._foreach_copy_(buffers, before)
    return terms, fault


def differentiate(
    model: VAE, x: Tensor, constraints: Constraints, config: Config, mean_only: bool
) -> tuple[Terms, Tensor]:
    """Adds the gradient of the loss on images `x` to the parameters'; the terms and the loss, without gradients.

    The noise of z is drawn for all images at once, so that what a step draws does not depend on `accumulate`. The
    coefficient λ + c·[g] of a constraint takes no gradient but is of the whole batch: where that goes through the
    network in parts, a first pass without gradients finds g, and leaves the batch statistics alone.
    """
    t, whole = config.training, None
    parts = x.split(t.micro_batch)
    noise = torch.randn(len(x), model.latents, device=x.device, dtype=x.dtype).split(t.micro_batch)

    def terms_of(i: int) -> Terms:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=t.precision == "bfloat16"):
            return evaluate_terms(model, parts[i], mean_only, noise[i])[0]

    if len(parts) > 1 and constraints.limits and constraints.damping:
        buffers = list(model.buffers())
        before = torch._foreach_add(buffers, 0)
        with torch.no_grad():
            whole = constraints.violations(_joined([terms_of(i) for i in range(len(parts))]))
        torch._foreach_copy_(buffers, before)
    found, loss = [], x.new_zeros(())
    for i in range(len(parts)):
        terms = terms_of(i)
        part = objective(terms, constraints, config.objective, whole) / len(parts)
        part.backward()
        loss = loss + part.detach()
        found.append(Terms(*(term.detach() for term in terms)))
    return _joined(found), loss


def _joined(terms: list[Terms]) -> Terms:
    return Terms(*map(torch.cat, zip(*terms, strict=True)))


@torch.no_grad()
def evaluate(model: VAE, images: data.Dataset, config: Config, device: torch.device) -> dict[str, float]:
    """Terms on validation images, in nats per image, and the quality of samples.

    Batches are small enough to need fewer bytes than a step, though in float32. Generators are left as they were, so
    that how often this is called does not change what is learned.
    """
    model.eval()
    t = config.training
    at_once = max(1, min(t.micro_batch, EVALUATED_VALUES // config.pixels))
    with devices.seeded(device, t.seed):
        batches = images.first("validation", t.evaluate_batches * t.batch).split(at_once)
        rows = [evaluate_terms(model, x.to(device))[0].mean() for x in batches]
    values = {
        name: float(sum(row[name] * len(x) for row, x in zip(rows, batches, strict=True)) / sum(map(len, batches)))
        for name in Terms._fields
    }
    return values | samples.quality(model, images.deviation())._asdict()


def _step_size(step: int, t: TrainingConfig) -> float:
    """1, then along a cosine to 0 over the last part `decay` of the steps."""
    if t.decay == 0:
        return 1.0
    left = (t.steps - step) / (t.decay * t.steps)
    return 0.5 * (1 - math.cos(math.pi * min(1.0, left)))


def _fault(terms: Terms, loss: Tensor, norm: Tensor) -> str | None:
    # One look at the device per step; which term it was is asked only when something is wrong.
    if bool(torch.isfinite(loss) & torch.isfinite(norm)):
        return None
    for name, term in terms._asdict().items():
        if not bool(torch.isfinite(term).all()):
            return name
    return "the loss" if not bool(torch.isfinite(loss)) else "the gradient"


def _resumed(folder: str | Path, config: Config, device: torch.device) -> tuple[Run, Checkpoint]:
    """The run, under its configuration's data, network and objective and what `config` says of training."""
    run = Run.open(folder)
    changed = differences(run.config, config, "data", "model", "objective")
    moving = {"mean_only_steps", "batch", "lr", "decay", "clip", "seed", "accumulate", "precision", "memory_format"}
    if config.training.decay:
        moving.add("steps")  # the step size follows from how far away the end is
    changed += [
        line
        for line in differences(run.config, config, "training")
        if line.partition(":")[0].removeprefix("training.") in moving
    ]
    if changed:
        raise ValueError(f"{folder} was trained with another configuration (there, now): " + "; ".join(changed))
    checkpoint = run.load(device=device)  # before anything is written
    run.write_config(dataclasses.replace(run.config, training=config.training))
    return run, checkpoint
