"""A checkpoint: a folder `step_NNNNNNNN` with the weights and the state of training after that many steps.

`checkpoint.json` beside them holds the step, the configuration and a digest of each file, so that a checkpoint is what
was written, or an error that names the file. Version 0.1 wrote none; there, shapes and types are all that is checked.
No code is executed from any of the files.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import config as configuration
from .. import files
from ..config import Config
from ..data.decode import reason, shown
from ..models.vae import VAE
from ..objective import Constraints

__all__ = ["RECORD", "STATE", "WEIGHTS", "Checkpoint", "DamagedError", "folder_name", "read", "step_of", "write"]

WEIGHTS, STATE, RECORD = "weights.safetensors", "state.pt", "checkpoint.json"


class DamagedError(ValueError):
    """A file of a run is not what was written; the message names it."""

    @classmethod
    def of(cls, path: Path, fault: str) -> "DamagedError":
        return cls(f"{shown(str(path))}: {fault}")


class Checkpoint(NamedTuple):
    """What was saved after `step` optimiser steps."""

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]  # optimiser, multipliers, random generators; see `state.State`


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder, and none of any other name, copies that somebody has named otherwise too."""
    step = int(name.removeprefix("step_")) if re.fullmatch(r"step_[0-9]{8,18}", name) else None
    return step if step is not None and folder_name(step) == name else None


def write(folder: Path, checkpoint: Checkpoint, config: Config) -> None:
    """Fills an empty folder, and waits until all of it is on the disk."""
    from safetensors.torch import save_file  # of the extra `train`, like all that is imported where it is used

    save_file(checkpoint.weights, folder / WEIGHTS)
    with (folder / STATE).open("wb") as file:
        torch.save(checkpoint.state, file)
    record = {
        "step": checkpoint.step,
        "config": configuration.to_dict(config),
        "digests": {name: _digest(folder / name) for name in (WEIGHTS, STATE)},
    }
    record["digest"] = _digest_of(record)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")
    for name in (WEIGHTS, STATE, RECORD):
        files.permit(folder / name)
        files.sync(folder / name)
    files.sync(folder)


def read(folder: Path, config: Config) -> Checkpoint:
    """What `write` wrote, on the CPU.

    Args:
        config: of the run; the checkpoint has to fit to it.

    Raises:
        DamagedError: the folder holds something else. OSError: a file is there and cannot be read. ValueError: the
            checkpoint is whole, and of another configuration.
    """
    _check_files(folder, config, (WEIGHTS, STATE))
    weights, model = _checked_weights(folder, config)
    # Random generators' states live on the CPU, so the state is read there; optimisers move their own.
    state = _loaded(folder / STATE, _load_state)
    fault = _fault(state, step_of(folder.name), model, Constraints.of(config))
    if fault is not None:
        raise DamagedError.of(folder / STATE, fault)
    return Checkpoint(state["step"], weights, state)


def read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """The weights alone, for who does not train on: the state of training, a pickle, is not opened.

    Raises: as `read`.
    """
    _check_files(folder, config, (WEIGHTS,))
    return _checked_weights(folder, config)[0]


def _check_files(folder: Path, config: Config, names: tuple[str, ...]) -> None:
    """Finds out whether files of a checkpoint are there, as the record says and of that configuration."""
    step = step_of(folder.name)
    for name in names:
        if not (folder / name).is_file():
            raise DamagedError.of(folder / name, "is missing")
    record = _record(folder / RECORD)
    if record is None:
        return
    if record["step"] != step:
        raise DamagedError.of(folder / RECORD, f"is of step {record['step']}, expected {step}, as the folder's name")
    for name in names:
        if _digest(folder / name) != record["digests"][name]:
            raise DamagedError.of(folder / name, f"its content has changed: its digest is not that of {RECORD}")
    changed = configuration.incompatible(configuration.of_file(record["config"], folder / RECORD), config)
    if changed:
        raise ValueError(
            f"{shown(str(folder))} was trained with another configuration than config.json has (there, here): "
            + "; ".join(changed)
        )


def _checked_weights(folder: Path, config: Config) -> tuple[dict[str, Tensor], VAE]:
    """The weights, and the network without numbers that they fit."""
    weights = _loaded(folder / WEIGHTS, _load_weights)
    with torch.device("meta"):  # shapes and types, without numbers
        model = VAE(config)
    _check_weights(folder / WEIGHTS, weights, model)
    return weights, model


def _load_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())  # `load_file` takes no path with bytes that are no UTF-8


def _load_state(path: Path) -> Any:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is damaged; the error says so
        return torch.load(file, map_location="cpu", weights_only=True)


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch and safetensors raise of bytes that they did not write is of many types
        raise DamagedError.of(path, f"cannot be read ({reason(error)})") from None


def _record(path: Path) -> dict[str, Any] | None:
    """What `write` put into `checkpoint.json`; none of version 0.1."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        digest = record.pop("digest")
        whole = digest == _digest_of(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError.of(path, f"is not the record of a checkpoint ({reason(error)})") from None
    if not whole:
        raise DamagedError.of(path, "its content has changed: its digest is another")
    return record


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_weights(path: Path, weights: dict[str, Tensor], model: VAE) -> None:
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        names = sorted(weights.keys() ^ expected.keys())
        raise DamagedError.of(path, f"holds other tensors than the network of config.json: {', '.join(names[:5])}")
    for name, tensor in weights.items():
        if not _alike(tensor, expected[name]):
            raise DamagedError.of(
                path, f"{name} is {_form(tensor)}, expected {_form(expected[name])} for the network of config.json"
            )


def _fault(state: Any, step: int | None, model: VAE, constraints: Constraints) -> str | None:
    """What is wrong with a state of training, if anything is."""
    parts = {"step", "skipped", "optimizer", "multipliers", "rng", "rng_cuda"}
    if not isinstance(state, dict) or state.keys() != parts:
        return f"holds no state of training, expected {', '.join(sorted(parts))}"
    if state["step"] != step:
        return f"is of step {state['step']}, expected {step}, as the folder's name"
    if not isinstance(state["skipped"], int) or not 0 <= state["skipped"] <= state["step"]:
        return f"skipped is {state['skipped']!r}, expected 0 to {step} steps"
    multipliers = state["multipliers"]
    if not isinstance(multipliers, dict) or multipliers.keys() != constraints.multipliers.keys():
        return f"holds other multipliers than config.json constrains: {', '.join(constraints.multipliers) or 'none'}"
    for name, value in multipliers.items():
        if not _alike(value, constraints.multipliers[name]):
            return f"the multiplier of {name} is {_form(value)}, expected a number"
    if not _alike(state["rng"], torch.get_rng_state()):
        return f"rng is {_form(state['rng'])}, expected the state of torch's generator"
    if not isinstance(state["rng_cuda"], list):
        return f"rng_cuda is {_form(state['rng_cuda'])}, expected a list"
    return _optimizer_fault(state["optimizer"], list(model.parameters()))


def _optimizer_fault(optimizer: Any, parameters: list[Tensor]) -> str | None:
    try:
        (group,), moments = optimizer["param_groups"], optimizer["state"]
        if group["params"] != list(range(len(parameters))):
            return f"the optimiser is of {len(group['params'])} parameters, expected {len(parameters)}"
        for i, of_parameter in moments.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if not _alike(of_parameter[name], parameters[i]):
                    return f"{name} of parameter {i} is {_form(of_parameter[name])}, expected {_form(parameters[i])}"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return f"holds no state of the optimiser ({reason(error)})"
    return None


def _alike(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of the type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
