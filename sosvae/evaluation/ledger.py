"""Work that is done image by image and kept on disk, so that what was stopped goes on where it was.

A piece of work is a folder named after everything that its numbers follow from; in it a file for each `CHUNK` images,
written whole or not at all.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files

__all__ = ["CHUNK", "Advanced", "Ledger"]

CHUNK = 128  # images

Arrays = Mapping[str, NDArray[Any]]
Advanced = Callable[[int], None]  # told how many images are done, once more


class Ledger:
    """Work in a folder, shared by all who ask for the same.

    Args:
        folder: made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def done(
        self,
        what: Mapping[str, Any],
        count: int,
        make: Callable[[int, int], Arrays],
        advanced: Advanced = lambda count: None,
    ) -> dict[str, NDArray[Any]]:
        """Arrays of all `count` images, from those that were kept and from `make`.

        Args:
            what: that the numbers follow from, fit for JSON. What is asked for under another count shares its chunks.
            make: of images `start` to `stop`, a multiple of `CHUNK` apart but for the last: arrays by name, whose first
                dimension is images.
            advanced: told of each chunk, kept ones too.
        """
        described = json.dumps(what, sort_keys=True)
        folder = self._folder / hashlib.sha256(described.encode()).hexdigest()[:20]
        parts: list[Arrays] = []
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            path = folder / f"{start:08d}-{stop:08d}.npz"
            part = _read(path, stop - start)
            if part is None:
                part = make(start, stop)
                if not (folder / "what.json").exists():
                    files.write_atomically(folder / "what.json", described.encode() + b"\n")
                _write(path, part)
            parts.append(part)
            advanced(stop - start)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(path: Path, count: int) -> Arrays | None:
    """What was kept; none where there is nothing, or nothing whole."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        content = io.BytesIO(path.read_bytes())  # numpy leaves a file open that is not whole
        with np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays and all(len(array) == count for array in arrays.values()):
            return arrays
    return None


def _write(path: Path, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    files.write_atomically(path, buffer.getvalue())
