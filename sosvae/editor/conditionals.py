"""Conditionals for pages that cannot work them out: other distributions, and a sparse precision of a large image."""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor

from ..tools.observation import scale_components
from .parameters import Prediction, pack
from .runs import CodeError, Runs

__all__ = ["Conditionals"]

MAX_TEMPERATURE = 100.0


class Conditionals:
    """p(x|z, pinned values) of a run at a code. The last one is kept: several samples of one edit factorise it once."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._lock = threading.Lock()
        self._kept: tuple[str, Any] | None = None

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> bytes:
        """The conditional mean, or a sample, packed; its header holds `log_density` under the model without pins.

        Args:
            asked: `run`, `code`; `indices`, `values` and, unless they are exact, `variances` τ² of what is pinned;
                `scales` of the components or None; for a sample its `seed` and `temperature`, (t_P, t_L).

        Raises:
            CodeError: there is no such run or code, or these are no such numbers.
        """
        name = str(asked.get("run"))
        model = self.runs.model(name)
        p, conditional = self._conditional(name, asked)
        image = conditional.loc[0]
        if asked.get("seed") is not None:
            try:
                seed = int(asked["seed"]) % 2**63
                t_P, t_L = (float(t) for t in asked.get("temperature", (1, 1)))
            except (TypeError, ValueError, OverflowError) as error:
                raise CodeError("a seed is a whole number, and temperatures are two numbers") from error
            if not (0 <= t_P <= MAX_TEMPERATURE and 0 <= t_L <= MAX_TEMPERATURE):
                raise CodeError(f"temperatures are from 0 to {MAX_TEMPERATURE:g}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                image = conditional.rsample(temperature=(t_P, t_L))[0]
        density = float(p.log_prob(image[None].to(p.loc.dtype)))
        return pack(Prediction(image.float().numpy()), model.image_shape, log_density=density)

    def _conditional(self, name: str, asked: dict[str, Any]) -> tuple[Any, Any]:
        key = repr([name, *(asked.get(part) for part in ("code", "indices", "values", "variances", "scales"))])
        with self._lock:
            if self._kept is None or self._kept[0] != key:
                self._kept = key, self._made(name, asked)
            return self._kept[1]

    def _made(self, name: str, asked: dict[str, Any]) -> tuple[Any, Any]:
        p: Any = self.runs.distribution(name, asked.get("code", {}))
        if not hasattr(p, "condition"):
            raise CodeError("this model has no conditionals")
        scales = asked.get("scales")
        if scales is not None:
            try:
                p = scale_components(p, torch.tensor(scales, dtype=torch.float64))
            except (TypeError, ValueError) as error:
                raise CodeError("scales are a number for each component") from error
        indices, values, variances = _pinned(asked, p.event_shape[0])
        if not len(indices):
            return p, p
        observed = torch.zeros(p.event_shape[0], dtype=torch.bool)
        observed[indices] = True
        edited = p.loc.clone()
        edited[0, indices] = values
        softness = torch.zeros(p.event_shape[0])
        softness[indices] = variances
        if not variances.any():
            return p, p.condition(edited, observed)
        if "variance" not in inspect.signature(p.condition).parameters:
            raise CodeError("this model takes pinned values exactly: no stroke can be meant less firmly")
        return p, p.condition(edited, observed, variance=softness)


def _pinned(asked: dict[str, Any], N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, values and τ² of what is pinned."""
    fault = CodeError(f"pinned values are indices below {N}, as many numbers, and as many variances from 0 on")
    try:
        indices = torch.tensor(asked.get("indices", []), dtype=torch.int64)
        values = torch.tensor(asked.get("values", []), dtype=torch.float32)
        variances = torch.tensor(asked.get("variances", [0.0] * len(indices)), dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise fault from error
    if not indices.dim() == values.dim() == variances.dim() == 1:
        raise fault
    sound = len(indices) == len(values) == len(variances) and bool(values.isfinite().all())
    if not sound or not bool((variances >= 0).all() & variances.isfinite().all()):
        raise fault
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < N:
        raise fault
    return indices, values, variances
