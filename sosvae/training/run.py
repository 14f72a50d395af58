"""A run's folder: `config.json`, `split.json`, `checkpoints/`, `metrics.jsonl`, `figures/`, and `tensorboard/`.

Everything is written to a temporary name and renamed, so that a kill at any moment leaves whole files. A checkpoint is
a folder that is renamed as a whole (see `checkpoint`), so weights and state always belong together. `split.json` says
which images are held out; version 0.1 wrote none.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .. import config as configuration
from .. import data, devices, files
from ..config import Config, DataConfig
from ..data import Dataset, Split
from ..data.decode import reason, shown
from ..models.vae import VAE
from . import checkpoint
from .checkpoint import Checkpoint, DamagedError, folder_name, step_of
from .lock import locked

__all__ = ["Run"]

Read = TypeVar("Read")

WRITING, REMOVING = ".writing_", ".removing_"  # in front of the step of a checkpoint that does not count


class Run:
    """A run's folder on disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"
        self.metrics = self.folder / "metrics.jsonl"

    @classmethod
    def create(cls, folder: str | Path, config: Config, split: Split | None = None) -> "Run":
        """A folder for a new run. A run that was started there and got no further than that makes room.

        Raises:
            FileExistsError: there is a run in it already.
        """
        run = cls(folder)
        run.check_free()
        for step in run.steps():  # of a start, as `check_free` found
            run._remove(step)
        files.make_folder(run.checkpoints)
        if split is not None:
            split.write(run.folder / "split.json")
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
            raise FileNotFoundError(f"{shown(str(folder))} is not the folder of a run: it has no config.json")
        return run

    def check_free(self) -> None:
        """Finds out whether a run can be started here; writes nothing.

        Raises:
            FileExistsError: there is a run with work in it, or a file of that name, or somebody else's config.json.
            PermissionError: nothing can be written there.
        """
        shown_folder = shown(str(self.folder))
        above = self.folder.absolute()
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise FileExistsError(f"{shown(str(above))} is a file, expected a folder, for the run {shown_folder}")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(f"{shown(str(above))} cannot be written to, which the run {shown_folder} needs")
        if self.has_work():
            raise FileExistsError(
                f"{shown_folder} holds a run already: continue it with --resume, or name another folder"
            )
        if (self.folder / "config.json").exists():
            try:
                _ = self.config
            except ValueError as error:
                raise FileExistsError(f"{shown_folder} holds something else than a run ({error})") from None

    def has_work(self) -> bool:
        """Whether steps were taken here: a start alone leaves no checkpoint, or that of step 0."""
        if not self.checkpoints.is_dir():
            return False
        names = set(os.listdir(self.checkpoints)) - {folder_name(0)}
        return any(not name.startswith((WRITING, REMOVING)) for name in names)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here, and clears what one that was killed has left half done.

        Raises:
            InUseError: another process trains here.
        """
        files.make_folder(self.folder)
        with locked(self.folder / "lock"):
            remains = [path for kind in (WRITING, REMOVING) for path in self.checkpoints.glob(f"{kind}*")]
            for path in remains:
                shutil.rmtree(path, ignore_errors=True)
            for name in ("config.json", "split.json", self.metrics.name):
                for path in files.temporaries(self.folder / name):
                    path.unlink(missing_ok=True)
            yield

    @property
    def config(self) -> Config:
        """What the run was started with.

        Raises:
            ValueError: config.json is damaged, or of another version.
        """
        path = self.folder / "config.json"
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DamagedError.of(path, f"is no JSON ({reason(error)})") from None
        return configuration.of_file(values, path)

    @property
    def split(self) -> Split | None:
        """Which images are in which part; none in a run of version 0.1 that has not been gone on with.

        Raises:
            ValueError: split.json is damaged.
        """
        path = self.folder / "split.json"
        if path.is_file():
            return Split.read(path)
        if any((self.checkpoints / folder_name(step) / checkpoint.RECORD).is_file() for step in self.steps()):
            raise DamagedError.of(path, "is missing, so that nobody knows which images are held out")
        return None

    def images(self, config: DataConfig | None = None, *, accept_changes: bool = False) -> Dataset:
        """The images that the run is trained on, and their split.

        Args:
            config: where they are, if they have moved; by default where the run found them.
            accept_changes: take others than the run's as well (see `data.load`), and do without a damaged split.json.

        Raises:
            ChangedDataError: they are others. ValueError: split.json is damaged or missing. Others as of `data.load`.
        """
        config = config or self.config.data
        try:
            split = self.split
        except ValueError as error:
            if not accept_changes:
                raise ValueError(f"{error}; --accept-data-changes makes another") from None
            return data.load(config)
        if split is None:  # it was drawn from the list of images then
            return data.load(config, rule="drawn")
        return data.load(config, split=split, accept_changes=accept_changes)

    def write_config(self, config: Config) -> None:
        self.write_json("config.json", configuration.to_dict(config))

    def write_json(self, name: str, values: Any) -> Path:
        """`values` as the file `name` in this folder; null for numbers that JSON does not have."""
        path = self.folder / name
        values = plain(values)
        try:
            text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # a path with bytes that are no UTF-8
            text = json.dumps(values, indent=2, allow_nan=False).encode()
        files.write_atomically(path, text + b"\n")
        return path

    def steps(self) -> list[int]:
        """Steps there are checkpoints of, ascending."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return sorted(step for step in map(step_of, names) if step is not None)

    def save(self, config: Config, step: int, model: nn.Module, state: dict[str, Any]) -> Path:
        """Writes the checkpoint of `step`.

        Args:
            config: that it was trained with.

        Raises:
            OSError: it cannot be written, on a full disk for one; nothing of it is left.
        """
        target = self.checkpoints / folder_name(step)
        if target.exists():  # the same step of the same run is the same checkpoint
            return target
        weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        temporary = self.checkpoints / f"{WRITING}{step:08d}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            checkpoint.write(temporary, Checkpoint(step, weights, state), config)
            files.publish(temporary, target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise self._unsaved(step, weights, state, error) from error
        return target

    def _unsaved(self, step: int, weights: Any, state: Any, error: Exception) -> OSError:
        need, place = 1.01 * (_bytes(weights) + _bytes(state)), shown(str(self.checkpoints))
        try:
            room = f", and {files.size(shutil.disk_usage(self.checkpoints).free)} are free"
        except OSError:
            room = ""
        last = f"the last checkpoint is of step {self.steps()[-1]}" if self.steps() else "there is no checkpoint"
        return OSError(
            f"the checkpoint of step {step} cannot be written to {place} ({reason(error)}). It takes about "
            f"{files.size(need)}{room}; {last}"
        )

    def discard(self, keep: int) -> None:
        """Removes all checkpoints but the newest `keep`."""
        for step in self.steps()[:-keep]:
            self._remove(step)

    def _remove(self, step: int) -> None:
        files.remove_folder(self.checkpoints / folder_name(step), self.checkpoints / f"{REMOVING}{step:08d}")

    def set_aside(self, last: int) -> list[Path]:
        """Gives the checkpoints beyond step `last` names that do not count, before a run goes on from there."""
        moved = []
        for step in self.steps():
            if step > last:
                folder = self.checkpoints / folder_name(step)
                names = (f"{folder.name}_aside{n or ''}" for n in range(len(os.listdir(self.checkpoints)) + 1))
                moved.append(next(place for name in names if not (place := self.checkpoints / name).exists()))
                files.publish(folder, moved[-1])
        return moved

    def load(self, step: int | None = None, device: torch.device | str = "cpu") -> Checkpoint:
        """The checkpoint of `step`, or the newest whole one; a warning names what is damaged. No code is executed.

        Raises:
            FileNotFoundError: there is none. ValueError: all are damaged, or of another configuration; or torch has no
                such device.
        """
        found = devices.find(str(device))
        loaded = self._newest(step, checkpoint.read)
        return loaded._replace(weights={name: value.to(found) for name, value in loaded.weights.items()})

    def _newest(self, step: int | None, read: Callable[[Path, Config], Read]) -> Read:
        """What `read` finds in the checkpoint of `step`, or in the newest in which it finds nothing wrong."""
        config, faults, steps = self.config, list[str](), self.steps()
        if not steps:
            raise FileNotFoundError(f"{shown(str(self.folder))} has no checkpoint: start it anew, without --resume")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{shown(str(self.folder))} has no checkpoint of step {step}, only of {steps}")
        for each in reversed(steps) if step is None else (step,):
            try:
                found = read(self.checkpoints / folder_name(each), config)
            except (DamagedError, FileNotFoundError) as error:
                if not (self.checkpoints / folder_name(each)).exists():  # removed since by who trains here
                    return self._newest(step, read)
                faults.append(str(error))
                continue
            if faults:
                told = f"{'; '.join(faults)}; the checkpoint of step {each} is used instead"
                warnings.warn(told, stacklevel=3)
            return found
        raise DamagedError("; ".join(faults[:3]) + ("; …" if len(faults) > 3 else ""))

    def model(self, step: int | None = None, device: torch.device | str = "cpu") -> VAE:
        """The trained network of a checkpoint, ready for inference. The state of training is not opened.

        Raises: as `load`.
        """
        found = devices.find(str(device))
        weights = self._newest(step, checkpoint.read_weights)
        with torch.device("meta"):  # no weights are drawn that are overwritten anyhow
            vae = VAE(self.config)
        vae.load_state_dict({name: value.to(found) for name, value in weights.items()}, assign=True)
        vae.arrange()
        return vae.eval()


def plain(values: Any) -> Any:
    """`values` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _bytes(values: Any) -> int:
    """Bytes of all tensors in a nested structure."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    if isinstance(values, dict):
        values = list(values.values())
    return sum(map(_bytes, values)) if isinstance(values, list | tuple) else 0
