"""One bad file stops nothing: it is named and skipped, whatever its decoder raises."""

import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_cases import COLOUR, GREY, RAMP, TRANSPARENT, H, W, saved
from PIL import Image

from sosvae import DataConfig, load
from sosvae.data import cache, decode


def test_a_decompression_bomb_is_named_and_skipped(tmp_path):
    rows = zlib.compress(bytes(14_000 * 1751), 9)
    head = struct.pack(">IIBBBBB", 14_000, 14_000, 1, 0, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    for i in range(3):
        Image.fromarray(RAMP + np.uint8(i)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match=r"skipped 1 of 4 .*bomb\.png \(DecompressionBombError"):
        assert len(load(DataConfig(source=f"folder:{tmp_path}", cache=str(tmp_path / ".cache"))).images) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError("no"),
        SyntaxError("no"),
        ValueError("no"),
        struct.error("no"),
        MemoryError(),
        RecursionError("no"),
        KeyError("no"),
        TypeError("no"),
        OverflowError("no"),
        zlib.error("no"),
        Image.DecompressionBombError("no"),
        Image.DecompressionBombWarning("no"),
        UserWarning("no"),
        AssertionError(),
        RuntimeError("<_io.BytesIO object at 0x7fff1234abcd> no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    for i in range(4):
        Image.fromarray(RAMP + np.uint8(i)).save(tmp_path / f"{i}.png")
    whole = decode.decode

    def broken(raw, config):
        if raw == (tmp_path / "1.png").read_bytes():
            raise error
        return whole(raw, config)

    monkeypatch.setattr(cache, "decode", broken)
    with pytest.warns(UserWarning, match=rf"1\.png \({type(error).__name__}(: '?no'?)?\)$"):
        images = load(DataConfig(source=f"folder:{tmp_path}", height=H, width=W, cache=str(tmp_path / ".cache")))
    assert images.names == ["0.png", "2.png", "3.png"]


def test_impossible_shapes_and_unreadable_files_are_named_and_skipped(tmp_path):
    for i in range(3):
        Image.fromarray(RAMP + np.uint8(i)).save(tmp_path / f"{i}.png")
    Image.new("L", (30_000, 1), 9).save(tmp_path / "line.png")  # padded to nothing high
    (tmp_path / "empty.jpg").write_bytes(b"")
    settings = DataConfig(source=f"folder:{tmp_path}", height=H, width=W, fit="pad", cache=str(tmp_path / ".cache"))
    with pytest.warns(UserWarning, match=r"empty\.jpg") as found:
        images = load(settings)
    assert len(images.images) >= 3
    assert "0x" not in str(found[0].message)


def mutated(seed: int, originals: list[bytes]) -> bytes:
    """One of the files with bytes changed, cut, inserted, or two files put together."""
    random = np.random.default_rng(seed)
    raw = bytearray(originals[seed % len(originals)])
    for _ in range(int(random.integers(1, 6))):
        place = int(random.integers(0, min(len(raw), 200) if random.random() < 0.7 else len(raw)))
        match int(random.integers(0, 5)):
            case 0:
                raw[place] = int(random.integers(0, 256))
            case 1:
                raw[place] ^= 1 << int(random.integers(0, 8))
            case 2:
                raw[place : place + 4] = random.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0"])
            case 3:
                del raw[max(place, 12) :]
            case 4:
                other = originals[int(random.integers(0, len(originals)))]
                raw[place:] = other[min(place, len(other)) :]
        raw = raw or bytearray(b"\0")
    return bytes(raw)


def test_mutated_files_stop_nothing(tmp_path):
    """Some hundred broken files in one folder: each is decoded or named, without addresses or warnings of Pillow's."""
    originals = [case[0] for case in GREY.values()] + [case[0] for case in TRANSPARENT.values()]
    exif = Image.Exif()
    exif[274] = 6
    originals += [saved(Image.fromarray(COLOUR), form, exif=exif) for form in ("JPEG", "PNG", "WEBP", "TIFF")]
    count = 600
    for seed in range(count):
        (tmp_path / f"{seed:03d}.png").write_bytes(mutated(seed, originals))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        images = load(DataConfig(source=f"folder:{tmp_path}", height=H, width=W, cache=str(tmp_path / ".cache")))
    assert len(images.images) + len(images.skipped) == count
    assert min(len(images.images), len(images.skipped)) > count // 10
    assert len(found) == 1
    assert not re.search(r"0x[0-9a-f]{6}", " ".join(images.skipped))
    assert not any("\n" in line for line in images.skipped)
    assert sorted([*images.names, *(line.split(" ")[0] for line in images.skipped)]) == sorted(
        path.name for path in Path(tmp_path).glob("*.png")
    )
