"""Writing files so that a kill or a power loss at any moment leaves whole ones: a temporary name, a sync, a rename."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_writer", "publish", "sync", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under `path`, whole or not at all; makes the folder if there is none."""
    with atomic_writer(path) as file:
        file.write(content)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name when the block ends, and is removed when it raises.

    It gets the permissions that a plain `open` would give, not those of a private temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder (or file) to the name that counts."""
    temporary.rename(final)
    _sync_folder(final.parent)


def sync(path: Path) -> None:
    """Waits until what was written to the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename survives a power loss only once its folder is on the disk; where folders cannot be opened it must do."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
