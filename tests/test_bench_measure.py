"""What is measured, that it is checked first, and that processes take turns; on sizes that take no time."""

import dataclasses
import json
import math
import platform
from pathlib import Path

import numpy as np
import pytest
from bench_cases import CASE, JOINT, WHERE, measurements

from bench import errors, machine, measure, peers, plan, process, store, tables, worker
from bench.operators import CELEBA, OPERATORS, TINY, Case

ROOT = Path(__file__).parent.parent


# --- Plans ------------------------------------------------------------------------------------------------------


def test_plans():
    default, full = plan.default_plan(), plan.full_plan()
    for entries in (default, full):
        names = [(entry.operator.name, entry.case.id) for entry in entries]
        assert len(set(names)) == len(names)
    assert {entry[:2] for entry in default} <= {entry[:2] for entry in full}
    assert {entry.operator.name for entry in full} == set(OPERATORS)
    cases = [entry.case for entry in full if entry.operator is JOINT]
    # Shapes, ranks, diagonals, layouts; two batches; users' sizes, one of which is among the shapes.
    assert len(cases) == 6 * 3 * 2 * 2 + 2 + len(plan.USERS) - 1
    for entry in full:
        assert set(entry.peers) <= set(peers.PEERS)
        assert entry.peers[0] == "ours"


def test_what_does_not_fit_is_named():
    small, large = (plan.Entry(JOINT, case, ("ours", "torch")) for case in (CASE, dataclasses.replace(CELEBA, rank=64)))
    where = WHERE | {"free": 2e9}
    assert plan.does_not_fit(small, where) is None
    assert plan.does_not_fit(large, where) == "does not fit: needs about 7.0 GB, 2.0 GB are free"
    assert plan.does_not_fit(large, WHERE) is None  # where nobody says how much is free, everything is tried


def test_a_full_run_knows_where_it_stopped(tmp_path):
    path = tmp_path / "some.csv"
    assert plan.measured_already(path, WHERE) == {}
    results = [*measurements("ours", "torch"), measure.Measurement("numpyro", "failed", "killed")]
    store.append(path, measure.rows(JOINT, CASE, results, WHERE))
    assert plan.measured_already(path, WHERE) == {(JOINT.name, CASE.id): {"ours", "torch"}}
    for other in ({"commit": "0123456780"}, {"commit": "0123456789+"}, {"cores": 4}, {"versions": "torch 3"}):
        assert plan.measured_already(path, WHERE | other) == {}


# --- Operators --------------------------------------------------------------------------------------------------


def test_bytes_and_operations():
    B, N, R = 2, 20, 3
    least = 4 * (4 * B * N * R + 2 * 3 * B * N + 5 * B * N)
    gram, products, backward = R + 1, 3 * 2, 2 * R + 2 * 2 + 2
    assert JOINT.operations(CASE) == B * N * R * (gram + products + backward)
    assert JOINT.floor(CASE, 1e9, 1e15) == least / 1e9
    assert JOINT.floor(CASE, 1e15, 1e9) == JOINT.operations(CASE) / 1e9
    assert OPERATORS["train_step"].floor(CASE, 1.0, 1.0) is None


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_are_the_same_every_time(name):
    operator = OPERATORS[name]
    for layout in ("BNR", "BRN"):
        case = dataclasses.replace(operator.tiny, layout=layout)
        once, again = operator.inputs(case), operator.inputs(case)
        for key, array in once.items():
            assert array.dtype == (bool if key == "observed" else np.float32)
            assert array.tobytes() == again[key].tobytes()


# --- Checked before timed -----------------------------------------------------------------------------------------


class Textbook(peers.Job):
    """log p by dense linear algebra, and off by a factor."""

    def __init__(self, inputs, factor=1.0):
        self.inputs, self.factor, self.calls = inputs, factor, 0

    def call(self):
        self.calls += 1
        x, loc, P, d = (self.inputs[name].astype(np.float64) for name in ("x", "loc", "P", "d"))
        covariance = P @ P.swapaxes(1, 2) + np.eye(loc.shape[1]) * d[:, None, :]
        delta, N, logdet = x - loc, loc.shape[1], np.linalg.slogdet(covariance)[1]
        mahalanobis = np.einsum("bn,bn->b", delta, np.linalg.solve(covariance, delta[..., None])[..., 0])
        return {"log_prob": -0.5 * (N * math.log(2 * math.pi) + logdet + mahalanobis) * self.factor}

    def outputs(self):
        return self.call()


def session(monkeypatch, folder, peer, wrong_at=None):
    """One of log p, for which a process with the oracle has run; off by 1 % in the case `wrong_at`."""

    def build(built, operator, case, inputs, device):
        return Textbook(inputs, 1.01 if case == wrong_at and built is not peers.ORACLE else 1.0)

    monkeypatch.setattr(peers, "build", build)
    oracle, found = (
        worker.Session(OPERATORS["log_prob"], CASE, who, "cpu", folder) for who in (peers.ORACLE, peers.PEERS[peer])
    )
    oracle.oracle()
    found.prepare()
    return found


@pytest.mark.parametrize("peer", ["ours", "torch"])
def test_a_right_peer_is_timed(monkeypatch, tmp_path, peer):
    right = session(monkeypatch, tmp_path, peer)
    assert right.check() == {"log_prob": 0.0}
    assert right.turn(2) > 0


@pytest.mark.parametrize("peer", ["ours", "torch"])
@pytest.mark.parametrize(("wrong_at", "message"), [(TINY, "on small inputs wrong, "), (CASE, "^wrong, ")])
def test_a_wrong_peer_is_caught_before_it_is_timed(monkeypatch, tmp_path, peer, wrong_at, message):
    wrong = session(monkeypatch, tmp_path, peer, wrong_at)
    with pytest.raises(worker.WrongResult, match=message + "against the float64 oracle: log_prob"):
        wrong.check()
    calls = wrong.job.calls
    with pytest.raises(worker.WrongResult, match="not timed before it is checked"):
        wrong.turn(1)
    assert wrong.job.calls == calls


def test_our_own_result_has_to_be_more_exact():
    log_prob = np.array([-1e4])
    assert errors.fault(CASE, {"log_prob": log_prob}, {"log_prob": 0.5}, exact=False) is None
    assert "allowed: log_prob 0.025" in errors.fault(CASE, {"log_prob": log_prob}, {"log_prob": 0.5}, exact=True)
    fixed = dataclasses.replace(CASE, diagonal="scalar")
    assert errors.fault(fixed, {}, {"grad_P": 1.0}, exact=False) is None
    assert "grad_P 1" in errors.fault(fixed, {}, {"grad_P": 1.0}, exact=True)


def test_a_result_that_is_not_finite_is_wrong_everywhere():
    found = errors.oracle({}, {"log_prob": np.array([1.0, math.nan])}, {"log_prob": np.ones(2)})
    assert "not finite" in errors.fault(dataclasses.replace(CASE, diagonal="scalar"), {}, found, exact=False)


def test_a_sample_without_standard_normal_noise_is_wrong():
    case = Case(16, 16, 1, batch=4, rank=3)
    inputs = OPERATORS["rsample_backward"].inputs(case)
    rng = np.random.default_rng(1)
    for scale, right in ((1.0, True), (1.3, False)):
        omega_p, omega_d = rng.standard_normal((4, 3)), scale * rng.standard_normal((4, 256))
        g, root = inputs["grad_y"], np.sqrt(inputs["d"])
        outputs = {
            "y": inputs["loc"] + np.einsum("bnr,br->bn", inputs["P"], omega_p) + root * omega_d,
            "grad_loc": g,
            "grad_P": g[..., None] * omega_p[:, None],
            "grad_d": g * omega_d / (2 * root),
        }
        found = errors.sample(inputs, outputs, {})
        assert (errors.fault(case, outputs, found, exact=True) is None) == right
    found = errors.sample(inputs, outputs | {"grad_d": -outputs["grad_d"]}, {})
    assert found["grad_d"] == pytest.approx(2, rel=1e-4)


# --- Processes ----------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    absent = dataclasses.replace(peers.PEERS["numpyro"], requires=("no_such_module_a", "torch"))
    monkeypatch.setitem(peers.PEERS, "numpyro", absent)
    (result,) = measure.measure(JOINT, CASE, "cpu", names=["numpyro"])
    assert (result.status, result.note) == ("missing", "not installed: no_such_module_a")
    (row,) = measure.rows(JOINT, CASE, [result], WHERE)
    assert f"- NumPyro, jit, {JOINT.name} {CASE.id}: missing, {result.note}" in tables.operators([row])


SETTINGS = measure.Settings(turn=1e-4, budget=0.01, rounds=(2, 3))


@pytest.fixture
def asked(monkeypatch):
    """(request, peer, process) of all that workers are asked."""
    log = []
    ask = process.Worker.ask

    def recorded(self, do, **arguments):
        log.append((do, self.name, self.process.pid))
        return ask(self, do, **arguments)

    monkeypatch.setattr(process.Worker, "ask", recorded)
    return log


@pytest.mark.slow
def test_peers_take_turns_in_processes_of_their_own(asked):
    ours, other = results = measure.measure(OPERATORS["entropy"], CASE, "cpu", SETTINGS, ["ours", "torch"])
    assert ours.status == other.status == "ok", results
    assert [name for do, name, _ in asked if do == "turn"] == ["ours", "torch"] * len(ours.seconds)
    of_peaks, of_turns = ({pid for do, _, pid in asked if do == wanted} for wanted in ("peak", "turn"))
    assert len(of_peaks) == len(of_turns) == 2
    assert not of_peaks & of_turns
    rows = measure.rows(OPERATORS["entropy"], CASE, results, WHERE)
    assert rows[0].ratio == 1
    assert rows[1].ratio > 0
    assert rows[0].error_entropy < 1e-4


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_others_go_on(monkeypatch):
    prepare = process.Worker.prepare

    def killing(self):
        if self.name == "textbook":
            self.process.kill()
        prepare(self)

    monkeypatch.setattr(process.Worker, "prepare", killing)
    ours, dead = measure.measure(OPERATORS["condition"], CASE, "cpu", SETTINGS, ["ours", "textbook"])
    assert (ours.status, dead.status) == ("ok", "failed")
    assert "ended with" in dead.note
    assert len(ours.seconds) >= 2
    assert set(ours.errors) == {"mean", "factor", "diagonal"}


def test_a_worker_that_is_silent_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "PATIENCE", 0.01)
    silent = process.Worker(JOINT, CASE, "ours", "cpu", tmp_path)
    with pytest.raises(process.WorkerError, match="no reply within 0 s"):
        silent.ask("prepare")
    assert silent.process.returncode is not None


def test_modules_of_another_version_are_not_measured(monkeypatch, tmp_path):
    with process.Worker(JOINT, CASE, "ours", "cpu", tmp_path) as mixed:
        files = [str(ROOT / "kernels/lowrank_mvn/functional.py"), str(ROOT / "sosvae/config.py")]
        monkeypatch.setattr(mixed, "ask", lambda do: files)
        mixed.prepare()
        files.append(str(tmp_path / "sosvae/planning/__init__.py"))
        with pytest.raises(process.WorkerError, match="modules of another version"):
            mixed.prepare()


def test_the_machine_is_described_without_names_or_paths():
    found = json.dumps(machine.describe(copied=1 << 10, product=8))
    for word in (platform.node(), str(ROOT), str(Path.home()) + "/", "http"):
        assert not word or word not in found
    assert {"machine", "cores", "copy_bandwidth", "product_rate", "versions"} <= set(json.loads(found))
