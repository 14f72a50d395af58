"""Training what is missing, until it has converged, so that the same call goes on where it was stopped."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ..training.head import train_head
from ..training.loop import train
from ..training.run import Run
from .plans import Plan, last_by_name

__all__ = ["best_step", "trained"]


def trained(plans: Sequence[Plan], wanted: Sequence[str], folder: Path, *, progress: bool = True) -> list[Run] | None:
    """The runs of the given names, in `folder`, trained now as far as they are not.

    Returns: none where a signal stopped one; what was done is saved.

    Raises: as `train` and `train_head`.
    """
    by_name = {plan.name: plan for plan in plans}
    found = []
    for name in wanted:
        plan = by_name[name]
        if plan.base is not None:
            before = trained(plans, [plan.base], folder, progress=progress)
            if before is None:
                return None
            base = before[0]
            run = train_head(base, plan.config, folder / name, step=best_step(base), progress=progress)
        elif plan.patience:
            run = _until_converged(plan, folder / name, progress)
        else:
            run = _trained(plan.config, folder / name, progress)
        if run.steps()[-1] < plan.config.training.steps and not (plan.patience and _settled(run, plan.patience)):
            return None
        found.append(run)
    return found


def _trained(config: Config, folder: Path, progress: bool) -> Run:
    run = Run(folder)
    if run.has_work():
        return train(config, folder, resume=True, progress=progress)
    return train(config, folder, split=last_by_name(config.data), progress=progress)


def _until_converged(plan: Plan, folder: Path, progress: bool) -> Run:
    """Rounds of `evaluate_every` steps, until `patience` of them brought nothing, or all steps are taken."""
    run, t = Run(folder), plan.config.training
    while True:
        done = run.steps()[-1] if run.has_work() else 0
        if done >= t.steps or _settled(run, plan.patience):
            return run
        target = min(t.steps, (done // t.evaluate_every + 1) * t.evaluate_every)
        _trained(plan.config.replace(training={"steps": target}), folder, progress)
        if run.steps()[-1] < target:
            return run


def _bounds(run: Run) -> dict[int, float]:
    """Step → log p(x|z) − KL on selection images, nats for each: the bound that training maximises."""
    found: dict[int, float] = {}
    if not run.metrics.is_file():
        return found
    for line in run.metrics.read_bytes().splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        values = row.get("log_prob"), row.get("kl")
        if row.get("kind") == "validation" and None not in values:
            found[row["step"]] = values[0] - values[1]  # type: ignore[operator]
    return {step: value for step, value in found.items() if math.isfinite(value)}


def _settled(run: Run, patience: int) -> bool:
    """Whether the last `patience` evaluations are all below an earlier one."""
    values = list(_bounds(run).values())
    return len(values) > patience and max(values[-patience:]) < max(values[:-patience])


def best_step(run: Run) -> int:
    """The checkpoint with the greatest bound on selection images; the newest, where none was evaluated."""
    bounds, steps = _bounds(run), run.steps()
    return max(steps, key=lambda step: (bounds.get(step, -math.inf), step))
