"""Ends tiny runs at every file operation: `python sosvae_kills.py FOLDER`, which `test_sosvae_kills` calls.

An attempt is a fork that ends by `os._exit` before its k-th operation: of a new run, and of one that goes back to an
earlier checkpoint. The next fork does what a user would do, and has to leave what a run without a kill leaves, to the
last bit, and nothing besides.
"""

import builtins
import gc
import io
import os
import shutil
import sys
from pathlib import Path

import torch
from sosvae_cases import pictures, same, small

from sosvae import Run, train
from sosvae.training import loop

# Without fsync: to a process that is killed before one nothing else happens than before the operation after it.
OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "chmod", "ftruncate", "write")


def end_at(last: int | None) -> list[str]:
    """Ends this process before that operation; the operations so far."""
    done: list[str] = []

    def counted(function, name, changes=lambda *_, **__: True):
        def call(*args, **kwargs):
            if changes(*args, **kwargs):
                done.append(name)
                if len(done) == last:
                    os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name), name))
    os.open = counted(os.open, "open", lambda path, flags, *_, **__: flags & os.O_CREAT)
    io.open = builtins.open = counted(io.open, "open", lambda file, mode="r", *_, **__: set(mode) & set("wax"))
    torch.save = counted(torch.save, "save")
    return done


def forked(work) -> int:
    """Does `work` in a fork; its exit status."""
    child = os.fork()
    if not child:
        try:
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 1
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempts(root: Path, config, back: bool) -> int:
    """Kills at each operation in turn, and the next attempt after each; how many there were."""
    if back:
        assert forked(lambda: train(config.replace(training={"keep": 3}), root / "begun", progress=False)) == 0

    def begin(name):
        if back:
            shutil.copytree(root / "begun", root / name)

    def work(name):
        run = Run(root / name)
        if back and run.steps() == [0, 1, 2] and not list(run.checkpoints.glob("*_aside*")):
            train(config, run.folder, resume=True, step=1, progress=False)
        else:
            train(config, run.folder, resume=run.has_work(), progress=False)

    def counted():
        begin("whole")
        done = end_at(None)
        work("whole")
        (root / "operations").write_text("\n".join(done))

    def killed(k):
        begin(str(k))
        end_at(k)
        work(str(k))

    assert forked(counted) == 0
    whole = Run(root / "whole")
    operations = (root / "operations").read_text().splitlines()
    total = operations.index("save") if back else len(operations)  # from there on all is as in a new run
    for k in range(1, total + 1):
        assert forked(lambda k=k: killed(k)) == 9, k
        assert forked(lambda k=k: work(str(k))) == 0, k
        run = Run(root / str(k))
        assert run.steps() == [config.training.steps], (k, run.steps())
        (last,) = run.checkpoints.iterdir() if not back else run.checkpoints.glob("step_00000002")
        last = last.relative_to(run.folder)
        for name in (last / "weights.safetensors", "metrics.jsonl", "split.json", "config.json"):
            assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), (k, name)
        assert same(*(torch.load(each.folder / last / "state.pt", weights_only=True) for each in (run, whole))), k
        left = [path.name for path in run.folder.rglob("*") if path.name.startswith(".") or path.name == "lock"]
        assert not left, (k, left)
    return total


def main(root: Path) -> None:
    loop.evaluate = lambda *_: dict.fromkeys(loop.Terms._fields, 0.0)  # what it costs is no file operation
    os.fsync = lambda handle: None  # a kill is no power loss
    config = small(pictures(root / "images"), root / "cache", steps=2, save_every=1, keep=1)
    for resume in (False, True):  # decodes, imports and finds a folder for temporary files, so that no fork has to
        train(config.replace(training={"steps": 1 + resume}), root / "before", resume=resume, progress=False)
    gc.freeze()  # or every fork copies all of its pages
    gc.disable()
    for name in ("new", "back"):
        (root / name).mkdir()
        steps = {"steps": 1 if name == "new" else 2}
        print(name, attempts(root / name, config.replace(training=steps), back=name == "back"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
