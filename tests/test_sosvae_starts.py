"""Starts that fail block no name, and a checkpoint that cannot be saved leaves nothing half."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from sosvae_cases import before_step, killed, options, pictures, rows, set_training, small

from sosvae import Run, files, train
from sosvae.cli import main
from sosvae.training import loop


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    return small(pictures(root / "images"), root / "cache")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("whole"), progress=False)


def test_a_start_that_fails_blocks_no_name(config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for wrong in (
        config.replace(data={"source": "folder:/no/such"}),
        set_training(config, batch=40),
        set_training(config, device="nope"),
    ):
        with pytest.raises((OSError, ValueError)):
            train(wrong, folder, progress=False)
        assert not folder.exists()

    def large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", large)
        with pytest.raises(torch.OutOfMemoryError):
            train(set_training(config, batch=6, seed=3), folder, progress=False)
    assert Run(folder).steps() == [0]
    run = train(config, folder, progress=False)
    assert run.config == config
    assert rows(run)[0]["step"] == 1


def test_out_of_memory_is_one_line(config, tmp_path, monkeypatch, capsys):
    def large(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop, "train_step", large)
    assert main(["train", *options(config, tmp_path / "run")]) == 1
    assert "out of memory" in capsys.readouterr().err
    monkeypatch.setattr(loop, "train_step", lambda *args: [][0])
    with pytest.raises(IndexError):  # our own mistakes keep their traceback
        main(["train", *options(config, tmp_path / "run")])


def test_a_comparison_whose_start_failed_starts_anew(config, tmp_path, monkeypatch):
    with before_step(killed), pytest.raises(SystemExit):
        main(["compare", *options(config, tmp_path / "c"), "--training.seed=5"])
    assert Run(tmp_path / "c" / "beta-vae").steps() == [0]
    monkeypatch.setattr("sosvae.tools.figures.save_comparison", lambda *args: [])  # takes seconds
    assert main(["compare", *options(config, tmp_path / "c"), "--training.steps=1"]) == 0
    assert Run(tmp_path / "c" / "sos-vae").split == Run(tmp_path / "c" / "beta-vae").split
    Run(tmp_path / "c" / "sos-vae").write_config(Run(tmp_path / "c" / "beta-vae").config)
    monkeypatch.setattr(loop, "train_step", killed)  # the last is checked before the first goes on
    assert main(["compare", *options(config, tmp_path / "c"), "--training.steps=9"]) == 1


def test_work_is_never_started_over(config, tmp_path):
    run = train(set_training(config, steps=1, keep=1), tmp_path / "run", progress=False)
    for name in ("step_00000001", "step_00000001_best", "notes.txt"):
        newest = sorted(run.checkpoints.iterdir())[-1]
        newest.rename(run.checkpoints / name)
        with pytest.raises(FileExistsError, match="--resume"):
            train(config, run.folder, progress=False)


def test_what_is_no_run_is_left_alone(config, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(FileExistsError, match="file is a file, expected a folder"):
            train(config, tmp_path / name, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"editor": "vi"}')
    with pytest.raises(FileExistsError, match=r"something else than a run .*editor"):
        train(config, tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "config.json").read_text() == '{"editor": "vi"}'


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_known_at_once(config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        train(config, tmp_path / "run", progress=False)


def test_access_is_asked_for(config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        train(config, tmp_path / "run", progress=False)


# --- Saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 40_000, 1_000_000], ids=["weights", "state", "nothing"])
def test_a_full_disk_is_one_message_and_nothing_half(config, whole, tmp_path, size):
    """A limit on file sizes fails as a full disk does, in torch's writer, in safetensors' and in ours."""
    run = Run.create(tmp_path / "run", config)
    state = loop.State(config, torch.device("cpu"))
    state.load(whole.load().weights, whole.load().state)
    run.save(config, 0, state.model, state.state_dict())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        if size > 100_000:
            run.save(config, 4, state.model, state.state_dict())
        else:
            with pytest.raises(
                OSError, match=r"checkpoint of step 4 cannot be written to .*\(.*It takes about"
            ) as told:
                run.save(config, 4, state.model, state.state_dict())
            assert "\n" not in str(told.value)
            assert "are free; the last checkpoint is of step 0" in str(told.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["step_00000000"] + ["step_00000004"] * (size > 100_000)


def test_files_have_the_permissions_of_the_umask(config, tmp_path):
    mask = os.umask(0o027)
    try:
        run = train(set_training(config, steps=1), tmp_path / "run", progress=False)
    finally:
        os.umask(mask)
    for path in run.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_names_are_on_the_disk_before_and_after_they_count(config, tmp_path, monkeypatch):
    """Files before their folder, the folder before its name, the name before the older one goes."""
    done, sync, rename = [], os.fsync, os.rename

    def synced(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(source, target, **kwargs):
        done.append(f"{Path(source).name} → {Path(target).name}")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    train(set_training(config, steps=1, keep=1), tmp_path / "a" / "run", progress=False)
    assert done[:3] == [tmp_path.name, "a", "run"]  # the folders that were made
    written = [".writing_00000001", ".writing_00000001 → step_00000001", "checkpoints"]
    removed = ["step_00000000 → .removing_00000000", "checkpoints"]
    start = done.index("weights.safetensors", done.index(".writing_00000000 → step_00000000"))
    assert done[start : start + 6] == ["weights.safetensors", "state.pt", "checkpoint.json", *written]
    assert done[-2:] == removed


def test_folders_that_cannot_be_synced_do_without(tmp_path, monkeypatch):
    def invalid(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", invalid)
    files.sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Invalid"):
        files.sync(tmp_path / "file")
