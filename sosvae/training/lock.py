"""Who works in a run's folder: one process at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import files
from ..data.decode import shown

__all__ = ["InUseError", "locked"]


class InUseError(OSError):
    """Another process trains in this folder; the message says which."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on the file `path`, in a folder that is there; the file is gone afterwards.

    The system drops the lock of a process that dies. Its file stays, means nothing, and is taken over. On a file
    system without locks nothing is locked.

    Raises:
        InUseError: another process has it, or another thread of this one.
    """
    handle = _open(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _open(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if files.lock(handle, wait=False) is False:
                owner = os.pread(handle, 300, 0).decode(errors="replace").strip() or "another process"
                raise InUseError(f"{shown(str(path.parent))} is in use by {owner}")
            with suppress(FileNotFoundError):  # removed by its last owner, after it was opened here
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
