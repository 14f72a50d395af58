"""Training: one loop, the state that it carries, and what happens between its steps.

run = train(PRESETS["faces"][1], "runs/faces")
train(run.config, "runs/faces", resume=True)  # goes on bit for bit where the last checkpoint was written
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import data, devices
from ..config import Config, TrainingConfig
from ..data.decode import shown
from ..evaluation import samples
from ..models.observation import Observation
from ..models.vae import VAE
from ..objective import Constraints, Terms, evaluate_terms, objective
from .run import Run
from .start import Start, resumed, started
from .state import State
from .stopping import stop_on_signals
from .watch import Watch

__all__ = ["NonFiniteError", "train"]

LEVELS = 255  # steps between black and white
EVALUATED_VALUES = 1 << 20  # of the validation images that go through the network at once


class NonFiniteError(RuntimeError):
    """Too many steps had a loss or a gradient that is not finite; the last good checkpoint is kept."""


def train(
    config: Config,
    folder: str | Path,
    *,
    resume: bool = False,
    step: int | None = None,
    accept_data_changes: bool = False,
    split: data.Split | None = None,
    network: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> Run:
    """Trains `config` in `folder` and returns the run; after Ctrl-C or SIGTERM it does so early, the state saved.

    A signal is heeded between two steps, so that what is saved is whole; a second one stops at once, without saving.

    Args:
        resume: go on from a checkpoint there. Network and objective have to be the run's own, and the images those that
            it was trained on, wherever they are now; `steps` may be raised, and everything changed that does not move
            the weights.
        step: go on from this checkpoint; by default from the newest whole one. Later ones are set aside.
        accept_data_changes: go on, although images have come, gone or changed. Those that the run knows stay training
            or validation images.
        split: which images are in which part, of a new run; by default the source decides.
        network: weights that a new run begins with, by name, in place of its own start for these.
        progress: show a bar with the terms of the objective in nats, images per second and the time left.

    Raises:
        FileExistsError: `folder` holds a run with work in it and `resume` is not given.
        FileNotFoundError: `resume` is given and there is no run or no checkpoint.
        InUseError: another process trains in `folder`.
        ChangedDataError: the images are not those of the run, or of `split`.
        ValueError: `resume` with a configuration that differs from the run's (the fields are named), or without a whole
            checkpoint. A batch of more than all images. A device that torch does not know, or has not.
        NonFiniteError: more than `skip_limit` steps were not finite; the term that went first is named.
        OSError: a checkpoint cannot be written; those before it are kept.
    """
    if not isinstance(config, Config):
        raise TypeError(f"config is {config!r}, expected a Config")
    if not resume:
        if step is not None:
            raise ValueError(f"step is {step}, which only a run that is resumed has")
        opened = started(config, folder, split, accept_data_changes, network)
    else:
        opened = resumed(config, folder, step, accept_data_changes)
    with opened as start:
        stopped = _loop(start, progress)
        if stopped:
            where = shown(str(start.run.folder))
            print(f"stopped at step {start.state.step} and saved; go on with: sosvae train --resume {where}")
        return start.run


def _loop(start: Start, progress: bool) -> bool:
    """Takes the steps that are left. Returns whether a signal ended that early."""
    run, config, images, state = start
    t, first_fault = config.training, None
    checkpoints = _Checkpoints(run, config, state)
    with stop_on_signals() as stop, Watch(run, config, images, state, progress) as watch:

        def evaluation() -> None:
            state.optimizer.zero_grad()  # evaluation needs the gradients' bytes
            checkpoints.evaluated(watch.evaluation(lambda: evaluate(state.model, images, config, state.device)))

        if watch.evaluated is not None:
            checkpoints.evaluated(watch.evaluated)
        elif _evaluates(state.step, t):  # a kill came between saving and this
            evaluation()
        while state.step < t.steps and not stop.requested:
            x = images.batch(state.step, t.batch, t.seed).to(state.device)
            terms, fault = train_step(state, x, config)
            state.step += 1
            state.skipped += fault is not None
            first_fault = first_fault or fault
            watch.step(None if fault else terms)
            if fault is None:
                checkpoints.proven()
            elif state.skipped > t.skip_limit:
                raise NonFiniteError(
                    f"{state.skipped} steps were not finite, allowed are {t.skip_limit}; "
                    f"the term that went first was {first_fault}. {checkpoints.good()}"
                )
            if state.step % t.save_every == 0 or state.step == t.steps:
                checkpoints.save()
            if _evaluates(state.step, t) and not stop.requested:
                evaluation()
        checkpoints.save()  # where a signal came between two that were due
    return state.step < t.steps


class _Checkpoints:
    """Saves checkpoints, and removes old ones once a newer one is known to be good.

    That is when a step, or an evaluation, from its weights is finite: weights can be finite and worth nothing.
    """

    def __init__(self, run: Run, config: Config, state: State) -> None:
        self._run, self._config, self._state = run, config, state
        self._newest, self._good = state.step, -1

    def save(self) -> None:
        """Once for each step."""
        if self._newest != self._state.step:
            self._run.save(self._config, self._state.step, self._state.model, self._state.state_dict())
            self._newest = self._state.step

    def proven(self) -> None:
        """A step from the newest checkpoint was finite."""
        if self._good < self._newest:
            self._good = self._newest
            self._run.discard(self._config.training.keep)

    def evaluated(self, values: Mapping[str, float | None]) -> None:
        """The evaluation of the state has these values; it tells nothing of a checkpoint of another step."""
        terms = [values.get(name) for name in Terms._fields]
        if self._newest == self._state.step and all(term is not None and math.isfinite(term) for term in terms):
            self.proven()

    def good(self) -> str:
        known = f", of step {self._good}," if self._good >= 0 else ""
        return f"The last good checkpoint{known} is kept; `--resume {shown(str(self._run.folder))} --step` takes it."


def _evaluates(step: int, t: TrainingConfig) -> bool:
    return step > 0 and (step % t.evaluate_every == 0 or step == t.steps)


def train_step(state: State, x: Tensor, config: Config) -> tuple[Terms, str | None]:
    """One step on images `x` [B, channels, H, W]: the terms, and the name of the first that was not finite.

    A step with such a term, or such a gradient, moves neither weights nor multipliers nor batch statistics.
    """
    t = config.training
    frozen = config.objective.mean == "frozen" and state.step >= t.mean_only_steps
    state.model.freeze(frozen)
    state.constraints.paused = frozenset({"kl"} if frozen else ())
    state.model.train()
    if t.dequantise:
        x = x + (torch.rand_like(x) - 0.5) / LEVELS
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
        if state.constraints.holds_mean:
            state.constraints.notice(state.constraints.error, state.step < t.mean_only_steps)
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

    def terms_of(i: int) -> tuple[Terms, Observation]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=t.precision == "bfloat16"):
            return evaluate_terms(model, parts[i], mean_only, noise[i])

    if len(parts) > 1 and constraints.limits and constraints.damping:
        buffers = list(model.buffers())
        before = torch._foreach_add(buffers, 0)
        with torch.no_grad():
            whole = constraints.violations(_joined([terms_of(i)[0] for i in range(len(parts))]))
        torch._foreach_copy_(buffers, before)
    found, loss, errors = [], x.new_zeros(()), x.new_zeros(())
    for i, images in enumerate(parts):
        terms, p = terms_of(i)
        part = objective(terms, constraints, config.objective, whole)
        if constraints.holds_mean:
            error = (images.flatten(1) - p.loc).square().sum(1).mean()
            part, errors = constraints.held(part, error, config.pixels), errors + error.detach() / len(parts)
        part = part / len(parts)
        part.backward()
        loss = loss + part.detach()
        found.append(Terms(*(term.detach() for term in terms)))
    constraints.error = errors
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
