"""The runs that a page may look at, and what they say for a code.

A code is plain JSON, so that it fits into a link:

    {"kind": "seed", "seed": 3}                            from the prior
    {"kind": "heldout", "index": 17}                       the encoder's mean for a held-out image
    {"kind": "vector", "z": [...]}                         itself, such as that of an uploaded photo
    {"kind": "mix", "from": code, "to": code, "t": 0.5}    on the way from one to the other
    {"kind": "mean of", "run": name, "code": code}         the encoder's mean for another run's mean image
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import VAE, Dataset, Run, load
from ..models.observation import Observation
from ..tools.observation import slerp
from .parameters import pack, predict

__all__ = ["CodeError", "Runs"]

MODELS = 3  # kept in memory
ANSWERS = 24  # packed answers kept in memory
DEPTH = 4  # codes within codes: the page makes a mean of a mix of two


class CodeError(ValueError):
    """What was asked for is not there; the message is for the page."""


class Runs:
    """Runs by name. A name is looked up, never made into a path.

    Args:
        folders: of runs, or of folders that hold some.

    Raises:
        FileNotFoundError: there is no run.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._runs: dict[str, Run] = {}
        for folder in folders:
            found = [folder] if (folder / "config.json").is_file() else sorted(_runs_in(folder))
            if not found:
                raise FileNotFoundError(f"{folder} is not the folder of a run, and holds none")
            for path in found:
                self._runs[self._name(path.resolve())] = Run.open(path)
        if not self._runs:
            raise FileNotFoundError("no run was given: name the folder of one, or a folder that holds some")
        self._models: OrderedDict[str, VAE] = OrderedDict()
        self._answers: OrderedDict[str, bytes] = OrderedDict()
        self._datasets: dict[str, Dataset | str] = {}
        self._lock = threading.RLock()  # one decoder pass at a time

    def _name(self, path: Path) -> str:
        """The folder's own name, with its parent's where two share it."""
        name = path.name
        return name if name not in self._runs else f"{path.parent.name}/{name}"

    def names(self) -> list[str]:
        return list(self._runs)

    def run(self, name: str) -> Run:
        """Raises CodeError: there is none of that name."""
        if name not in self._runs:
            raise CodeError(f"there is no run {name!r}")
        return self._runs[name]

    def listing(self) -> list[dict[str, Any]]:
        """What the page shows of each run."""
        rows = []
        for name, run in self._runs.items():
            config, steps = run.config, run.steps()
            rows.append(
                {
                    "name": name,
                    "head": config.model.head,
                    "shape": list(config.image_shape),
                    "latents": config.model.latents,
                    "source": config.data.source.partition(":")[0],
                    "step": steps[-1] if steps else None,
                }
            )
        return rows

    def model(self, name: str) -> VAE:
        run = self.run(name)
        with self._lock:
            if name not in self._models:
                try:
                    self._models[name] = run.model()
                except FileNotFoundError as error:
                    raise CodeError(f"run {name!r} has no checkpoint yet") from error
                while len(self._models) > MODELS:
                    self._models.popitem(last=False)
            self._models.move_to_end(name)
            return self._models[name]

    def heldout(self, name: str, count: int) -> tuple[list[int], NDArray[np.uint8]]:
        """Indices and bytes [count, C, H, W] of held-out images, spread over all of them."""
        dataset = self._dataset(name)
        indices = np.linspace(0, len(dataset.validation) - 1, min(count, len(dataset.validation))).astype(int)
        return indices.tolist(), np.array(dataset.images[dataset.validation[indices]])

    def _dataset(self, name: str) -> Dataset:
        with self._lock:
            if name not in self._datasets:
                try:
                    self._datasets[name] = load(self.run(name).config.data)
                except (OSError, ValueError) as error:
                    self._datasets[name] = f"the held-out images cannot be read here: {error}"
            dataset = self._datasets[name]
            if isinstance(dataset, str):
                raise CodeError(dataset)
            return dataset

    @torch.no_grad()
    def distribution(self, name: str, code: Mapping[str, Any]) -> Observation:
        """p(x|z) of a run at a code, batch shape [1]."""
        with self._lock:
            z, _ = self._resolve(name, code)
            return self.model(name).decode(z)

    @torch.no_grad()
    def answer(self, name: str, code: Mapping[str, Any], precision: str = "float32") -> bytes:
        """The parameters of a run at a code, packed.

        Raises:
            CodeError: an unknown run or code. ValueError: an unknown precision.
        """
        key = repr((name, code, precision))
        with self._lock:
            if key not in self._answers:
                z, original = self._resolve(name, code)
                self._answers[key] = self._packed(name, z, original, code, precision)
                while len(self._answers) > ANSWERS:
                    self._answers.popitem(last=False)
            self._answers.move_to_end(key)
            return self._answers[key]

    @torch.no_grad()
    def encoded(self, name: str, image: NDArray[np.uint8], precision: str = "float32") -> bytes:
        """The parameters at the code of an image [channels, H, W] of bytes."""
        with self._lock:
            z = self._encode(name, image)
            code = {"kind": "vector", "z": [round(value, 5) for value in z[0].tolist()]}
            return self._packed(name, z, image, code, precision)

    def _packed(
        self, name: str, z: torch.Tensor, original: NDArray[np.uint8] | None, code: Mapping[str, Any], precision: str
    ) -> bytes:
        vae = self.model(name)
        return pack(
            predict(vae.decode(z)),
            vae.image_shape,
            precision,
            original,
            run=name,
            head=self.run(name).config.model.head,
            code=dict(code),
        )

    def _resolve(
        self, name: str, code: Mapping[str, Any], depth: int = DEPTH
    ) -> tuple[torch.Tensor, NDArray[np.uint8] | None]:
        """z [1, latents], and the image that it comes from, if any."""
        if depth == 0:
            raise CodeError(f"codes within codes are taken {DEPTH} deep, no deeper")
        vae = self.model(name)
        try:
            match code["kind"]:
                case "seed":
                    generator = torch.Generator().manual_seed(int(code["seed"]) % 2**32)
                    return torch.randn(1, vae.latents, generator=generator), None
                case "heldout":
                    dataset = self._dataset(name)
                    index = int(code["index"])
                    if not 0 <= index < len(dataset.validation):
                        raise CodeError(f"there are {len(dataset.validation)} held-out images, not one {index}")
                    image = np.array(dataset.images[dataset.validation[index]])
                    return self._encode(name, image), image
                case "vector":
                    z = torch.tensor([[float(value) for value in code["z"]]])
                    if z.shape != (1, vae.latents) or not z.isfinite().all():
                        raise CodeError(f"a code of this run has {vae.latents} numbers")
                    return z, None
                case "mix":
                    start, _ = self._resolve(name, code["from"], depth - 1)
                    end, _ = self._resolve(name, code["to"], depth - 1)
                    return slerp(start, end, torch.tensor(float(code["t"]))), None
                case "mean of":
                    other = str(code["run"])
                    shape = self.model(other).image_shape
                    if shape != vae.image_shape:
                        raise CodeError(f"the runs' images have different shapes, {shape} and {vae.image_shape}")
                    mean = self.model(other).decode(self._resolve(other, code["code"], depth - 1)[0]).loc
                    return vae.encode(mean.reshape(1, *shape).clamp(0, 1)).loc, None
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, CodeError):
                raise
            raise CodeError("this is no code") from error
        raise CodeError("this is no code")

    def _encode(self, name: str, image: NDArray[np.uint8]) -> torch.Tensor:
        return self.model(name).encode(torch.tensor(image)[None] / 255).loc


def _runs_in(folder: Path) -> list[Path]:
    """Runs right in `folder`, or in the folders in it."""
    return [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")]
