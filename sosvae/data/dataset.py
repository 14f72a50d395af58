"""Images and their split, as training reads them."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import DataConfig
from . import cache as caches
from .cache import Cache
from .decode import VERSION, shown
from .sources import Source, find
from .split import PARTS, TEST, ChangedDataError, Rule, Split, compare, divide, listing, merged, with_test

__all__ = ["Dataset", "load"]


class Dataset:
    """Decoded images and their split.

    Attributes:
        images: uint8 [images, channels, height, width], memory-mapped.
        names: of the images; in a folder the path below it.
        indices: part → indices into `images`: `train`, `validation`, and in most cases `test`.
        split: which image is in which part, for a run to keep.
        skipped: names of files that could not be decoded, with the reason.
        remarks: what was left out, in phrases.
    """

    def __init__(
        self, cache: Cache, parts: Sequence[str], rule: Rule, config: DataConfig, remarks: Sequence[str]
    ) -> None:
        self.folder = cache.folder
        self.images: NDArray[np.uint8] = cache.images
        self.names = cache.names
        self.skipped = cache.skipped
        self.remarks = list(remarks)
        self._flip, self._shift = config.flip, config.shift
        self._deviation: float | None = None
        self.indices = {
            wanted: np.array([i for i, part in enumerate(parts) if part == wanted], dtype=np.int64)
            for wanted in dict.fromkeys((*PARTS, *parts))
        }
        self.split = Split(
            rule,
            VERSION,
            {
                part: {cache.names[i]: cache.digests[i] for i in indices.tolist()}
                for part, indices in self.indices.items()
            },
        )

    @property
    def train(self) -> NDArray[np.int64]:
        """Indices of the training images."""
        return self.indices["train"]

    @property
    def validation(self) -> NDArray[np.int64]:
        """Indices of the validation images, on which everything is chosen."""
        return self.indices["validation"]

    def steps_per_epoch(self, batch: int) -> int:
        """Whole batches in one pass over the training images.

        Raises:
            ValueError: there are fewer training images than a batch takes, or it takes none.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1 image")
        if batch > len(self.train):
            raise ValueError(f"a batch of {batch} is more than the {len(self.train)} training images")
        return len(self.train) // batch

    def batch(self, step: int, batch: int, seed: int) -> Tensor:
        """The training images of step `step`, float32 [batch, channels, height, width] from 0 to 1.

        Each epoch is a permutation without its incomplete last batch. It follows from `seed` and `step`
        alone, so a run that is resumed needs no other state to go on with the same images.

        Raises:
            ValueError: `step` or `seed` is negative, or `batch` is none that `steps_per_epoch` takes.
        """
        if min(step, seed) < 0:
            raise ValueError(f"step is {step} and seed is {seed}, expected at least 0")
        epoch, position = divmod(step, self.steps_per_epoch(batch))
        order = np.random.default_rng((seed, epoch)).permutation(self.train)
        images = self.images[order[position * batch : (position + 1) * batch]]
        if self._flip:
            mirrored = np.random.default_rng((seed, epoch, position)).random(batch) < 0.5
            images[mirrored] = images[mirrored, ..., ::-1]
        if self._shift:
            moves = np.random.default_rng((seed, epoch, position, 1)).integers(0, 2 * self._shift + 1, (batch, 2))
            images = _moved(images, self._shift, moves)
        return as_intensities(images)

    def first(self, part: str, count: int) -> Tensor:
        """Up to `count` images of a part, spread evenly over it, float32 [·, channels, height, width].

        Raises:
            ValueError: there is no such part, or `count` is not positive.
        """
        if part not in self.indices:
            raise ValueError(f"part is {part!r}, expected one of {', '.join(self.indices)}")
        return as_intensities(self.images[_spread(self.indices[part], count)])

    def deviation(self, count: int = 8192) -> float:
        """Standard deviation over training images of one pixel, root mean square over pixels (intensity from 0 to 1).

        Over all of them, or `count` of them spread evenly where there are more; worked out once. It is 0 if all
        images are the same: sums of bytes are exact.
        """
        if self._deviation is None:
            chosen = _spread(self.train, count)
            total = np.zeros(self.images.shape[1:], dtype=np.int64)
            squares = np.zeros_like(total)
            for start in range(0, len(chosen), 64):
                block = self.images[chosen[start : start + 64]].astype(np.int64)
                total += block.sum(0)
                squares += np.square(block).sum(0)
            variance = (len(chosen) * squares - np.square(total)) / (len(chosen) * 255.0) ** 2
            self._deviation = float(np.sqrt(variance.mean()))
        return self._deviation


def load(
    config: DataConfig,
    *,
    split: Split | None = None,
    accept_changes: bool = False,
    rule: Rule | None = None,
    test: bool = False,
) -> Dataset:
    """The images of `config`, decoded now if they are not in the cache.

    What was left out is told in one warning: files that cannot be decoded, by name; the rest by reason and count.

    Args:
        split: which image is in which part, as a run has kept it (`Dataset.split`). The source decides otherwise.
        accept_changes: go on where the images are not those of `split`. Those that it knows stay in their parts.
        rule: how the source's groups are held out, in place of its own rule: "drawn" for a run that kept no split
            (unless the source publishes parts).
        test: make a test part, of half of the people (or files) that are held out, also where what was kept has none.
            A new split has one in any case, if there are two people to hold out.

    Raises:
        ChangedDataError: the images are not those of `split`, and `accept_changes` is not given; it says what changed.
        ValueError: an unknown source, no images, none for a part, or colour asked of grey ones. FileNotFoundError: a
            folder, a package or the partition file of CelebA is not there. OSError: the cache cannot be written.
    """
    if not isinstance(config, DataConfig):
        raise TypeError(f"config is {config!r}, expected a DataConfig")
    source = find(config.source)
    cache, remarks = caches.opened(config, source)
    place = {name: i for i, name in enumerate(source.names)}
    kept = [place[name] for name in cache.names]
    groups = [source.groups[i] for i in kept]
    tested = TEST in split.parts if split else rule is None
    rule = split.rule if split else source.rule if source.parts or rule is None else rule
    parts = [source.parts[i] for i in kept] if source.parts else divide(groups, rule, config.validation)
    if tested:
        parts = with_test(groups, parts, rule)
    if split:
        parts = merged(cache.names, groups, parts, split)
    dataset = Dataset(cache, parts, rule, config, _remarks(cache, source) + remarks)
    if split and (changes := compare(split, dataset.split)):
        if not accept_changes:
            raise ChangedDataError(config.source, changes)
        dataset.remarks += changes
    if test:
        dataset = Dataset(cache, with_test(groups, parts, rule), rule, config, dataset.remarks)
    for part in PARTS:
        if not len(dataset.indices[part]):
            raise ValueError(
                f"{shown(config.source)} leaves no image for {part}: {len(cache.names)} images of "
                f"{len(set(groups))} people or files, validation={config.validation}"
            )
    if dataset.remarks:
        warnings.warn(f"{shown(config.source)}: {'; '.join(dataset.remarks)}", stacklevel=2)
    return dataset


def as_intensities(images: NDArray[np.uint8]) -> Tensor:
    """Bytes 0 to 255 as float32 from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)


def _moved(images: NDArray[np.uint8], most: int, moves: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images [B, channels, H, W] from `moves` [B, 2] on, 0 to 2 · `most`, of themselves with their edges repeated."""
    H, W = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    return np.stack([one[:, i : i + H, j : j + W] for one, (i, j) in zip(padded, moves, strict=True)])


def _spread(indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Up to `count` of the indices, spread evenly."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1 image")
    chosen: NDArray[np.int64] = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]
    return chosen


def _remarks(cache: Cache, source: Source) -> list[str]:
    """What there is to say about the images, in phrases."""
    remarks = []
    if cache.skipped:
        listed = "; ".join(cache.skipped[:10]) + ("; …" if len(cache.skipped) > 10 else "")
        remarks.append(f"skipped {len(cache.skipped)} of {len(source.names)} images that cannot be decoded: {listed}")
    remarks += source.remarks
    if cache.paged:
        remarks.append(f"took the first page of {len(cache.paged)} files with more: {listing(cache.paged)}")
    return remarks
