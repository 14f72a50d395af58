"""Which images are held out: stable when others come and go, and kept with a run."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from data_cases import quiet, settings, write

from sosvae import data
from sosvae.data import ChangedDataError, Split, compare, load
from sosvae.data.split import divide, with_test


@pytest.fixture
def root(tmp_path):
    for i in range(12):
        write(tmp_path / "in" / f"{i:02d}.png", i)
    return tmp_path / "in"


@pytest.fixture
def config(tmp_path):
    return lambda path, **values: settings(f"folder:{path}", tmp_path / "cache", **values)


def parts(images) -> dict[str, str]:
    return {images.names[i]: part for part, indices in images.indices.items() for i in indices}


def test_adding_and_removing_files_moves_no_other(config, root):
    before = parts(load(config(root, validation=0.5)))
    assert set(before.values()) == {"train", "validation", "test"}
    for i in range(40):
        write(root / f"new-{i}.png", 20 + i)
    (root / "03.png").unlink()
    after = parts(load(config(root, validation=0.5)))
    assert {name: part for name, part in after.items() if name in before} == {
        name: part for name, part in before.items() if name != "03.png"
    }


def test_hashed_groups_are_stable_whole_and_about_the_fraction():
    groups = [f"person-{i // 3}" for i in range(30_000)]
    found = dict(zip(groups, divide(groups, "hashed", 0.1), strict=True))
    count = Counter(found.values())
    assert abs(count["validation"] - 1000) < 5 * np.sqrt(1000 * 0.9)  # binomial
    some = groups[3000:9000]
    assert all(found[group] == part for group, part in zip(some, divide(some, "hashed", 0.1), strict=True))
    for i, part in enumerate(divide(groups, "hashed", 0.1)):
        assert found[groups[i]] == part


def test_a_larger_fraction_only_adds_to_the_held_out():
    groups = [str(i) for i in range(500)]
    small, large = divide(groups, "hashed", 0.1), divide(groups, "hashed", 0.3)
    assert all(b == "validation" for a, b in zip(small, large, strict=True) if a == "validation")


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_there_is_a_group_on_each_side(count, fraction):
    for seed in range(50):
        groups = [f"{seed}-{i}" for i in range(count)]
        assert set(divide(groups, "hashed", fraction)) == {"train", "validation"}


def test_the_split_is_known():
    """It is the same on every machine and in every version, or old runs and new ones hold out other images."""
    letters = list("abcdefghij")
    assert [x for x, part in zip(letters, divide(letters, "hashed", 0.3), strict=True) if part == "validation"] == list(
        "acefhj"
    )


def test_faces_are_held_out_as_before_splits_were_kept(config, tmp_path):
    faces = load(settings("faces", tmp_path / "cache", height=48, width=40, validation=0.1))
    assert faces.split.rule == "drawn"
    held_out = {faces.names[i].split("/")[0] for part in ("validation", "test") for i in faces.indices[part]}
    assert sorted(held_out) == ["s13", "s2", "s31", "s34"]


def test_a_run_before_splits_were_kept_goes_on_with_its_own(config, root):
    names = sorted(path.name for path in root.iterdir())
    held_out = set(np.random.default_rng(0).permutation(np.array(names, dtype=object))[:3])
    images = load(config(root), rule="drawn")
    assert {images.names[i] for i in images.validation} == held_out
    assert list(images.indices) == ["train", "validation"]
    assert load(config(root), split=images.split).split == images.split


# --- Three parts --------------------------------------------------------------------------------------------


def test_half_of_the_groups_held_out_are_for_the_test_and_none_of_the_others():
    groups = [f"person-{i // 3}" for i in range(30_000)]
    before = divide(groups, "hashed", 0.1)
    after = with_test(groups, before, "hashed")
    assert [part == "train" for part in after] == [part == "train" for part in before]
    found = dict(zip(groups, after, strict=True))
    assert all(found[group] == part for group, part in zip(groups, after, strict=True))  # whole groups
    count = Counter(found.values())
    held_out = count["test"] + count["validation"]
    assert abs(count["test"] - held_out / 2) < 5 * np.sqrt(held_out / 4)  # binomial
    some = groups[3000:9000]
    assert all(
        found[group] == part
        for group, part in zip(some, with_test(some, divide(some, "hashed", 0.1), "hashed"), strict=True)
    )


@pytest.mark.parametrize("rule", ["hashed", "drawn", "published"])
def test_there_is_a_group_to_choose_on_and_one_to_report(rule):
    for seed in range(50):
        for count in (2, 3, 7):
            groups = [f"{seed}-{i}" for i in range(count)]
            assert set(with_test(groups, ["validation"] * count, rule)) == {"validation", "test"}
    assert with_test(["a", "b"], ["train", "validation"], rule) == ["train", "validation"]
    assert with_test(["a", "b", "c"], ["test", "validation", "validation"], rule) == [
        "test",
        "validation",
        "validation",
    ]


def test_what_is_for_the_test_is_known():
    letters = list("abcdefghij")
    found = with_test(letters, ["validation"] * 10, "hashed")
    assert [x for x, part in zip(letters, found, strict=True) if part == "test"] == list("bcdehij")


def test_a_record_of_two_parts_stays_one_and_gets_a_test_where_that_is_asked_for(config, root):
    kept = load(config(root, validation=0.5), rule="drawn").split
    assert list(kept.parts) == ["train", "validation"]
    assert load(config(root), split=kept).split == kept
    tested = load(config(root), split=kept, test=True)
    assert set(tested.split.parts["train"]) == set(kept.parts["train"])
    assert set(tested.split.parts["validation"]) | set(tested.split.parts["test"]) == set(kept.parts["validation"])
    assert len(tested.indices["test"]) == 3
    assert load(config(root), split=tested.split).split == tested.split
    with pytest.raises(ChangedDataError):
        load(config(root), split=Split(kept.rule, kept.decoding, {"train": kept.parts["train"]}), test=True)


# --- The record ---------------------------------------------------------------------------------------------


def test_a_split_is_kept_and_read_again(config, root, tmp_path):
    images = load(config(root))
    images.split.write(tmp_path / "run" / "split.json")
    kept = Split.read(tmp_path / "run" / "split.json")
    assert kept == images.split
    assert kept.digest == images.split.digest
    again = load(config(root), split=kept)
    assert np.array_equal(again.train, images.train)
    assert compare(kept, again.split) == []


def test_the_same_images_under_another_path_or_size_are_the_same_data(config, root, tmp_path):
    images = load(config(root))
    shutil.copytree(root, tmp_path / "elsewhere")
    for moved in (config(tmp_path / "elsewhere"), config(tmp_path / "elsewhere", height=16, validation=0.5)):
        again = load(moved, split=images.split)
        assert again.split == images.split
        assert np.array_equal(again.train, images.train)


def test_other_data_are_an_error_that_says_what_changed(config, root):
    kept = load(config(root)).split
    write(root / "new.png", 99)
    (root / "03.png").unlink()
    write(root / "05.png", 77)
    with pytest.raises(ChangedDataError) as caught:
        load(config(root), split=kept)
    assert caught.value.changes == [
        "1 new images (new.png)",
        "1 missing images (03.png)",
        "1 changed images (05.png)",
    ]
    assert f"folder:{root} is not the data that this was trained on: 1 new images (new.png); " in str(caught.value)


def test_accepting_changed_data_keeps_trained_images_in_training(config, root):
    kept = load(config(root), rule="drawn").split
    before = {name: part for part, images in kept.parts.items() for name in images}
    for i in range(30):
        write(root / f"new-{i}.png", 20 + i)
    (root / "03.png").unlink()
    images, found = quiet(config(root), split=kept, accept_changes=True)
    after = parts(images)
    assert all(after[name] == part for name, part in before.items() if name != "03.png")
    assert {after[f"new-{i}.png"] for i in range(30)} == {"train", "validation"}  # the parts that there were
    assert found == [
        f"folder:{root}: 30 new images (new-0.png, new-1.png, new-10.png, new-11.png, new-12.png, …); "
        "1 missing images (03.png)"
    ]
    assert compare(images.split, load(config(root), split=images.split).split) == []


def test_new_images_of_a_known_person_follow_the_person(tmp_path):
    brain = settings(f"brain:{tmp_path / 'brain'}", tmp_path / "cache")
    for person in "abcdefgh":
        for i in range(2):
            write(tmp_path / "brain" / f"{person}_{i}.png", ord(person) + i)
    kept = load(brain, rule="drawn").split
    for person in "abcdefgh":
        write(tmp_path / "brain" / f"{person}_2.png", ord(person) + 9)
    images, _ = quiet(brain, split=kept, accept_changes=True)
    people = [name for indices in images.indices.values() for name in {images.names[i][0] for i in indices}]
    assert sorted(people) == list("abcdefgh")


def test_data_without_a_validation_part_are_an_error(config, root):
    kept = load(config(root)).split
    for name in kept.parts["validation"]:
        (root / name).unlink()
    with pytest.raises(ValueError, match="no image for validation"):
        load(config(root), split=kept, accept_changes=True)


def test_other_decoding_is_other_data(config, root):
    split = load(config(root)).split
    former = Split(split.rule, split.decoding - 1, split.parts)
    assert compare(former, split) == ["files are decoded by other rules (version 1, now 2)"]
    with pytest.raises(ChangedDataError, match="decoded by other rules"):
        load(config(root), split=former)


def test_more_parts_than_three_are_kept(config, root):
    split = load(config(root)).split
    train = dict(split.parts["train"])
    more = {name: train.pop(name) for name in sorted(train)[:2]}
    images = load(config(root), split=Split("hashed", split.decoding, split.parts | {"train": train, "more": more}))
    assert sorted(images.indices) == ["more", "test", "train", "validation"]
    assert images.first("more", 5).shape == (2, 1, 18, 20)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"rule": "hashed"}', "[" * 100_000, '{"rule": 1, "decoding": 2, "parts": 3}']
)
def test_a_damaged_record_names_its_file(tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match=r"split\.json is (not the record of a split|damaged)"):
        Split.read(tmp_path / "split.json")


def test_a_changed_record_is_noticed(config, root, tmp_path):
    load(config(root)).split.write(tmp_path / "split.json")
    values = json.loads((tmp_path / "split.json").read_text())
    values["parts"]["train"]["more.png"] = "0" * 16
    (tmp_path / "split.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="damaged"):
        data.Split.read(tmp_path / "split.json")
    with pytest.raises(FileNotFoundError):
        data.Split.read(tmp_path / "no.json")
