"""Writing files so that a kill or a power loss at any moment leaves whole ones: a temporary name, a sync, a rename."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "FULL",
    "atomic_writer",
    "lock",
    "make_folder",
    "permit",
    "publish",
    "remove_folder",
    "size",
    "sync",
    "temporaries",
    "write_atomically",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or none for this user or process


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under `path`, whole or not at all; makes the folder if there is none."""
    with atomic_writer(path) as file:
        file.write(content)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name when the block ends, and is removed when it raises.

    It gets the permissions that a plain `open` would give, not those of a private temporary file.
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        permit(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def temporaries(path: Path) -> list[Path]:
    """What `atomic_writer` has left beside `path` where it was killed."""
    try:
        found = os.listdir(path.parent)
    except FileNotFoundError:
        return []
    return [path.parent / name for name in found if name.startswith(f".{path.name}.")]


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder (or file) to the name that counts."""
    temporary.rename(final)
    sync(final.parent)


def remove_folder(folder: Path, away: Path) -> None:
    """Removes a folder under another name, `away`: half of it must never look like the whole."""
    publish(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are not there, so that they survive a power loss."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the list of what is in a folder, is on the disk: only then does a rename survive.

    Where folders cannot be opened, or cannot be synced, it does without.
    """
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def permit(path: Path) -> None:
    """Gives a file the permissions that a plain `open` would give."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def lock(handle: int, wait: bool) -> bool | None:
    """Locks an open file or folder against others, until it is closed or its process ends, however that ends.

    Returns: whether it is locked now; None where the system, or the file system, has no locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def size(count: float) -> str:
    """A number of bytes, for a message."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
