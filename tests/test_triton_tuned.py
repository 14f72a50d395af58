"""Launches that were measured: the files they are read from, and which launch is chosen. No kernel runs here."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench import tune
from lowrank_mvn.device import launch, tuned
from lowrank_mvn.device.launch import Block
from lowrank_mvn.factors.dense.triton import backward, capacitance, residual
from lowrank_mvn.factors.linear.triton import backward as linear_backward
from lowrank_mvn.factors.linear.triton import moments as linear_moments
from lowrank_mvn.factors.linear.triton import residual as linear_residual
from lowrank_mvn.factors.linear.triton import sampling as linear_sampling

ROOT = Path(__file__).parent.parent
NAME = "Some GPU (40 GB)"
FILE = "some-gpu-40-gb.json"
KEY = ("residual", 32, True)
ITEM = {"kernel": "residual", "block_r": 32, "by_column": True, "num_warps": 2, "columns": 64, "num_stages": 3}


def stored(folder, *items, **changes):
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(json.dumps({"format": tuned.FORMAT, "device": NAME, "blocks": items} | changes))


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU that is not there, whose files lie in two folders."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.entries.cache_clear()
    launch.target.cache_clear()
    yield torch.device("cuda", 0)
    tuned.entries.cache_clear()
    launch.target.cache_clear()


# --- Which launch is chosen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(70, "sm_75"), (75, "sm_75"), (80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (103, "sm_100"), (120, "sm_80")],
)
def test_target(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    assert launch.target(device) == expected
    half = torch.empty(0, dtype=torch.float16)
    assert launch.products(half) == "tf32"  # the interpreter computes as sm_90 does
    assert launch.target(torch.device("cpu")) == "sm_90"


def test_target_of_amd(monkeypatch, device):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.target(device) == "gfx"
    assert launch.of_matrices("float64", device) == "outer"


def test_measured_comes_before_the_target_and_that_before_the_rest(monkeypatch, device, tmp_path):
    table = {(32, True): Block(1, 32), (32, False): Block(1, 16), (32, True, "sm_80"): Block(4, 64)}
    assert launch.block("residual", table, 32, True, device) == Block(1, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    launch.target.cache_clear()
    assert launch.block("residual", table, 32, True, device) == Block(4, 64)
    assert launch.block("residual", table, 32, False, device) == Block(1, 16)
    path = tune.write(tuned.users_folder(), NAME, {KEY: Block(2, 128, 2)})
    assert path == tmp_path / "lowrank_mvn" / FILE
    assert launch.block("residual", table, 32, True, device) == Block(2, 128, 2)
    assert launch.block("backward", table, 32, True, device) == Block(4, 64)
    assert launch.block("residual", table, 32, True, torch.device("cpu")) == Block(1, 32)


@pytest.mark.parametrize(
    "table",
    [
        capacitance.BLOCKS,
        residual.BLOCKS,
        backward.SPARING_BLOCKS,
        linear_moments.BLOCKS,
        linear_backward.BLOCKS,
        linear_backward.PIXEL_BLOCKS,
        linear_residual.BLOCKS,
        linear_residual.SAMPLES_BLOCKS,
        linear_residual.SPARING_BLOCKS,
        linear_sampling.BLOCKS,
        linear_sampling.SPARING_BLOCKS,
    ],
)
def test_tables_have_every_padded_rank_and_layout(table):
    assert {(R, by_column) for R in (16, 32, 64, 128) for by_column in (True, False)} <= set(table)
    assert {key[2] for key in table if len(key) == 3} <= {"sm_75", "sm_80", "sm_100", "gfx"}


def test_tables_for_tiles_of_the_rank(monkeypatch, device):
    table = backward.TILED_BLOCKS
    assert {True, False} <= set(table)
    assert {key[1] for key in table if isinstance(key, tuple)} <= {"sm_75", "sm_80", "sm_100", "gfx"}
    assert launch.tiled_block(table, False, device) == table[False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    launch.target.cache_clear()
    assert launch.tiled_block(table, False, device) == table[False, "sm_80"]


# --- How kernels are written ----------------------------------------------------------------------------------------


def launched_kernels():
    """Every function that is started on a device."""
    for module in map(importlib.import_module, MODULES):
        for name, found in vars(module).items():
            if name.endswith("_kernel") and found.fn.__module__ == module.__name__:
                yield pytest.param(found.fn, id=name)


ROOM = "lowrank_mvn.factors"
MODULES = [
    *(f"lowrank_mvn.device.{name}" for name in ("again", "solve")),
    *(f"{ROOM}.dense.triton.{name}" for name in ("capacitance", "residual", "backward", "sampling")),
    *(f"{ROOM}.linear.triton.{name}" for name in ("moments", "residual", "backward", "sampling", "product")),
    *(f"lowrank_mvn.local.stencil.triton.{name}" for name in ("product", "backward", "solve")),
]


@pytest.mark.parametrize("function", [*launched_kernels()])
def test_a_kernel_can_be_read(function):
    """At most 20 arguments, and the maths in its docstring."""
    assert function.__doc__
    assert len(inspect.signature(function).parameters) <= 20


def test_every_kernel_is_among_them():
    package = ROOT / "kernels" / "lowrank_mvn"
    written = [
        name for path in package.rglob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    ]
    assert sorted(parameter.id for parameter in launched_kernels()) == sorted(written)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_the_users_entries_come_before_those_of_the_package(device, tmp_path):
    stored(tmp_path / "shipped", ITEM, ITEM | {"by_column": False})
    stored(tmp_path / "lowrank_mvn", ITEM | {"num_warps": 4})
    assert tuned.entries(device) == {KEY: (4, 64, 3), ("residual", 32, False): (2, 64, 3)}


def test_a_file_is_read_once_and_when_it_is_needed(monkeypatch, device, tmp_path):
    calls = []
    read = tuned.read
    monkeypatch.setattr(tuned, "read", lambda *args: calls.append(args) or read(*args))
    for _ in range(3):
        tuned.entries(device)
        tuned.entries(torch.device("cpu"))
    assert len(calls) == 2  # one for each folder


def test_importing_the_kernels_reads_no_file():
    code = """
import builtins, io, sys
from pathlib import Path
import torch, triton, numpy
opened = io.open
def caught(file, *args, **kwargs):
    assert not str(file).endswith(".json"), file
    return opened(file, *args, **kwargs)
builtins.open = io.open = caught
import lowrank_mvn.factors.dense.triton, lowrank_mvn.factors.linear.triton
from lowrank_mvn.device import tuned
assert tuned.entries.cache_info().currsize == 0
try:
    Path("x.json").open()
except AssertionError:
    print("would have been seen")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout == "would have been seen\n", done.stderr


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a table"),
        (b'{"format": 1, "device": "So', "not a table"),
        (b"\xff\xfe\x00", "not a table"),
        (b"[" * 100_000, "not a table"),
        (b"[]", "format 1"),
        (b'{"format": 2, "device": "Some GPU (40 GB)", "blocks": []}', "format 1"),
        (b'{"format": 1, "device": "Some GPU (40 GB)", "blocks": {}}', "format 1"),
        (b'{"format": 1, "device": "Some GPU 40 GB", "blocks": []}', r"not written for Some GPU \(40 GB\)"),
        (b" " * (tuned.LARGEST + 1), "more than 1048576 bytes"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_once(device, tmp_path, content, reason):
    path = tmp_path / "lowrank_mvn" / FILE
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{FILE} ignored, .*{reason}") as caught:
        assert tuned.entries(device) == {}
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        assert tuned.entries(device) == {}


def test_a_file_that_cannot_be_opened(device, tmp_path):
    (tmp_path / "lowrank_mvn" / FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuned.entries(device) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"num_warps": 3},
        {"num_warps": 32},
        {"num_warps": True},
        {"num_warps": "2"},
        {"num_warps": 2.0},
        {"columns": 8},
        {"columns": 48},
        {"columns": 2048},
        {"columns": None},
        {"num_stages": 0},
        {"num_stages": 5},
        {"block_r": 8},
        {"by_column": 1},
        {"kernel": ["residual"]},
    ],
    ids=str,
)
def test_an_entry_out_of_range_is_refused_and_the_others_are_taken(device, tmp_path, change):
    stored(tmp_path / "lowrank_mvn", ITEM, ITEM | {"by_column": False} | change)
    with pytest.warns(UserWarning, match=f"1 of 2 entries of .*{FILE} ignored, entry 1: {next(iter(change))}"):
        assert tuned.entries(device) == {KEY: (2, 64, 3)}
    stored(tmp_path / "lowrank_mvn", "abc")
    tuned.entries.cache_clear()
    with pytest.warns(UserWarning, match="entry 0: it is not an object"):
        assert tuned.entries(device) == {}


def test_writing_adds_replaces_and_forgets(tmp_path, monkeypatch):
    folder, other = tmp_path / "a" / "b", ("backward", 64, False)
    tune.write(folder, NAME, {KEY: Block(1, 16), other: Block(8, 1024, 4)})
    tune.write(folder, NAME, {KEY: Block(2, 32)})
    assert tuned.read(folder, NAME) == {KEY: (2, 32, 1), other: (8, 1024, 4)}
    tune.write(folder, NAME, {other: None, ("sample", 16, True): None})
    assert tuned.read(folder, NAME) == {KEY: (2, 32, 1)}
    with pytest.raises(ValueError, match="num_warps is 3"):
        tune.write(folder, NAME, {KEY: Block(3, 32)})

    def fails(*_):
        raise OSError("disk")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk"):
            tune.write(folder, NAME, {KEY: Block(4, 32)})
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert tuned.read(folder, NAME) == {KEY: (2, 32, 1)}
    tune.write(tmp_path, NAME, {})
    assert tuned.read(tmp_path, NAME) == {}


def test_where_the_users_files_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.users_folder() == tmp_path / ".cache" / "lowrank_mvn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.users_folder() == tmp_path / ".cache" / "lowrank_mvn"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuned.users_folder() is None
    assert tuned.read(None, NAME) == {}


# --- The sweep ------------------------------------------------------------------------------------------------------


def test_candidates_fill_the_lanes():
    for block_r in (16, 32, 64, 128):
        found = tune.candidates(block_r)
        assert len(found) == len(set(found)) > 20
        assert all(tuned.fault(tuned.as_item(("x", block_r, True), block)) is None for block in found)
        assert all(8 <= block_r * b.columns / (32 * b.num_warps) <= 64 for b in found)


def test_every_rank_and_layout_is_swept():
    seen = {(launch.padded_rank(case.R), case.layout) for case in tune.CASES}
    assert seen == {(R, layout) for R in (16, 32, 64, 128) for layout in ("BRN", "BNR")}
    assert all(4 * case.B * case.N * case.R >= 25e6 for case in tune.CASES)


def test_without_a_gpu_the_option_is_one_clear_error():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    pytest.importorskip("pytest_benchmark")
    options = ("-q", "-p", "no:cacheprovider", "--benchmark", "--tune", "-k", "test_tune")
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "--tune needs a GPU: a launch configuration is chosen by measuring it" in done.stdout
    assert "1 failed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
