"""A run that is evaluated: its network, its images in three parts, and what both are known by."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import data, devices
from ..config import Config
from ..data import Dataset
from ..data.decode import shown
from ..data.split import TEST, Rule
from ..models.vae import VAE
from ..training.checkpoint import WEIGHTS, folder_name
from ..training.head import part_that_stays
from ..training.run import Run
from . import counted

__all__ = ["Subject", "named", "opened"]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: of the run's folder.
        head: its observation model.
        step: of the checkpoint.
        weights: sha256 of the file of weights.
        network: sha256 of encoder, decoder and mean: heads that were fitted to one network share it.
        counted: pixels that count, bool [N]; none: all.
        folder: of the run.
    """

    name: str
    head: str
    step: int
    weights: str
    network: str
    vae: VAE
    config: Config
    images: Dataset
    counted: Tensor | None
    folder: Path

    def indices(self, name: str, count: int | None = None) -> NDArray[np.int64]:
        """Of the images of a part; `count` of them, spread evenly.

        Raises:
            ValueError: there are no such images, or fewer than `count`.
        """
        indices: NDArray[np.int64] = self.images.indices.get(name, np.empty(0, dtype=np.int64))
        if not len(indices):
            raise ValueError(
                f"{shown(self.config.data.source)} has no {name} images: one person (or file) alone is held out; "
                "raise data.validation and train anew"
            )
        if count is not None and count > len(indices):
            raise ValueError(f"{self.name} has {len(indices)} {name} images, {count} are asked for")
        if count is not None:
            indices = indices[np.linspace(0, len(indices) - 1, count).astype(int)]
        return indices

    def digest(self, name: str, count: int | None = None) -> str:
        """Of the content of the images of `part`, their form, and their order."""
        digests = self.images.split.parts[name]
        names = [self.images.names[i] for i in self.indices(name, count)]
        d = self.config.data
        form = [self.images.split.decoding, d.height, d.width, d.channels, d.fit]
        return hashlib.sha256(json.dumps([form, [digests[each] for each in names]]).encode()).hexdigest()


def opened(
    folder: Path,
    *,
    step: int | None = None,
    source: str | None = None,
    accept_changes: bool = False,
    device: torch.device | str = "cpu",
) -> Subject:
    """A run with three parts of images: where it has two, half of the people held out become the test part for good.

    Args:
        step: of the checkpoint; by default the newest whole one.
        source: where its images are, if they have moved.
        accept_changes: go on although images have come, gone or changed.

    Raises:
        FileNotFoundError: no run, no checkpoint, or no images. ValueError: a damaged checkpoint, or images of another
            shape. ChangedDataError: other images than the run's. InUseError: the run is being trained, and has no test
            part yet.
    """
    run = Run.open(folder)
    config = run.config
    if source is not None:
        config = config.replace(data={"source": source})
    loaded = run.load(step)
    vae = VAE(config)
    vae.load_state_dict(loaded.weights)
    split = run.split
    rule: Rule | None = None if split else "drawn"  # of a run that kept none
    images = data.load(config.data, split=split, accept_changes=accept_changes, rule=rule, test=True)
    if split is None or TEST not in split.parts:
        with run.locked():
            images.split.write(run.folder / "split.json")
    if images.images.shape[1:] != vae.image_shape:
        raise ValueError(f"images are {list(images.images.shape[1:])}, expected {list(vae.image_shape)} of {folder}")
    with (run.checkpoints / folder_name(loaded.step) / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = devices.find(str(device))
    return Subject(
        folder.resolve().name,
        config.model.head,
        loaded.step,
        digest,
        _network(loaded.weights),
        vae.to(found).eval(),
        config,
        images,
        counted.changing(images.images, images.train),
        folder,
    )


def _network(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(part_that_stays(weights).items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def named(subjects: list[Subject]) -> list[Subject]:
    """The same with names that differ: a folder above tells runs of one name apart."""
    names = [subject.name for subject in subjects]
    return [
        replace(subject, name=f"{subject.folder.resolve().parent.name}/{subject.name}")
        if names.count(subject.name) > 1
        else subject
        for subject in subjects
    ]
