"""The sweep of launches with a timer that is made up. Runs as `test_triton_kernels.py` does."""

from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton_cases import INTERPRET, ON_A_DEVICE

from bench import tune
from bench.static.launches import Case
from lowrank_mvn.device import launch, tuned
from lowrank_mvn.device.launch import Block
from lowrank_mvn.factors.dense.triton import capacitance

DEVICE = torch.device("cpu" if INTERPRET else "cuda:0")
pytestmark = ON_A_DEVICE
CASE = Case(3, "BRN", B=1, N=70)
CELL = ("residual", 16, True)
DEFAULT = Block(1, 64)


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch):
    """Whatever the tables say, the choice for the cell is DEFAULT."""
    look_up = launch.block

    def block(kernel, *rest):
        return DEFAULT if kernel == "residual" else look_up(kernel, *rest)

    monkeypatch.setattr(launch, "block", block)


@pytest.fixture
def alone(monkeypatch):
    """The case that is timed is the only one that is computed."""
    monkeypatch.setattr(tune, "others", lambda case: [])


def timer(times, log=None):
    """Seconds by warps and columns; a list of them is gone through."""

    def seconds(launches):
        (key,) = {(started.num_warps, started.arguments["TILE"].COLUMNS) for started in launches}
        if log is not None:
            log.append(key)
        found = times[key]
        return found.pop(0) if isinstance(found, list) else found

    return tune.Device("Some GPU", DEVICE, seconds)


def sweep(times, *blocks, log=None):
    return tune.sweep(CELL, CASE, timer(times, log), blocks)


@pytest.mark.usefixtures("alone")
def test_the_fastest_is_kept():
    log = []
    found = sweep({(1, 64): 3.0, (1, 16): 2.0, (2, 32): 1.0}, Block(1, 16), DEFAULT, Block(2, 32), log=log)
    assert (found.cell, found.default, found.best, found.before, found.after) == (CELL, DEFAULT, Block(2, 32), 3.0, 1.0)
    assert (found.tried, found.left_out) == (2, {})
    # Once each, then in turns.
    assert log == [(1, 16), (2, 32)] + [(1, 64), (2, 32), (1, 16)] * tune.ROUNDS
    assert str(found) == (
        "residual, R ≤ 16, [B, R, N]: 1 × 64 × 1, 3000000.0 µs → 2 × 32 × 1, 1000000.0 µs (± 0.0; 2 tried)"
    )


@pytest.mark.usefixtures("alone")
def test_only_what_wins_by_more_than_the_spread_is_kept():
    noisy = [3.0, 2.8, 3.2, 3.0, 2.8, 3.2, 3.0]
    found = sweep({(1, 64): list(noisy), (1, 16): 2.9}, Block(1, 16))
    assert found.best is None
    assert found.before == 3.0
    assert found.spread == pytest.approx(0.32)
    assert str(found).startswith("residual, R ≤ 16, [B, R, N]: 1 × 64 × 1 stays, ")
    found = sweep({(1, 64): list(noisy), (1, 16): 2.5}, Block(1, 16))
    assert found.best == Block(1, 16)


@pytest.mark.usefixtures("alone")
def test_finalists_are_few():
    times = {(1, 64): 1.0} | {(warps, 16): 1.0 + warps for warps in (1, 2, 4, 8)} | {(2, 32): 10.0}
    log = []
    blocks = [Block(2, 32), *(Block(warps, 16) for warps in (8, 4, 2, 1))]
    assert sweep(times, *blocks, log=log).best is None
    assert log.count((2, 32)) == 1
    assert log.count((8, 16)) == 1 + tune.ROUNDS


@pytest.mark.usefixtures("alone")
def test_what_computes_something_else_is_left_out(monkeypatch):
    """Columns are dropped for one block; it would be the fastest."""
    split = launch.split_columns
    monkeypatch.setattr(launch, "split_columns", lambda N, R, n: 64 if n == 16 else split(N, R, n))
    monkeypatch.setattr(launch, "ceil_div", lambda a, b: 1 if (a, b) == (70, 64) else -(-a // b))
    found = sweep({(1, 64): 2.0, (1, 32): 1.0}, Block(1, 16), Block(1, 32))
    assert found.left_out == {"differ": 1}
    assert found.best == Block(1, 32)


def test_nan_is_another_result():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")])
    assert not tune.difference([a, b], [a, a]) <= 1.0
    assert tune.difference([a, 2 * a], [a, a]) == 1.0


@pytest.mark.usefixtures("alone")
def test_what_does_not_start_or_spills_is_left_out(monkeypatch):
    start, run = launch.launch, tune.run

    def tried(kernel, grid, num_warps, num_stages=1, **arguments):
        swept = kernel.fn.__name__ == "residual_kernel"
        if swept and num_stages == 4:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if swept and num_stages == 2:
            raise RuntimeError("PassManager::run failed")
        start(kernel, grid, num_warps, num_stages, **arguments)

    def started(one):
        run(one)
        return SimpleNamespace(n_spills=8 if one.num_warps == 2 else 0)

    monkeypatch.setattr(launch, "launch", tried)
    monkeypatch.setattr(tune, "run", started)
    blocks = Block(1, 16, 4), Block(1, 16, 2), Block(2, 16), Block(2, 32), Block(4, 16)
    found = sweep({(1, 64): 2.0, (4, 16): 1.0}, *blocks)
    assert found.left_out == {"fail (OutOfResources)": 1, "fail (RuntimeError)": 1, "spill": 2}
    assert found.best == Block(4, 16)
    assert str(found).endswith("5 tried, 1 fail (OutOfResources), 1 fail (RuntimeError), 2 spill)")


def test_the_winner_has_to_compute_the_other_cases_too(monkeypatch):
    """One fails in float64, as where shared memory is short for it; the next one is taken."""
    start = launch.launch

    def tried(kernel, grid, num_warps, num_stages=1, **arguments):
        if num_warps == 2 and "P_at" in arguments and arguments["P_at"][0].dtype == torch.float64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        start(kernel, grid, num_warps, num_stages, **arguments)

    monkeypatch.setattr(launch, "launch", tried)
    found = sweep({(1, 64): 3.0, (2, 16): 1.0, (1, 16): 2.0}, Block(2, 16), Block(1, 16))
    assert found.best == Block(1, 16)
    assert found.left_out == {"differ elsewhere": 1}


def test_the_other_cases_cover_tiles_of_the_rank():
    kinds = [(case.R, case.dtype, case.diagonal, case.S) for case in tune.others(Case(64))]
    assert {R for R, *_ in kinds} == {64, 130}
    assert {kind[1] for kind in kinds} == {torch.float32, torch.float64, torch.bfloat16}
    assert {R for R, *_ in ((case.R, 0) for case in tune.others(Case(25)))} == {25}


def test_cells_are_what_dispatch_asks_for():
    found = tune.cells(CASE, DEVICE)
    assert len(found) == len(set(found))
    assert {key[0] for key in found} >= {"capacitance", "residual", "backward"}
    assert {key[1:] for key in found} == {(16, True)}
    assert {key[1:] for key in tune.cells(CASE._replace(R=33, layout="BNR"), DEVICE)} == {(64, False)}


@pytest.mark.usefixtures("alone")
def test_a_table_is_written_and_dispatch_reads_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tune.write(tuned.SHIPPED, "Some GPU", {("backward", 16, True): Block(2, 16)})
    tune.write(tmp_path, "Some GPU", {("capacitance", 16, True): Block(8, 16), ("residual", 64, True): Block(8, 16)})
    monkeypatch.setattr(tune, "cells", lambda case, device: [("residual", 16, True), ("capacitance", 16, True)])
    times = {(1, 64): 2.0, (1, 16): 1.0, (2, 16): 4.0}
    said = []

    def choose(block_r):
        return [Block(1, 16), Block(2, 16)] if len(said) == 0 else [Block(2, 16)]

    done = tune.tune(timer(times), tmp_path, [CASE], choose, said.append)
    assert [found.best for found in done] == [Block(1, 16), None]
    assert done[1].default == capacitance.BLOCKS[16, True]  # the table's choice, not that of an earlier sweep
    # A cell whose default is best is forgotten, one that was not swept is kept.
    assert tuned.read(tmp_path, "Some GPU") == {("residual", 16, True): (1, 16, 1), ("residual", 64, True): (8, 16, 1)}
    assert len(said) == 3
    assert said[-1] == f"1 of 2 launches are faster on Some GPU; written to {tmp_path / 'some-gpu.json'}"


if not INTERPRET:

    @pytest.mark.usefixtures("alone")
    def test_on_a_device():
        where = tune.gpu()
        found = tune.sweep(CELL, CASE._replace(N=4096, B=2), where, [Block(1, 16), Block(2, 128), Block(4, 64, 2)])
        assert found.tried == 3
        assert 0 < found.before < 1e-2
        assert found.best is None or found.before - found.after > found.spread
