"""What belongs to a folder: links, hidden and service folders, our own runs, names that are no UTF-8."""

import json
import os
import shutil

import pytest
from data_cases import quiet, settings, write

from sosvae import Config, load
from sosvae.config import to_dict
from sosvae.data import Split


@pytest.fixture
def root(tmp_path):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png", i)
    return tmp_path / "in"


def names(root, **options):
    images, found = quiet(settings(f"folder:{root}", root.parent / "cache"), **options)
    return images.names, found


def test_linked_folders_and_files_are_followed(root):
    for i in range(3):
        write(root.parent / "elsewhere" / "deep" / f"{i}.png", 10 + i)
    write(root.parent / "single.png", 20)
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "file.png").symlink_to(root.parent / "single.png")
    expected = ["0.png", "1.png", "2.png", "file.png", *(f"linked/deep/{i}.png" for i in range(3))]
    assert names(root) == (expected, [])


def test_links_in_a_circle_end_and_nothing_is_taken_twice(root):
    (root / "again").symlink_to(root)
    (root / "above").symlink_to(root.parent)
    (root / "everything").symlink_to("/")
    write(root / "sub" / "3.png", 3)
    (root / "a").symlink_to(root / "sub")  # earlier in the alphabet than what it leads to
    (root / "sub" / "up").symlink_to(root / "sub")
    (root / "copy.png").symlink_to(root / "0.png")
    os.link(root / "1.png", root / "sub" / "hard.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "self.png").symlink_to(root / "self.png")
    found, remarks = names(root)
    assert found == ["0.png", "1.png", "2.png", "sub/3.png"]
    assert len(remarks) == 1
    for part in ("5 folder (a second path to the same folder)", "2 .png (a second path to the same file)"):
        assert part in remarks[0]
    assert "2 .png (link to nothing)" in remarks[0]


def test_two_links_to_one_folder_are_one_folder(root):
    write(root.parent / "elsewhere" / "9.png", 9)
    for link in ("x", "y"):
        (root / link).symlink_to(root.parent / "elsewhere")
    assert names(root)[0] == ["0.png", "1.png", "2.png", "x/9.png"]


def test_hidden_and_service_folders_are_left_out_and_counted(root):
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git/objects", ".thumbnails", "@eaDir", "$RECYCLE.BIN"):
        shutil.copytree(root, root / folder, ignore=shutil.ignore_patterns("*.BIN", ".*", "_*", "@*"))
    write(root / "._0.png")
    (root / "Thumbs.db").write_bytes(b"")
    (root / "notes.TXT").write_text("")
    (root / "LICENSE").write_text("")
    (root / ".empty").mkdir()
    os.mkfifo(root / "pipe.png")
    assert names(root) == (
        ["0.png", "1.png", "2.png"],
        [
            f"folder:{root}: left out 19 .png (hidden or service), 1 without suffix (no image), 1 .db (no image), "
            "1 .txt (no image), 1 .png (no regular file)"
        ],
    )


def test_our_own_runs_and_caches_are_left_out(root):
    run = root / "runs" / "faces"
    write(run / "figures" / "samples.png")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(Config())))
    write(root / "damaged" / "figures" / "samples.png")
    (root / "damaged" / "checkpoints").mkdir()
    (root / "damaged" / "metrics.jsonl").write_text("")
    (root / "damaged" / "config.json").write_text('{"data"')
    write(root / "both" / "figures" / "sheet.png")
    (root / "both" / "comparison.json").write_text("{}")
    found, remarks = names(root)
    assert found == ["0.png", "1.png", "2.png"]
    assert "3 .png (our own run or cache)" in remarks[0]
    # A data set's own config.json, and a folder of figures, are no run.
    (run / "config.json").write_text("{}")
    shutil.rmtree(root / "damaged")
    shutil.rmtree(root / "both")
    assert names(root)[0] == ["0.png", "1.png", "2.png", "runs/faces/figures/samples.png"]
    # A run that was put into the folder of its images.
    for name in ("config.json", "checkpoints"):
        (run / name).rename(root / name)
    (root / "config.json").write_text(json.dumps(to_dict(Config())))
    write(root / "figures" / "samples.png")
    assert names(root)[0] == ["0.png", "1.png", "2.png", "runs/faces/figures/samples.png"]
    cached = settings(f"folder:{root}", root / "cache")
    quiet(cached)
    assert "2 .npy" not in quiet(cached)[1][0]


def test_a_folder_that_is_hidden_itself_can_be_named(root):
    hidden = root.rename(root.parent / ".hidden")
    assert names(hidden) == (["0.png", "1.png", "2.png"], [])


def test_without_images_it_says_what_is_there(root):
    for i in range(3):
        (root / f"{i}.png").rename(root / f"{i}.gif")
    (root / ".x").mkdir()
    with pytest.raises(ValueError, match=r"no images \(.*\); left out: 3 \.gif \(no image\)"):
        load(settings(f"folder:{root}", root.parent / "cache"))


def test_the_line_stays_short(root):
    for i in range(40):
        (root / f"x.kind-{i:02d}").write_text("")
    (root / f"long.{'y' * 200}\nz").write_text("")
    remark = names(root)[1][0]
    assert "29 of 29 other kinds" in remark
    assert "\n" not in remark
    assert len(remark) < 600


def test_names_need_not_be_utf8(root, tmp_path):
    for i in range(3):
        shutil.copy(root / f"{i}.png", os.fsencode(root) + b"/\xff\xe9%d.png" % i)
    os.makedirs(os.fsencode(root) + b"/\xfe")
    write(root / "sub" / "8.png", 8).rename(os.fsdecode(os.fsencode(root) + b"/\xfe/8.png"))
    with open(os.fsencode(root) + b"/br\xffoken\n.png", "wb"):
        pass
    found, remarks = names(root)
    assert len(found) == 7
    assert os.fsencode(found[-1]) == b"\xff\xe92.png"
    assert "br\\udcffoken\\n.png (UnidentifiedImageError" in remarks[0]
    remarks[0].encode()
    images, _ = quiet(settings(f"folder:{root}", root.parent / "cache"))
    assert images.names == found
    images.split.write(tmp_path / "split.json")
    assert Split.read(tmp_path / "split.json") == images.split
    assert quiet(settings(f"folder:{root}", root.parent / "cache"), split=images.split)[0].names == found


def test_the_folder_itself_need_not_be_utf8(root):
    odd = os.fsdecode(os.fsencode(root) + b"\xff")
    shutil.copytree(root, odd)
    (root.parent / "x").mkdir()
    images, found = quiet(settings(f"folder:{odd}", root.parent / "cache"))
    assert (len(images.images), found) == (3, [])
    with pytest.raises(FileNotFoundError, match=r"\\udcffx is not a folder") as caught:
        load(settings(f"folder:{odd}x", root.parent / "cache"))
    str(caught.value).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_counted(root):
    write(root / "closed" / "9.png")
    (root / "closed").chmod(0)
    (root / "2.png").chmod(0)
    try:
        found, remarks = names(root)
    finally:
        (root / "closed").chmod(0o700)
    assert found == ["0.png", "1.png"]
    assert "2.png (PermissionError" in remarks[0]
    assert "1 folder (cannot be read)" in remarks[0]
