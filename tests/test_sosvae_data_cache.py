"""The cache: whole or absent, of this version, and never the end of a process on a full disk."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from data_cases import quiet, settings, write

from sosvae import DataConfig, load
from sosvae.data import cache, decode, sources

FORMER = Path(__file__).parent / "fixtures" / "cache-version-1"  # images, and the cache that version 1 made of them


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        write(tmp_path / "in" / f"{i}.png", i)
    return tmp_path / "in"


@pytest.fixture
def config(tmp_path):
    return lambda source, **values: settings(source, tmp_path / "cache", **values)


def test_decoding_happens_once(config, folder, monkeypatch):
    first = load(config(f"folder:{folder}"))
    monkeypatch.setattr(cache, "decode", lambda *_: pytest.fail("decoded again"))
    again = load(config(f"folder:{folder}", validation=0.5, flip=True))  # neither has a part in decoding
    assert again.folder == first.folder
    assert isinstance(again.images, np.memmap)
    for step in range(20):
        again.batch(step, 4, seed=0)


def test_cache_follows_from_what_shaped_it(config, folder):
    one = load(config(f"folder:{folder}")).folder
    others = [load(config(f"folder:{folder}", height=16)).folder, load(config(f"folder:{folder}", fit="pad")).folder]
    os.utime(folder / "3.png", ns=(1, 1))
    others.append(load(config(f"folder:{folder}")).folder)
    write(folder / "9.png")
    others.append(load(config(f"folder:{folder}")).folder)
    assert len({one, *others}) == 5


def test_cache_is_whole_or_absent(config, folder, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            load(config(f"folder:{folder}"))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load(config(f"folder:{folder}")).images) == 8


def test_what_cannot_be_leaves_nothing_behind(config, folder, tmp_path):
    with pytest.raises(ValueError, match="channels is 3"):
        load(config(f"folder:{folder}", channels=3))
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_may_be_faster(config, folder):
    chosen = config(f"folder:{folder}")
    first = load(chosen)
    cache._write(first.folder, chosen, sources.find(chosen.source))
    assert load(chosen).folder == first.folder
    assert len(list(first.folder.parent.iterdir())) == 1


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder(DataConfig()) == tmp_path / "sosvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder(DataConfig()) == Path("~/.cache/sosvae").expanduser()


def test_index_says_where_the_images_are_from(config, folder):
    images = load(config(f"folder:{folder}"))
    index = json.loads((images.folder / "index.json").read_text())
    assert index["source"] == f"folder:{folder}"
    assert index["names"] == [f"{i}.png" for i in range(8)]
    assert index["version"] == decode.VERSION


def test_skipped_images_leave_no_gap(config, folder):
    (folder / "0.png").write_bytes(b"")
    images, _ = quiet(config(f"folder:{folder}"))
    assert images.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    size = (images.folder / "images.npy").stat().st_size
    assert size == cache.HEADER + 7 * 18 * 20
    assert np.array_equal(np.load(images.folder / "images.npy"), images.images)


def test_permissions_are_those_of_a_plain_file(config, folder):
    found = load(config(f"folder:{folder}")).folder
    plain = folder / "plain"
    plain.mkdir()
    (plain / "file").write_text("")
    assert found.stat().st_mode == plain.stat().st_mode
    assert {file.stat().st_mode for file in found.iterdir()} == {(plain / "file").stat().st_mode}


# --- Caches that are no use ---------------------------------------------------------------------------------


@pytest.fixture
def former(tmp_path, monkeypatch):
    """In place as version 1 wrote it: the same relative paths and times."""
    shutil.copytree(FORMER, tmp_path / "former")
    for file in (tmp_path / "former" / "images").iterdir():
        os.utime(file, ns=(10**18, 10**18))
    monkeypatch.chdir(tmp_path / "former")
    return tmp_path / "former" / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_of_former() -> list[np.ndarray]:
    plane = (np.arange(20 * 18).reshape(18, 20) % 256).astype(np.uint8)
    hidden = plane.copy()
    hidden[:9] = 0
    return [*(plane + np.uint8(i) for i in range(4)), plane, plane, hidden]  # deep, portrait, transparent


def test_a_cache_of_version_1_is_left_alone_and_named(former):
    (old,) = former.iterdir()
    before = contents(old)
    images, found = quiet(settings("folder:images", Path("cache")))
    path = old.relative_to(former.parent)
    assert found == [f"folder:images: decoded anew, for an earlier version decoded otherwise; remove {path}"]
    assert contents(old) == before
    assert all(np.array_equal(*pair) for pair in zip(images.images[:, 0], expected_of_former(), strict=True))
    assert quiet(settings("folder:images", Path("cache")))[1] == []


def test_a_cache_of_version_1_under_the_name_of_this_version_is_made_again(former):
    (old,) = former.iterdir()
    images, _ = quiet(settings("folder:images", Path("cache")))
    shutil.rmtree(images.folder)
    old.rename(images.folder)
    images, found = quiet(settings("folder:images", Path("cache")))
    assert len(found) == 1
    assert "version 1, expected 2" in found[0]
    assert all(np.array_equal(*pair) for pair in zip(images.images[:, 0], expected_of_former(), strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "images.npy").write_bytes((f / "images.npy").read_bytes()[:-1]),
        lambda f: (f / "images.npy").write_bytes(b""),
        lambda f: (f / "images.npy").write_bytes(os.urandom(3000)),
        lambda f: (f / "images.npy").unlink(),
        lambda f: np.save(f / "images.npy", np.zeros((8, 1, 18, 20), np.float32)),
        lambda f: np.save(f / "images.npy", np.zeros((7, 1, 18, 20), np.uint8)),
        lambda f: np.save(f / "images.npy", np.array([{}], dtype=object)),
        lambda f: (f / "index.json").write_text("{"),
        lambda f: (f / "index.json").write_text("[" * 100_000),
        lambda f: (f / "index.json").write_text("[]"),
        lambda f: (f / "index.json").write_text('{"version": 2}'),
        lambda f: (f / "index.json").write_bytes(b"\xff"),
        lambda f: (f / "index.json").write_text((f / "index.json").read_text().replace("3.png", "3.pnf")),
        lambda f: (f / "index.json").unlink(),
    ],
)
def test_a_damaged_cache_is_made_again(config, folder, damage):
    before = load(config(f"folder:{folder}"))
    pixels = np.array(before.images)
    damage(before.folder)
    images, found = quiet(config(f"folder:{folder}"))
    assert len(found) == 1
    assert f"the cache {before.folder} was of no use" in found[0]
    assert np.array_equal(images.images, pixels)


def test_files_that_could_not_be_read_are_tried_again(config, folder, monkeypatch):
    """Permissions that are mended, or a disk that is back, do not change a file's time."""
    whole = sources._folder

    def partly(root):
        source = whole(root)

        def read(i):
            if source.names[i] == "3.png":
                raise PermissionError(errno.EACCES, "Permission denied", "3.png")
            return source.read(i)

        return source._replace(read=read)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_folder", partly)
        for _ in range(2):
            images, found = quiet(config(f"folder:{folder}"))
            assert len(images.images) == 7
            assert len(found) == 1
            assert r"3.png (PermissionError: [Errno 13] Permission denied: '3.png')" in found[0]
    images, found = quiet(config(f"folder:{folder}"))
    assert len(images.images) == 8
    assert "can be read now" in found[0]


# --- Full disks ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_says_what_is_needed_and_what_is_free(folder, small_disk, monkeypatch):
    big = settings(f"folder:{folder}", small_disk, height=600, width=600)
    monkeypatch.setattr(cache, "decode", lambda *_: pytest.fail("decoded before there was room"))
    with pytest.raises(OSError, match=rf"need 2\.88 MB in {small_disk}, where 2\.10 MB are free") as caught:
        load(big)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("reserved", [True, False])
def test_a_disk_that_fills_meanwhile_ends_in_the_same_error(folder, small_disk, monkeypatch, reserved):
    """Without a reservation (some file systems have none) it is found while writing; with one, by the index."""
    if not reserved:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    whole = decode.decode

    def decode_and_fill(raw, config):
        with open(small_disk / "other", "ab", buffering=0) as other, suppress(OSError):
            while other.write(bytes(4096)):
                pass
        return whole(raw, config)

    monkeypatch.setattr(cache, "decode", decode_and_fill)
    with pytest.raises(OSError, match=r"need 1\.28 MB .* are free: make room"):
        load(settings(f"folder:{folder}", small_disk, height=400, width=400))
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_free_space_decides_where_the_disk_reserves_nothing(config, folder, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert len(load(config(f"folder:{folder}")).images) == 8
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    with pytest.raises(OSError, match=r"need 0\.00 MB .*, where 0\.00 MB are free"):
        load(config(f"folder:{folder}", height=17))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_limit_on_file_sizes_is_a_full_disk(config, folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"need 0\.00 MB in .* are free"):
            load(config(f"folder:{folder}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []


# --- Processes that die -------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from data_cases import settings
from sosvae import load
from sosvae.data import cache
whole = cache.decode
def slow(*arguments):
    print("decoding", flush=True)
    time.sleep(30)
    return whole(*arguments)
cache.decode = slow
load(settings(sys.argv[2], Path(sys.argv[3])))
"""


def test_remains_of_a_dead_process_are_cleared_and_those_of_a_live_one_are_not(config, folder, tmp_path):
    command = [sys.executable, "-c", SLOW, str(Path(__file__).parent), f"folder:{folder}", str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"decoding\n"
        (live,) = (tmp_path / "cache").iterdir()
        load(config(f"folder:{folder}"))
        assert live.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert live.is_dir()
    deadline = time.monotonic() + 10
    while live.is_dir() and time.monotonic() < deadline:  # the system drops a dead process's lock in its own time
        quiet(config(f"folder:{folder}", height=16 + int(time.monotonic() * 100) % 1000))
    assert not live.exists()
    assert not list((tmp_path / "cache").glob(".*"))
