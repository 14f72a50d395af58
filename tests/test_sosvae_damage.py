"""Damaged run folders: what is damaged is named, the newest whole checkpoint is taken, no code is executed."""

import json
import os
import pickle
import random
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from sosvae_cases import pictures, rows, same, small

from sosvae import DamagedError, Run, Split, train
from sosvae.training.checkpoint import step_of

MUTATIONS = 200
THROUGH_TRAINING = 10  # one in so many
KINDS = ["cut", "flip", "flip", "zeros", "noise", "empty", "longer", "other", "nested", "gone", "folder", "moved"]
KINDS += ["renamed", "lost"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # paths in the configuration are relative: no flipped bit leads out of here
        pictures(root / "images")
        train(small("images", "cache"), "run", progress=False)
        yield root


@pytest.fixture(scope="module")
def whole(root):
    """Step → checkpoint."""
    return {step: Run(root / "run").load(step) for step in (2, 4)}


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    shutil.copytree(root / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def last(run, name):
    return run.checkpoints / "step_00000004" / name


def change_state(run, **values):
    """Of the newest checkpoint, as version 0.1 wrote it: without a record."""
    last(run, "checkpoint.json").unlink(missing_ok=True)
    state = torch.load(last(run, "state.pt"), weights_only=True)
    torch.save(state | values, last(run, "state.pt"))


def mutate(rng, run) -> str:
    """Damages one file of a run or one of its folders; what was done."""
    files = sorted(path for path in run.folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    place = rng.randrange(len(raw))
    kind = rng.choice(KINDS)
    if kind == "cut":
        path.write_bytes(raw[:place])
    elif kind == "flip":
        raw[place] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
    elif kind in ("zeros", "noise"):
        more = rng.randrange(1, 64)
        raw[place : place + more] = bytes(more) if kind == "zeros" else rng.randbytes(more)
        path.write_bytes(raw)
    elif kind in ("empty", "longer"):
        path.write_bytes(raw + rng.randbytes(7) if kind == "longer" else b"")
    elif kind == "other":
        path.write_bytes(rng.choice(files).read_bytes())
    elif kind == "nested":
        path.write_bytes(b"[" * 100_000)
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind == "moved":
        path.rename(path.with_name(rng.choice(files).name + rng.choice(["", ".bak"])))
    else:
        path = run.checkpoints / rng.choice(["step_00000002", "step_00000004"])
        if kind == "lost":
            shutil.rmtree(path)
        else:
            path.rename(path.with_name(rng.choice(["step_00000003", "step_00000009", "step_00000004_best"])))
    return f"{kind} {path.relative_to(run.folder)}"


def opened(run, whole, message):
    """Reads all of a run; the error where there is one. What opens is what was written."""
    try:
        found = run.load()
        assert same(found.weights, whole[found.step].weights), message
        assert same(found.state, whole[found.step].state), message
        _ = run.split
    except (ValueError, OSError) as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore:.*is used instead")
def test_a_damaged_run_opens_right_or_names_what_is_damaged(root, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    for seed in range(MUTATIONS):
        shutil.copytree("run", tmp_path / str(seed))
        run = Run(tmp_path / str(seed))
        message = f"seed {seed}: {mutate(random.Random(seed), run)}"
        error = opened(run, whole, message)
        if error is None and seed % THROUGH_TRAINING == 0 and run.config.training.steps == 4:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(run.config, run.folder, resume=True, progress=False)
            assert run.load().step == 4, message
            assert run.metrics.is_dir() or all(row["step"] <= 4 for row in rows(run)), message
        if error is not None:
            assert "\n" not in str(error), message
            assert str(run.folder) in str(error), message
        shutil.rmtree(run.folder)


@pytest.mark.filterwarnings("ignore:.*is used instead")
def test_an_error_leaves_everything_where_it_was(run):
    (run.folder / "split.json").write_text("{")
    last(run, "state.pt").write_bytes(b"")
    before = {path: path.is_file() and path.read_bytes() for path in run.folder.rglob("*")}
    with pytest.raises(ValueError, match=r"split\.json .*--accept-data-changes"):
        train(run.config, run.folder, resume=True, progress=False)
    assert {path: path.is_file() and path.read_bytes() for path in run.folder.rglob("*")} == before


# --- Checkpoints --------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_gone_on_with(run, whole):
    weights = last(run, "weights.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    with pytest.warns(UserWarning, match=r"step_00000004/weights\.safetensors: .*digest.*step 2 is used instead"):
        assert run.model() is not None
    with (
        pytest.warns(UserWarning, match="step 2 is used instead"),
        pytest.warns(UserWarning, match="goes on from step 2; what was beyond is kept as step_00000004_aside"),
    ):
        train(run.config, run.folder, resume=True, progress=False)
    assert run.steps() == [2, 4]
    assert same(run.load().weights, whole[4].weights)
    assert same(run.load().state, whole[4].state)
    assert (run.checkpoints / "step_00000004_aside" / "weights.safetensors").read_bytes() == raw
    last(run, "weights.safetensors").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"weights\.safetensors"):
        run.load(4)


def test_where_no_checkpoint_is_whole_all_are_named(run):
    for step in (2, 4):
        (run.checkpoints / f"step_{step:08d}" / "state.pt").unlink()
    with pytest.raises(ValueError, match=r"step_00000004/state\.pt: is missing; .*step_00000002/state\.pt: is missing"):
        run.load()


def test_other_weights_than_the_configuration_has_are_named(run):
    last(run, "checkpoint.json").unlink()
    weights = safetensors.torch.load_file(last(run, "weights.safetensors"))
    for change, named in (
        (
            {"head.mean.bias": weights["head.mean.bias"].double()},
            r"head\.mean\.bias is float64 \[1\], expected float32",
        ),
        ({"head.mean.bias": torch.zeros(2)}, r"head\.mean\.bias is float32 \[2\], expected float32 \[1\]"),
        ({"more": torch.zeros(2)}, "other tensors than the network of config.json: more"),
    ):
        safetensors.torch.save_file(weights | change, last(run, "weights.safetensors"))
        with pytest.raises(DamagedError, match=named):
            run.load(4)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"step": 3}, "is of step 3, expected 4"),
        ({"skipped": -1}, "skipped is -1"),
        ({"multipliers": {}}, "multipliers"),
        ({"multipliers": {"kl": torch.zeros(2), "entropy": torch.zeros(())}}, r"multiplier of kl is float32 \[2\]"),
        ({"rng": torch.zeros(3)}, "rng is float32"),
        ({"rng_cuda": 3}, "rng_cuda"),
        ({"optimizer": {}}, "optimiser"),
        ({"optimizer": {"param_groups": [{"params": [0]}], "state": {}}}, "of 1 parameters"),
        ({"more": 1}, "no state of training"),
    ],
)
def test_other_states_than_the_configuration_has_are_named(run, values, named):
    change_state(run, **values)
    with pytest.raises(DamagedError, match=rf"step_00000004/state\.pt: .*{named}"):
        run.load(4)


def test_moments_of_another_type_are_named(run):
    optimizer = torch.load(last(run, "state.pt"), weights_only=True)["optimizer"]
    optimizer["state"][0]["exp_avg"] = optimizer["state"][0]["exp_avg"].bfloat16()
    change_state(run, optimizer=optimizer)
    with pytest.raises(DamagedError, match="exp_avg of parameter 0 is bfloat16"):
        run.load(4)


def test_a_checkpoint_of_0_1_has_no_record_and_is_read(run, whole):
    last(run, "checkpoint.json").unlink()
    assert same(run.load(4), whole[4])


def test_a_checkpoint_of_another_configuration_is_an_error(run):
    config = run.config
    run.write_config(config.replace(training={"lr": 0.5}))
    with pytest.raises(ValueError, match=r"step_00000004 was trained with .*config\.json.*training\.lr: 0\.01, 0\.5"):
        run.load()
    run.write_config(config.replace(training={"steps": 9, "device": "auto"}, data={"source": "folder:elsewhere"}))
    assert run.load().step == 4


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_code_in_a_checkpoint_is_not_executed(run, name):
    last(run, "checkpoint.json").unlink()
    for write in (pickle.dump, torch.save):
        with last(run, name).open("wb") as file:
            write(Hostile(), file)
        with pytest.raises(DamagedError, match=name):
            run.load(4)
    assert not os.path.exists("executed")


def test_a_network_alone_opens_no_pickle(run, monkeypatch):
    """Only who trains on needs the state of training."""
    last(run, "state.pt").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", lambda *args, **how: pytest.fail("a pickle was opened"))
    weights = safetensors.torch.load_file(last(run, "weights.safetensors"))
    assert all(torch.equal(weights[name], value) for name, value in run.model(4).state_dict().items())


def test_names_are_matched_exactly(run):
    assert step_of("step_00000004") == 4
    assert step_of("step_123456789") == 123456789
    for name in ("step_00000004_best", "step_4", "step_000000004", "step_", "step_0000000x", "xstep_00000004"):
        assert step_of(name) is None
        shutil.copytree(run.checkpoints / "step_00000002", run.checkpoints / name, dirs_exist_ok=True)
    assert run.steps() == [2, 4]
    assert train(run.config.replace(training={"steps": 6}), run.folder, resume=True, progress=False).steps() == [4, 6]
    assert (run.checkpoints / "step_00000004_best").is_dir()


def test_remains_of_a_kill_are_cleared(run):
    for name in (".removing_00000001", ".writing_00000005"):
        shutil.copytree(run.checkpoints / "step_00000002", run.checkpoints / name)
    for name in (".config.json.abcd", ".split.json.abcd", ".metrics.jsonl.abcd"):
        (run.folder / name).write_text("half")
    train(run.config, run.folder, resume=True, progress=False)
    assert not [path for path in run.folder.rglob("*") if path.name.startswith(".")]


# --- Configuration, metrics, split --------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000, '{"model": {"rank": Infinity}}', "\xff"])
def test_a_damaged_configuration_is_named(run, content):
    (run.folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        _ = run.config


def test_a_lost_split_is_noticed(run):
    (run.folder / "split.json").unlink()
    assert run.load().step == 4
    with pytest.raises(ValueError, match=r"split\.json: is missing"):
        run.images()
    train(run.config, run.folder, resume=True, accept_data_changes=True, progress=False)
    assert run.split == run.images().split


def test_a_torn_row_is_told_and_the_others_stay(run):
    before = rows(run)
    lines = run.metrics.read_text().splitlines()
    assert len(lines) == 6
    lines[2] = lines[2][:20]
    lines[4] = "\0" * 30
    run.metrics.write_text("\n".join([*lines, '{"step": 4, "ki']))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: left out 2 damaged rows \(lines 3, 5\)"):
        train(run.config, run.folder, resume=True, progress=False)
    assert rows(run) == [row for i, row in enumerate(before) if i not in (2, 4)]


def test_metrics_that_are_no_text_stop_nothing(run):
    before = rows(run)
    run.metrics.write_bytes(b"\xff\xfe\n" + run.metrics.read_bytes().replace(b'"kl": ', b'"nan": NaN, "kl": ', 1))
    with pytest.warns(UserWarning, match=r"left out 1 damaged rows \(lines 1\)"):
        train(run.config, run.folder, resume=True, progress=False)
    text = run.metrics.read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()][1:] == before[1:]


def test_an_evaluation_that_a_kill_took_is_made_up(run):
    before = rows(run)
    assert before[-1]["kind"] == "validation"
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in before[:-1]))
    train(run.config, run.folder, resume=True, progress=False)
    assert rows(run) == before


def test_split_of_a_run_is_kept(run):
    assert Split.read(run.folder / "split.json") == run.images().split
