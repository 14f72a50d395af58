"""The cache of decoded bytes that training reads.

Files are decoded once, all to one size, into `images.npy` (uint8, [images, channels, height, width]) beside
`index.json`, in a folder whose name follows from everything that shaped it: source, size, version of the decoding, and
each file's path, length and time of change. It is written with plain writes into space that was reserved: a full disk
under a memory map would end the process by a signal.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..files import FULL, lock, publish, size, write_atomically
from .decode import VERSION, decode, reason, shown
from .sources import Source

__all__ = ["Cache", "opened"]

IMAGES, INDEX = "images.npy", "index.json"
WRITING = ".writing-"  # in front of a folder's name until it is whole
HEADER = 128  # bytes before the first pixel


class Cache(NamedTuple):
    """Decoded images, as they lie on disk."""

    folder: Path
    images: NDArray[np.uint8]  # [images, channels, height, width], memory-mapped
    names: list[str]
    digests: list[str]  # of each file's content, 16 hexadecimal digits
    skipped: list[str]  # name and reason of each file that was not decoded
    paged: list[str]  # names of files with more pages than the one that was taken
    unread: list[str]  # names of those skipped because the system did not give their content


def opened(config: DataConfig, source: Source) -> tuple[Cache, list[str]]:
    """The cache of `source`, made now where there is none, and remarks on what was found instead of one.

    Raises:
        ValueError: no file can be decoded, or colour is asked of grey images alone. OSError: the cache cannot be
            written; on a full disk with what is needed and what is free.
    """
    folder = cache_folder(config) / _key(config, source)
    remarks: list[str] = []
    if folder.is_dir():
        try:
            found = _read(folder, config, source)
            fault = "files that could not be read can be read now" if _readable_now(found, source) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
            fault = reason(error)
        if fault is None:
            return found, []
        remarks.append(f"the cache {shown(str(folder))} was of no use ({fault}) and has been made again")
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remarks += _former(folder, config)
    _write(folder, config, source)
    return _read(folder, config, source), remarks


def cache_folder(config: DataConfig) -> Path:
    """The folder of all caches."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sosvae"


def _key(config: DataConfig, source: Source) -> str:
    shape = f"{config.height}x{config.width}x{config.channels}"
    digest = hashlib.sha256(repr((VERSION, config.source, shape, config.fit)).encode())
    for file in source.files:
        digest.update(os.fsencode(file))
        with suppress(OSError):  # gone since it was listed: decoding will name it
            status = file.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return f"{config.source.partition(':')[0]}-{shape}-{digest.hexdigest()[:16]}"


def _read(folder: Path, config: DataConfig, source: Source) -> Cache:
    index = json.loads((folder / INDEX).read_bytes())
    if index.get("version") != VERSION:
        raise ValueError(f"version {index.get('version', 1)}, expected {VERSION}")
    images = np.load(folder / IMAGES, mmap_mode="r")  # raises where the file is shorter than it says
    expected = (len(index["names"]), config.channels, config.height, config.width)
    if images.shape != expected or images.dtype != np.uint8 or len(index["digests"]) != expected[0]:
        raise ValueError(f"{IMAGES} holds {images.dtype} {list(images.shape)}, expected uint8 {list(expected)}")
    if not set(index["names"]) <= set(source.names):
        raise ValueError(f"{INDEX} lists other files than the source")
    return Cache(folder, images, *(index[name] for name in Cache._fields[2:]))


def _readable_now(found: Cache, source: Source) -> bool:
    """Whether a disk is back, or permissions are: neither changes a file's time, nor the cache's name with it."""
    place = {name: i for i, name in enumerate(source.names)} if found.unread else {}
    for name in found.unread:
        with suppress(OSError):
            source.read(place[name])
            return True
    return False


def _former(folder: Path, config: DataConfig) -> list[str]:
    """Says which caches of the same source an earlier version left: they are not read, and only take space."""
    found = []
    for other in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{INDEX}")):
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            index = json.loads(other.read_bytes())
            if index.get("source") == config.source and index.get("version") != VERSION:
                found.append(shown(str(other.parent)))
    return [f"decoded anew, for an earlier version decoded otherwise; remove {', '.join(found)}"] if found else []


def _write(folder: Path, config: DataConfig, source: Source) -> None:
    """Writes the cache under a temporary name, then renames it: there is a whole one or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(folder) as temporary:
        need = HEADER + len(source.names) * config.channels * config.height * config.width
        free = shutil.disk_usage(temporary).free
        try:
            with (temporary / IMAGES).open("wb") as file:
                _reserve(file, need, free)
                index = _decode_all(file, config, source)
                os.fsync(file.fileno())
            write_atomically(temporary / INDEX, json.dumps(index).encode())  # ASCII: names need not be UTF-8
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                error.errno,
                f"the decoded images of {shown(config.source)} need {size(need)} in {folder.parent}, where "
                f"{size(free)} are free: make room, or name another folder as data.cache",
            ) from None
        try:
            publish(temporary, folder)
        except OSError:  # another process was faster; its cache is the same
            if not folder.is_dir():
                raise


def _decode_all(file: BinaryIO, config: DataConfig, source: Source) -> dict[str, object]:
    """Writes all images that can be decoded; returns the index."""
    names: list[str] = []
    digests: list[str] = []
    skipped: list[str] = []
    paged: list[str] = []
    unread: list[str] = []
    colour = False
    file.seek(HEADER)
    for i, name in enumerate(source.names):
        raw = None
        try:
            raw = source.read(i)
            pixels, more_pages = decode(raw, config)
        except Exception as error:  # a decoder raises anything; nothing but reading the one file happens here
            skipped.append(f"{shown(name)} ({reason(error)})")
            unread += [name] if raw is None else []
            continue
        colour = colour or bool((pixels != pixels[:1]).any())
        names.append(name)
        digests.append(hashlib.blake2b(raw, digest_size=8).hexdigest())
        if more_pages:
            paged.append(name)
        file.write(pixels.tobytes())
    if not names:
        raise ValueError(
            f"{shown(config.source)}: none of the {len(source.names)} images can be decoded: {'; '.join(skipped[:3])}"
        )
    if config.channels == 3 and not colour:
        raise ValueError(f"{shown(config.source)} has grey images alone ({len(names)}), but channels is 3")
    file.truncate()  # what was reserved for those that were skipped
    file.seek(0)
    file.write(_header((len(names), config.channels, config.height, config.width)))
    file.flush()
    return {
        "version": VERSION,
        "source": config.source,
        "names": names,
        "digests": digests,
        "skipped": skipped,
        "paged": paged,
        "unread": unread,
    }


def _header(shape: tuple[int, ...]) -> bytes:
    """Header of a .npy file (numpy's NEP 1), `HEADER` bytes long: it is written last, when the images are counted."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10) + text.ljust(HEADER - 11) + b"\n"


def _reserve(file: BinaryIO, need: int, free: int) -> None:
    """Fails now rather than after an hour of decoding, if the disk has no room.

    Raises:
        OSError: with one of `FULL`.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, need)
    except (AttributeError, OSError) as error:  # not on every system, and not for every file system
        if getattr(error, "errno", None) in FULL:
            raise
        if need > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into. What processes that died have left there is removed first."""
    with ExitStack() as held:
        with _lock(folder.parent):  # so that nobody finds a new folder before it is locked
            for remains in folder.parent.glob(f"{WRITING}*"):
                with _lock(remains, wait=False) as dead:
                    if dead:
                        shutil.rmtree(remains, ignore_errors=True)
            temporary = folder.parent / f"{WRITING}{folder.name}-{secrets.token_hex(4)}"
            temporary.mkdir()
            held.enter_context(_lock(temporary))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the folder is locked now, against other processes. The system drops the lock of one that dies."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield bool(lock(handle, wait))
    finally:
        os.close(handle)
