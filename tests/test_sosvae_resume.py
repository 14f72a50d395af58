"""What a run keeps: which images are held out, and the last checkpoint that is good."""

import json
import math
import shutil

import pytest
import torch
from data_cases import write
from sosvae_cases import killed, pictures, rows, same, set_training, small

from sosvae import ChangedDataError, NonFiniteError, Run, Split, load, train
from sosvae.cli import main
from sosvae.training import loop


@pytest.fixture
def config(tmp_path):
    return small(pictures(tmp_path / "images"), tmp_path / "cache")


@pytest.fixture
def run(config, tmp_path):
    """Half of a run."""
    return train(set_training(config, steps=2), tmp_path / "run", progress=False)


def held_out(run):
    return {name for part, images in run.split.parts.items() if part != "train" for name in images}


# --- Data ---------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_split(config, run):
    images = load(config.data)
    assert run.split == images.split
    assert Split.read(run.folder / "split.json").digest == images.split.digest


def test_other_data_are_an_error_that_says_what_changed(config, run, tmp_path):
    before = run.split
    for i in range(9):
        write(tmp_path / "images" / f"new-{i}.png", 100 + i, size=(16, 16))
    (tmp_path / "images" / "00.png").unlink()
    with pytest.raises(ChangedDataError, match=r"9 new images \(.*\); 1 missing images \(00\.png\); --accept-data-ch"):
        train(config, run.folder, resume=True, progress=False)
    assert run.split == before
    assert run.config.training.steps == 2
    assert main(["train", "--resume", str(run.folder), "--quiet", "--training.steps=4"]) == 1
    assert main(["reconstruct", str(run.folder)]) == 1
    args = ["--resume", str(run.folder), "--quiet", "--training.steps=4", "--accept-data-changes"]
    with pytest.warns(UserWarning, match="9 new images"):
        assert main(["train", *args]) == 0
    assert held_out(run) & set(before.parts["train"]) == set()
    assert set(run.split.parts["train"]) & held_out(Run(run.folder)) == set()
    assert len(set(run.split.parts["train"]) | held_out(run)) == 16
    assert main(["reconstruct", str(run.folder)]) == 0  # what was accepted is the run's now


def test_the_same_images_under_another_path_are_accepted(config, run, tmp_path):
    shutil.move(tmp_path / "images", tmp_path / "moved")
    assert main(["reconstruct", str(run.folder)]) == 1
    assert main(["reconstruct", str(run.folder), "--source", f"folder:{tmp_path / 'moved'}"]) == 0
    moved = f"--data.source=folder:{tmp_path / 'moved'}"
    args = ["--resume", str(run.folder), "--quiet", "--training.steps=4", moved, "--data.validation=0.5"]
    assert main(["train", *args, f"--data.cache={tmp_path / 'other'}"]) == 0
    assert run.config.data.source == f"folder:{tmp_path / 'moved'}"
    images = load(config.replace(data={"source": run.config.data.source}).data)
    assert len(held_out(run)) == len(images.names) - len(images.train)
    assert main(["reconstruct", str(run.folder)]) == 0


def test_a_resume_that_fails_writes_nothing(config, run):
    for wrong in (
        config.replace(data={"source": "folder:/no/such"}),
        set_training(config, batch=4, device="nope"),
        set_training(config, steps=1),
    ):
        with pytest.raises((OSError, ValueError)):
            train(wrong, run.folder, resume=True, progress=False)
        assert run.config == set_training(config, steps=2)


def test_a_run_that_kept_no_split_goes_on_with_the_one_it_had(config, tmp_path):
    """As of version 0.1: no record, neither of the split nor of a checkpoint."""
    drawn = load(config.data, rule="drawn")
    assert drawn.split.parts != load(config.data).split.parts
    run = train(set_training(config, steps=2), tmp_path / "run", split=drawn.split, progress=False)
    (run.folder / "split.json").unlink()
    for record in run.checkpoints.glob("*/checkpoint.json"):
        record.unlink()
    assert run.split is None
    assert run.images().split == drawn.split
    train(config, run.folder, resume=True, progress=False)
    assert run.split == drawn.split
    write(tmp_path / "images" / "new.png", 77, size=(16, 16))
    with pytest.raises(ChangedDataError, match=r"1 new images \(new\.png\)"):
        train(config, run.folder, resume=True, progress=False)


def test_a_comparison_holds_out_the_same_images(config, tmp_path, monkeypatch):
    from sosvae.commands.compare import compare
    from sosvae.tools import figures

    for name in ("save_comparison", "save_reconstructions"):  # they take seconds
        monkeypatch.setattr(
            figures, name, lambda _, *rest, name=name, **how: [] if name == "save_comparison" else rest[1]
        )
    drawn = load(config.data, rule="drawn").split
    train(config, tmp_path / "c" / "sos-vae", split=drawn, progress=False)
    compare(config, tmp_path / "c", progress=False)
    assert Run(tmp_path / "c" / "beta-vae").split == drawn
    load(config.data).split.write(tmp_path / "c" / "beta-vae" / "split.json")
    with pytest.warns(UserWarning, match="the paper's recipe was trained on other images: .*in another part"):
        compare(config, tmp_path / "c", progress=False)


# --- Checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "keep"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_skipped_steps_remove_no_good_checkpoint(config, tmp_path, every, keep):
    """A step too large leaves finite weights that are worth nothing: nothing finite follows from them."""
    config = set_training(config, lr=1e30, save_every=every, keep=keep, steps=40, skip_limit=6, evaluate_every=3)
    with pytest.warns(UserWarning, match="null"), pytest.raises(NonFiniteError, match=r"of step 0, is kept.*--step"):
        train(config, tmp_path / "run", progress=False)
    run = Run(tmp_path / "run")
    assert run.steps()[0] == 0
    vae = run.model(0)
    p = vae.decode(torch.zeros(1, vae.latents))
    assert bool(torch.isfinite(p.log_prob(torch.zeros(1, 256))).all())
    with pytest.raises(NonFiniteError):
        train(config, run.folder, resume=True, progress=False)
    assert run.steps()[0] == 0


def test_a_stop_after_skipped_steps_removes_no_good_checkpoint(config, tmp_path, monkeypatch):
    """Nor does the end of training, if its evaluation is not finite."""
    config = set_training(config, save_every=1, keep=1, steps=6, skip_limit=9)
    original = loop.evaluate_terms

    def broken(vae, x, *args):
        terms, p = original(vae, x, *args)
        seen.append(1)
        return (terms._replace(kl=terms.kl * math.nan) if len(seen) > 3 else terms), p

    seen: list[int] = []
    monkeypatch.setattr(loop, "evaluate_terms", broken)
    with pytest.warns(UserWarning, match="validation kl: no finite number at step"):
        run = train(config, tmp_path / "run", progress=False)
    assert run.steps() == [2, 3, 4, 5, 6]  # the evaluation after step 2 is the last that was finite


def test_going_back_to_an_earlier_checkpoint(config, tmp_path):
    whole = train(set_training(config, keep=3), tmp_path / "run", progress=False)
    weights, metrics = whole.load().weights, rows(whole)
    args = ["train", "--resume", str(whole.folder), "--step", "2", "--quiet"]
    for name in ("step_00000004_aside", "step_00000004_aside1"):
        with pytest.warns(UserWarning, match=f"goes on from step 2; what was beyond is kept as {name}$"):
            assert main(args) == 0
    assert same(whole.load().weights, weights)
    assert rows(whole) == metrics
    assert main([*args[:4], "3", "--quiet"]) == 1
    for wrong in (["train", "--step", "2"], [*args, "--folder", "x"]):
        with pytest.raises(SystemExit):
            main(wrong)
    with pytest.raises(ValueError, match="step is 2, which only a run that is resumed has"):
        train(config, tmp_path / "other", step=2, progress=False)


def test_fewer_steps_than_there_are_is_an_error(config, run):
    with pytest.raises(ValueError, match=r"steps is 1, but .*run is at step 2: expected as many at least, or an earl"):
        train(set_training(config, steps=1), run.folder, resume=True, progress=False)


# --- Degenerate data ----------------------------------------------------------------------------------------


def metrics(run):
    """Rows, of a file that is JSON to the letter."""
    text = run.metrics.read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.mark.parametrize("kind", ["black", "copies"])
def test_data_that_do_not_vary_cost_no_work(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("sosvae.tools.figures.save_comparison", lambda *args: [])  # takes seconds
    for i in range(8):
        write(tmp_path / "images" / f"{i}.png", size=(16, 16))
        if kind == "black":
            from PIL import Image

            Image.new("L", (16, 16)).save(tmp_path / "images" / f"{i}.png")
    config = small(tmp_path / "images", tmp_path / "cache", tensorboard=True)
    with pytest.warns(UserWarning, match="validation deviation: no finite number at step 2: null") as told:
        run = train(config, tmp_path / "run")
    assert len(told) == 1
    assert run.load().step == 4
    evaluated = [row for row in metrics(run) if row["kind"] == "validation"]
    assert [row["deviation"] for row in evaluated] == [None, None]
    assert all(math.isfinite(row["log_prob"]) for row in evaluated)
    if kind == "copies":
        return
    from sosvae.commands.compare import compare

    with pytest.warns(UserWarning, match="null"), pytest.raises(ValueError, match=r"one value everywhere, 0 of 255"):
        compare(config, tmp_path / "c", progress=False)
    # Half the recipe's steps, all kept: the head that cannot be fitted costs no other work.
    assert Run(tmp_path / "c" / "beta-vae").load().step == 2


def test_an_evaluation_that_fails_costs_no_work(config, tmp_path, monkeypatch):
    def fails(*args):
        raise ZeroDivisionError("float division by zero")

    whole = train(config, tmp_path / "whole", progress=False)
    monkeypatch.setattr(loop, "evaluate", fails)
    with pytest.warns(UserWarning, match="evaluation: ZeroDivisionError: float division by zero; training") as told:
        run = train(config, tmp_path / "run", progress=False)
    assert len(told) == 1
    assert same(run.load().weights, whole.load().weights)


def test_a_checkpoint_is_saved_before_its_evaluation(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", killed)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "run", progress=False)
    assert Run(tmp_path / "run").load().step == 2
