"""Training: one loop, the state that it carries, and what happens between its steps.

run = train(PRESETS["faces"][1], "runs/faces")
train(run.config, "runs/faces", resume=True)  # goes on bit for bit where the last checkpoint was written
"""

import dataclasses
import math
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data, measure
from .config import Config, TrainingConfig, differences
from .model import VAE
from .objective import Multipliers, Terms, evaluate_terms, limits, objective, violations
from .run import Metrics, Run

__all__ = ["NonFiniteError", "train"]

EVALUATED_VALUES = 1 << 20  # of the validation images that go through the network at once


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or a gradient that is not finite; the last good checkpoint is kept."""


class State:
    """All that changes from step to step, which is what a checkpoint holds.

    The order of the data is not among it: it follows from `step` (see `data.Dataset.batch`).
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.training.seed)
        self.step = 0  # optimiser steps taken
        self.skipped = 0  # of them left out for a loss or gradient that was not finite
        self.model = VAE(config).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.training.lr, fused=True)
        self.multipliers = Multipliers(limits(config), device)

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, in types that `torch.load(weights_only=True)` reads."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "multipliers": dict(self.multipliers),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped = state["step"], state["skipped"]
        for name, value in state["multipliers"].items():
            self.multipliers[name] = value.to(self.multipliers[name].device)
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available() and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])


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
    t = config.training
    device = _device(t.device)
    run = _resumable(folder, config) if resume else Run.create(folder, config)
    images = data.load(config.data)
    images.steps_per_epoch(t.batch)
    state = State(config, device)
    if resume:
        checkpoint = run.load(device=device)
        state.load(checkpoint.weights, checkpoint.state)
    else:
        run.save(0, state.model, state.state_dict(), t.keep)
    xi = limits(config)
    watch = _Watch(run, config, images, state, progress)
    try:
        while state.step < t.steps and not watch.interrupted:
            x = images.batch(state.step, t.batch, t.seed).to(device)
            terms, fault = train_step(state, x, xi, config)
            state.step += 1
            if fault:
                state.skipped += 1
                watch.skipped(fault)
            else:
                watch.step(terms)
            if state.step % t.evaluate_every == 0 or state.step == t.steps:
                state.optimizer.zero_grad()  # gradients are done with, and evaluation has need of their memory
                watch.evaluated(evaluate(state.model, images, config, device))
            if state.step % t.save_every == 0 or state.step == t.steps or watch.interrupted:
                run.save(state.step, state.model, state.state_dict(), t.keep)
        if watch.interrupted:
            watch.say(f"stopped at step {state.step} and saved; go on with: sosvae train --resume {run.folder}")
    finally:
        watch.close()
    return run


def train_step(state: State, x: Tensor, xi: dict[str, float], config: Config) -> tuple[Terms, str | None]:
    """One step on images `x` [B, C, H, W]: the terms, and the name of the first that was not finite.

    A step with such a term, or such a gradient, moves neither weights nor multipliers nor batch statistics.
    """
    t = config.training
    state.model.train()
    for group in state.optimizer.param_groups:
        group["lr"] = t.lr * _step_size(state.step, t)
    buffers = list(state.model.buffers())
    before = torch._foreach_add(buffers, 0)
    state.optimizer.zero_grad()
    terms, loss = differentiate(state.model, x, xi, state.multipliers, config, state.step < t.mean_only_steps)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), math.inf if t.clip is None else t.clip)
    fault = _fault(terms, loss, norm)
    if fault is None:
        state.optimizer.step()
        state.multipliers.ascend(violations(terms, xi), config.objective.multiplier_lr)
    else:
        torch._foreach_copy_(buffers, before)
    return terms, fault


def differentiate(
    model: VAE, x: Tensor, xi: dict[str, float], multipliers: Multipliers, config: Config, mean_only: bool
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

    if len(parts) > 1 and xi and config.objective.damping:
        buffers = list(model.buffers())
        before = torch._foreach_add(buffers, 0)
        with torch.no_grad():
            whole = violations(_joined([terms_of(i) for i in range(len(parts))]), xi)
        torch._foreach_copy_(buffers, before)
    found, loss = [], x.new_zeros(())
    for i in range(len(parts)):
        terms = terms_of(i)
        part = objective(terms, violations(terms, xi), multipliers, config.objective, whole) / len(parts)
        part.backward()
        loss = loss + part.detach()
        found.append(Terms(*(term.detach() for term in terms)))
    return _joined(found), loss


def _joined(terms: list[Terms]) -> Terms:
    return Terms(*map(torch.cat, zip(*terms, strict=True)))


@torch.no_grad()
def evaluate(model: VAE, images: data.Dataset, config: Config, device: torch.device) -> dict[str, float]:
    """Terms on validation images, in nats per image, and the quality of samples.

    Of so few images at once that it takes less memory than a step, though in float32. Generators are left as they were,
    so that how often this is called does not change what is learned.
    """
    model.eval()
    t = config.training
    at_once = max(1, min(t.micro_batch, EVALUATED_VALUES // config.pixels))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(t.seed)
        batches = images.first("validation", t.evaluate_batches * t.batch).split(at_once)
        rows = [evaluate_terms(model, x.to(device))[0].mean() for x in batches]
    values = {
        name: float(sum(row[name] * len(x) for row, x in zip(rows, batches, strict=True)) / sum(map(len, batches)))
        for name in Terms._fields
    }
    return values | measure.quality(model, images.deviation())._asdict()


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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, of a name or of its own build
        raise ValueError(f"device is {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _resumable(folder: str | Path, config: Config) -> Run:
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
    run.load()  # before anything is written: a run without a checkpoint cannot be resumed
    run.write_config(dataclasses.replace(run.config, training=config.training))
    return run


class _Watch:
    """Everything that looks at training and does not take part: bar, metrics, TensorBoard, skipped steps."""

    def __init__(self, run: Run, config: Config, images: data.Dataset, state: State, progress: bool) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self.config, self.images, self.state = config, images, state
        self.metrics = Metrics(run.metrics, state.step)
        self.first_fault: str | None = None
        self.bar = tqdm(total=config.training.steps, initial=state.step, unit="step", disable=not progress)
        self.bar.set_description(config.model.head)
        self.since = time.perf_counter(), state.step
        self.board = None
        if config.training.tensorboard:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tensorboard's own imports
                from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=state.step + 1)
        self.interrupted = False
        self._old_handler: Any = None
        if threading.current_thread() is threading.main_thread():  # only there can a signal be handled
            self._old_handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def step(self, terms: Terms) -> None:
        self.bar.update()
        step, t = self.state.step, self.config.training
        if step % t.log_every and step != t.steps:
            return
        now = time.perf_counter()
        rate = (step - self.since[1]) * t.batch / max(now - self.since[0], 1e-9)
        self.since = now, step
        values = {name: float(value.detach()) for name, value in terms.mean().items()}
        multipliers = {f"multiplier_{name}": float(value) for name, value in self.state.multipliers.items()}
        self.bar.set_postfix_str(
            " ".join(f"{name}={value:.0f}" for name, value in values.items()) + f" nats, {rate:.0f} images/s"
        )
        self._write("train", values | multipliers | {"skipped": self.state.skipped})
        if self.board is not None:  # not in the metrics, which are to be the same for the same seed
            self.board.add_scalar("train/images_per_second", rate, step)

    def skipped(self, fault: str) -> None:
        self.bar.update()
        self.first_fault = self.first_fault or fault
        if self.state.skipped > self.config.training.skip_limit:
            raise NonFiniteError(
                f"{self.state.skipped} steps were not finite, allowed are {self.config.training.skip_limit}; "
                f"the term that went first was {self.first_fault}. The last good checkpoint is kept."
            )

    def evaluated(self, values: dict[str, float]) -> None:
        self._write("validation", values)
        if self.board is not None:
            from . import figures

            pictures = figures.panels(self.state.model, self.images.first("validation", 8))
            for name, strip in pictures.items():
                self.board.add_image(name, strip, self.state.step)

    def _write(self, kind: str, values: dict[str, float]) -> None:
        self.metrics.write(self.state.step, kind, values)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, self.state.step)

    def say(self, message: str) -> None:
        self.bar.write(message)

    def close(self) -> None:
        self.metrics.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
