"""Kills, signals and two at once: nothing is lost."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sosvae_cases import before_step, options, pictures, rows, same, set_training, signalled, small

from sosvae import InUseError, Run, load, train
from sosvae.cli import main
from sosvae.training import loop
from sosvae.training import run as run_module

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    return small(pictures(root / "images"), root / "cache")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("whole"), progress=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are forks that end")
def test_a_kill_at_any_file_operation_loses_nothing(tmp_path):
    command = [sys.executable, "-W", "ignore", HERE / "sosvae_kills.py", tmp_path]
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "kernels")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "new" in done.stdout
    assert "back" in done.stdout


# --- Signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_130(config, tmp_path, capsys, number):
    before = signal.getsignal(number)
    with before_step(signalled(number), 1):
        assert main(["train", *options(config, tmp_path / "run")]) == 130
    assert signal.getsignal(number) == before
    assert "stopped at step 2 and saved" in capsys.readouterr().out
    run = Run(tmp_path / "run")
    assert run.load().step == 2
    assert main(["train", "--resume", str(run.folder), "--quiet"]) == 0
    assert run.load().step == 4


def test_a_signal_in_an_evaluation_saves_too(config, whole, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return dict.fromkeys(loop.Terms._fields, 0.0)

    config = set_training(config, save_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        run = train(config, tmp_path / "run", progress=False)
    assert run.load().step == 2
    train(config, run.folder, resume=True, progress=False)
    assert same(run.load().weights, whole.load().weights)


def test_a_signal_at_the_last_step_leaves_nothing_to_do(config, whole, tmp_path, capsys):
    with before_step(signalled(signal.SIGINT), 3):
        run = train(config, tmp_path / "run", progress=False)
    assert "go on with" not in capsys.readouterr().out
    train(config, run.folder, resume=True, progress=False)  # the evaluation that the signal took is made up
    assert rows(run) == rows(whole)


def test_a_signal_that_is_ignored_stays_so(config, tmp_path):
    """As in a script's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with before_step(signalled(signal.SIGINT), 1):
            assert main(["train", *options(config, tmp_path / "run")]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "compare", "sample", "reconstruct", "fit"])
def test_a_signal_anywhere_ends_with_130(config, whole, tmp_path, monkeypatch, capsys, command, number):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(9)

    monkeypatch.setattr("sosvae.data.load", interrupted)
    monkeypatch.setattr("sosvae.training.run.VAE", interrupted)
    monkeypatch.setattr("sosvae.commands.fit.fit", interrupted)
    args = [str(whole.folder)] if command in ("sample", "reconstruct") else options(config, tmp_path / "x")
    assert main([command, *([] if command == "fit" else args)]) == 130
    assert capsys.readouterr().err == f"sosvae {command}: stopped\n"
    assert not (tmp_path / "x").exists()


def test_an_interrupt_that_a_library_turns_into_another_error(monkeypatch, capsys):
    def turned(args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(9)
        except KeyboardInterrupt:
            raise ImportError("numpy failed") from None

    monkeypatch.setattr("sosvae.cli._run", turned)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "sosvae fit: stopped\n"


@pytest.mark.parametrize("delay", [0.15, 0.8])
def test_ctrl_c_while_torch_is_imported(delay):
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, sosvae.cli\nprint('up', flush=True)\nsys.exit(sosvae.cli.main(['fit']))"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert (process.returncode, err) == (130, "sosvae fit: stopped\n")


# --- Two at once --------------------------------------------------------------------------------------------


def test_a_run_in_use_says_by_whom(config, tmp_path):
    """A second one changes nothing for the first."""
    errors = []

    def meanwhile():
        for resume in (True, False):
            with pytest.raises((InUseError, FileExistsError)) as caught:
                train(config, tmp_path / "run", resume=resume, progress=False)
            errors.append(str(caught.value))

    with before_step(meanwhile, 2):
        run = train(config, tmp_path / "run", progress=False)
    assert run.load().step == 4
    assert f"run is in use by process {os.getpid()} on " in errors[0]
    assert "holds a run already" in errors[1]
    assert not (run.folder / "lock").exists()
    train(config, run.folder, resume=True, progress=False)


def test_a_start_while_another_has_only_started(config, tmp_path):
    """Step 0 is no work, but the first one is at it."""

    def meanwhile():
        with pytest.raises(InUseError):
            train(config, tmp_path / "run", progress=False)

    with before_step(meanwhile, 0):
        assert train(config, tmp_path / "run", progress=False).load().step == 4


def test_a_dead_process_holds_no_lock(config, tmp_path):
    (tmp_path / "run").mkdir()
    code = f"""
import os, sys
sys.path[:0] = {[str(HERE.parent), str(HERE.parent / "kernels")]!r}
import importlib.util
from sosvae.training.lock import locked
from pathlib import Path
with locked(Path({str(tmp_path / "run" / "lock")!r})):
    print(os.getpid(), flush=True)
    os.read(0, 1)
    os._exit(9)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        pid = int(other.stdout.readline())
        with pytest.raises(InUseError, match=f"in use by process {pid} on "):
            train(config, tmp_path / "run", progress=False)
        other.communicate(b"x")
    assert (tmp_path / "run" / "lock").exists()
    assert train(config, tmp_path / "run", progress=False).load().step == 4
    assert not (tmp_path / "run" / "lock").exists()


def test_where_there_are_no_locks_it_does_without(config, tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert train(set_training(config, steps=1), tmp_path / "run", progress=False).load().step == 1


def test_a_checkpoint_that_goes_while_it_is_read(config, tmp_path, monkeypatch):
    run = train(set_training(config, keep=9), tmp_path / "run", progress=False)
    read = run_module.checkpoint.read

    def late(folder, *args):
        if folder.name.endswith("4") and folder.exists():
            folder.rename(folder.with_name(".removing_00000004"))
        return read(folder, *args)

    monkeypatch.setattr(run_module.checkpoint, "read", late)
    assert run.load().step == 2


def test_training_in_a_thread_leaves_signals_alone(config, tmp_path):
    status = []
    args = ["train", *options(config, tmp_path / "run"), "--training.steps=1"]
    worker = threading.Thread(target=lambda: status.append(main(args)))
    worker.start()
    worker.join()
    assert status == [0]


def test_paths_that_are_no_utf_8(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sosvae.tools.figures.save_comparison", lambda *args: [])  # takes seconds
    root = tmp_path / os.fsdecode(b"bilder-\xff")
    config = small(pictures(root / "images"), root / "cache")
    assert main(["train", *options(config, root / "run")]) == 0
    assert "checkpoint of step 4 of 4" in capsys.readouterr().out
    run = Run(root / "run")
    assert run.config.data.source == config.data.source
    assert load(run.config.data).names
    for command in (["train", "--resume"], ["reconstruct"], ["sample"]):
        assert main([*command, str(run.folder)]) == 0
    assert main(["compare", *options(config, root / "c"), "--training.steps=1"]) == 0
    assert main(["train", "--resume", str(root / "none")]) == 1
    assert "not the folder of a run" in capsys.readouterr().err
