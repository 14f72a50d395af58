"""The benchmarks' own machinery, on sizes that take no time; what it measures is no business of these tests."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import compare, machine, measure, operators, peers, plan, report, store, worker
from bench.operators import CELEBA, OPERATORS, Case

ROOT = Path(__file__).parent.parent
JOINT = OPERATORS["log_prob_entropy_backward"]
CASE = Case(5, 4, 1, batch=2, rank=3)
WHERE = {
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789",
    "machine": "A Processor, of a kind",
    "cores": 2,
    "device": "cpu",
    "versions": "python 3.11.7; torch 2.13.0",
    "copy_bandwidth": 2e10,
    "product_rate": 2e11,
}


def measurements(*names, slower=2.0):
    errors = {"log_prob": 0.01, "entropy": 0.02, "grad_P": 1e-6, "grad_loc": 3e-6}
    found = []
    for i, name in enumerate(names):
        seconds = [1e-3 * slower**i * (1 + 0.01 * k) for k in range(6)]
        found.append(measure.Measurement(name, "ok", "", 3, 1e6 * (i + 1), "resident", errors, seconds))
    return found


def small_results(**where):
    """Three sizes of N and two of R, two peers, and one that is missing."""
    found = []
    for case in (CELEBA, operators.SMALL, operators.BRAIN, dataclasses.replace(CELEBA, rank=10)):
        results = measurements("ours", "torch")
        for m in results:
            m.seconds = [s * case.N / 1e4 * case.rank / 25 for s in m.seconds]
        results.append(measure.Measurement("numpyro", "missing", "not installed: jax, numpyro"))
        found += measure.rows(JOINT, case, results, WHERE | where)
    return found


# --- Results ----------------------------------------------------------------------------------------------------


def test_csv_round_trip(tmp_path):
    path = tmp_path / "results" / "some.csv"
    rows = small_results()
    store.append(path, rows[:5])
    store.append(path, rows[5:])
    back = store.read(path)
    assert len(back) == len(rows)
    for a, b in zip(rows, back, strict=True):
        for name, value in dataclasses.asdict(a).items():
            other = getattr(b, name)
            assert type(other) is type(value)
            if isinstance(value, float):
                assert other == pytest.approx(value, rel=1e-3, nan_ok=True), name
            else:
                assert other == value, name
    assert [file.name for file in path.parent.iterdir()] == ["some.csv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("cores", "kernels", 1), "cores, kernels"),
        (lambda text: text.replace(",2,cpu", ",two,cpu", 1), r"line 2: .*two"),
        (lambda text: text.replace(",cpu", "", 1), "line 2: another number of columns"),
    ],
)
def test_csv_of_another_form_is_refused(tmp_path, change, message):
    path = tmp_path / "some.csv"
    store.append(path, small_results())
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        store.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("old")

    def fails(file):
        file.write("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        store.write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_latest_keeps_rows_of_one_run_together():
    old, new = small_results(), small_results(date="2026-02-01T00:00:00Z", commit="new")
    mixed = store.latest([*new[:6], *old])
    assert {(row.case, row.commit) for row in mixed[:6]} == {(row.case, "new") for row in new[:6]}
    assert len(mixed) == len(old)


def test_file_names_are_of_the_machine_alone():
    assert store.default_file("AMD EPYC (x)", 2, "cpu").name == "amd-epyc-x-2-cores.csv"
    assert store.default_file("AMD EPYC", 2, "NVIDIA H100 80GB").name == "nvidia-h100-80gb.csv"


# --- Report -----------------------------------------------------------------------------------------------------


def test_tables():
    rows = small_results()
    answer = report.answer(rows)
    assert "| torch's class | 23.9 ms | 2.0 (2.0–2.0) | – | 2.00 MB | 2.0 | 0.010 |" in answer
    assert "- NumPyro, jit, log_prob_entropy_backward 8x218x178x3-R25-pixel-BNR: missing, not installed: jax" in answer
    table = report.operators(rows)
    assert table.count("log p and H with backward |") == 8
    assert "- NumPyro, jit, 4 cases: missing" in table
    assert "A Processor, of a kind, 2 cores" in table
    assert "| lowrank_mvn | 1.00 (3) | – | 1.00 (2) |" in report.growth(rows)


def test_static_shows_the_bytes_of_the_case_that_they_were_counted_for():
    kernels = [
        {"kernel": "linear_gram", "case": f"K=64 BKM float32 {d}", "target": "sm_90", "registers": 1, "spills": 0}
        | {"shared": 0, "occupancy": 0.5, "caps": {"issue": 5e12}}
        for d in ("item", "pixel")
    ]
    counted = {"64:BKM": [{"kernel": "linear_gram", "requested": 103, "floor": 100}]}
    item, pixel = report.static({"kernels": kernels, "requested": counted}).splitlines()[2:4]
    assert item.endswith("| 1.030 | 5.0, issue |")
    assert pixel.endswith("| – | 5.0, issue |")


def test_growth_is_the_slope_of_the_logarithms():
    rows = []
    for n in (16, 32, 64):
        (m,) = measurements("ours")
        m.seconds = [1e-9 * (n * n) ** 1.5]
        rows += measure.rows(JOINT, Case(n, n, 1, batch=2, rank=3), [m], WHERE)
    assert report.exponent(rows, "N") == (pytest.approx(1.5), 3)
    slope, count = report.exponent(rows, "R")
    assert math.isnan(slope)
    assert count == 1


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    written = report.plots(small_results(), tmp_path, "some")
    assert [path.name for path in written] == ["some-time.png", "some-memory.png", "some-error.png"]
    first = [path.read_bytes() for path in written]
    assert all(data.startswith(b"\x89PNG") for data in first)
    assert [path.read_bytes() for path in report.plots(small_results(), tmp_path, "some")] == first


def test_check_fails_where_a_table_differs_from_its_file(tmp_path):
    document = tmp_path / "README.md"
    block = "<!-- bench.report growth some.csv -->\n<!-- /bench.report -->\n"
    document.write_text(f"Before.\n\n{block}\nAfter, with `numbers`.\n", encoding="utf-8")
    (line,) = report.check(document, tmp_path)
    assert "some.csv, which a table names, does not exist" in line
    store.append(tmp_path / "some.csv", small_results())
    assert "table growth differs" in report.check(document, tmp_path)[0]
    assert report.update(document, tmp_path)
    assert report.check(document, tmp_path) == []
    assert not report.update(document, tmp_path)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("Before.\n\n<!--")
    assert text.endswith("-->\n\nAfter, with `numbers`.\n")
    document.write_text(text.replace("1.00 (3)", "0.50 (3)"), encoding="utf-8")
    assert "table growth differs from some.csv" in report.check(document, tmp_path)[0]
    document.write_text(text.replace("report growth", "report grwth"), encoding="utf-8")
    assert "unknown table 'grwth'" in report.check(document, tmp_path)[0]


def test_what_is_known_without_a_gpu_is_no_timing():
    row = {"kernel": "residual", "target": "sm_90", "case": "R=25 BRN", "registers": 96, "spills": 0, "shared": 1024}
    table = report.static({"kernels": [row | {"occupancy": 0.5}, row | {"occupancy": None}]})
    assert "| residual | R=25 BRN | sm_90 | 96 | 0 | 1024 | 50% | – | – |" in table
    assert "nothing here was timed" in table
    # Where there are bounds, the rows that have them; keys that are not known do no harm.
    row |= {"tile": [25, 32], "num_stages": 2, "programs": 8, "bytes_in_flight": 25600}
    bound = row | {
        "occupancy": None,
        "sizes": "3×4×5",
        "caps": {"issue": 5e12, "shared memory": 3.25e12},
        "another": {"key": 1},
    }
    requested = {
        "25:BRN": [{"kernel": "residual", "requested": 1003, "floor": 1000}, {"kernel": "solve", "floor": None}]
    }
    document = {"kernels": [row | {"occupancy": 0.5}, bound], "requested": requested, "assumptions": "Of an\nH100."}
    table = report.static(document)
    assert table.count("| residual 3×4×5 |") == 1
    assert "| residual |" not in table
    assert "| 1024 | – | 1 × 25×32 × 8 = 25.6 kB | 1.003 | 3.2, shared memory |" in table
    assert table.endswith("nothing here was timed. Of an H100.\n")


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_tables_of_the_documents_are_those_of_their_files(name):
    if (ROOT / name).exists():
        assert report.check(ROOT / name) == []


def test_results_in_the_repository_can_be_read():
    for path in store.RESULTS.glob("*.csv"):
        assert store.read(path), path.name


# --- Operators --------------------------------------------------------------------------------------------------


def test_plans():
    default, full = operators.default_plan(), operators.full_plan()
    for entries in (default, full):
        names = [(entry.operator.name, entry.case.id) for entry in entries]
        assert len(set(names)) == len(names)
    assert {entry[:2] for entry in default} <= {entry[:2] for entry in full}
    assert {entry.operator.name for entry in full} == set(OPERATORS)
    cases = [entry.case for entry in full if entry.operator is JOINT]
    assert {(case.height, case.width, case.channels) for case in cases} == {
        (64, 64, 1),
        (160, 192, 1),
        (218, 178, 3),
        (128, 128, 3),
        (256, 256, 3),
        (512, 512, 3),
    }
    assert {case.rank for case in cases} == {10, 25, 64}
    assert {(case.diagonal, case.layout) for case in cases} == {
        (d, p) for d in ("pixel", "scalar") for p in ("BNR", "BRN")
    }
    for entry in full:
        assert set(entry.peers) <= set(peers.PEERS)
        assert entry.peers[0] == "ours"


SETTINGS = measure.Settings()
MACHINE = WHERE | {"memory": 2.4e10}


def test_every_entry_is_estimated_before_it_is_begun():
    full = operators.full_plan()
    estimates = {entry: plan.estimate(entry, MACHINE, SETTINGS) for entry in full}
    for entry, found in estimates.items():
        assert 1 < found.seconds < 3600, entry
        P = 4 * entry.case.batch * entry.case.N * entry.case.rank
        assert found.memory > (0 if entry.operator.name.startswith("train_") else len(entry.peers) * P), entry
    lines = list(plan.summary(full, MACHINE, SETTINGS, None))
    assert lines[0].startswith(f"{len(full)} cases to be measured: about ")
    assert lines[0].endswith(" hours")
    assert lines[1].startswith("the largest needs about ")


def test_what_does_not_fit_is_named():
    entries = [operators.Entry(JOINT, case, ("ours", "torch")) for case in (CASE, dataclasses.replace(CELEBA, rank=64))]
    small = MACHINE | {"memory": 2e9}
    lines = list(plan.summary(entries, small, SETTINGS, None))
    assert lines[0].startswith("1 cases to be measured")
    assert lines[-1].startswith("log_prob_entropy_backward 8x218x178x3-R64-pixel-BNR does not fit: needs about ")
    assert lines[-1].endswith("2.0 GB are free")
    # Where nobody says how much is free, everything is tried.
    assert len(list(plan.summary(entries, WHERE, SETTINGS, None))) == 2


def test_a_full_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "some.csv"
    assert plan.measured_already(path, WHERE) == {}
    results = [*measurements("ours", "torch"), measure.Measurement("numpyro", "failed", "killed")]
    store.append(path, measure.rows(JOINT, CASE, results, WHERE))
    key = JOINT.name, CASE.id
    assert plan.measured_already(path, WHERE) == {key: {"ours", "torch"}}
    for other in ({"commit": "0123456780"}, {"commit": "0123456789+"}, {"cores": 4}, {"versions": "torch 3"}):
        assert plan.measured_already(path, WHERE | other) == {}
    complete, partly = (operators.Entry(JOINT, CASE, names) for names in (("ours", "torch"), ("ours", "numpyro")))
    lines = list(plan.summary([complete, partly], WHERE, SETTINGS, path))
    assert lines[0] == "1 of 2 cases were measured in this commit on this machine"
    assert lines[1].startswith("1 cases to be measured")


def test_bytes_and_operations():
    B, N, R = 2, 20, 3
    assert JOINT.bytes(CASE) == 4 * (4 * B * N * R + 2 * 3 * B * N + 5 * B * N)
    gram, products, backward = R + 1, 3 * 2, 2 * R + 2 * 2 + 2
    assert JOINT.operations(CASE) == B * N * R * (gram + products + backward)
    assert JOINT.floor(CASE, 1e9, 1e15) == JOINT.bytes(CASE) / 1e9
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
    """log p and H by dense linear algebra, and off by a factor."""

    def __init__(self, inputs, factor=1.0):
        self.inputs, self.factor, self.calls = inputs, factor, 0

    def call(self):
        self.calls += 1
        x, loc, P, d = (self.inputs[name].astype(np.float64) for name in ("x", "loc", "P", "d"))
        covariance = P @ P.swapaxes(1, 2) + np.eye(loc.shape[1]) * d[:, None, :]
        delta, N, logdet = x - loc, loc.shape[1], np.linalg.slogdet(covariance)[1]
        quadratic = np.einsum("bn,bn->b", delta, np.linalg.solve(covariance, delta[..., None])[..., 0])
        log_prob = -0.5 * (N * math.log(2 * math.pi) + logdet + quadratic) * self.factor
        return {"log_prob": log_prob}

    def outputs(self):
        return self.call()


def timed(factor=1.0):
    job = worker.Timed(OPERATORS["log_prob"], CASE, lambda case, inputs: Textbook(inputs, factor), "cpu")
    job.prepare()
    return job


def test_a_right_peer_is_timed():
    job = timed()
    oracle = Textbook(job.inputs).outputs()
    assert job.check(oracle, exact=True) == {"log_prob": 0.0}
    assert job.turn(2) > 0


@pytest.mark.parametrize("exact", [True, False])
def test_a_wrong_peer_is_caught_before_it_is_timed(exact):
    job = timed(factor=1.01)
    oracle = Textbook(job.inputs).outputs()
    with pytest.raises(worker.WrongResult, match=r"wrong, against the float64 oracle: log_prob"):
        job.check(oracle, exact)
    calls = job.job.calls
    with pytest.raises(worker.WrongResult, match="not timed before it is checked"):
        job.turn(1)
    assert job.job.calls == calls


def test_a_result_that_is_not_finite_is_wrong_everywhere():
    case = dataclasses.replace(CASE, diagonal="scalar")
    operator = OPERATORS["log_prob"]
    outputs = {"log_prob": np.array([1.0, math.nan])}
    errors = operator.errors({}, outputs, {"log_prob": np.ones(2)})
    assert "not finite" in operator.fault(case, outputs, errors, exact=False)


def test_a_sample_without_standard_normal_noise_is_wrong():
    operator = OPERATORS["rsample_backward"]
    case = Case(16, 16, 1, batch=4, rank=3)
    inputs = operator.inputs(case)
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
        errors = operator.errors(inputs, outputs, {})
        assert (operator.fault(case, outputs, errors, exact=True) is None) == right
    errors = operator.errors(inputs, outputs | {"grad_d": -outputs["grad_d"]}, {})
    assert errors["grad_d"] == pytest.approx(2, rel=1e-4)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    absent = dataclasses.replace(peers.PEERS["numpyro"], requires=("no_such_module_a", "torch"))
    monkeypatch.setitem(peers.PEERS, "numpyro", absent)
    (result,) = measure.measure(JOINT, CASE, "cpu", names=["numpyro"])
    assert (result.status, result.note) == ("missing", "not installed: no_such_module_a")
    (row,) = measure.rows(JOINT, CASE, [result], WHERE)
    assert (
        "- NumPyro, jit, log_prob_entropy_backward 2x5x4x1-R3-pixel-BNR: missing, not installed: no_such_module_a"
        in (report.operators([row]))
    )


@pytest.mark.slow
def test_peers_take_turns_in_processes_of_their_own(monkeypatch):
    """From operator to row; and a process that dies is named, the others go on."""
    asked: list[str] = []
    alone: dict[str, set[int]] = {}
    ask = measure.Worker.ask

    def recorded(self, do, **arguments):
        if do == "turn":
            asked.append(self.name)
        if do in ("peak", "turn"):
            alone.setdefault(do, set()).add(self.process.pid)
        if do == "prepare" and self.name == "textbook":
            self.process.kill()
        return ask(self, do, **arguments)

    monkeypatch.setattr(measure.Worker, "ask", recorded)
    settings = measure.Settings(turn=1e-4, budget=0.01, rounds=(2, 3))
    results = measure.measure(OPERATORS["condition"], CASE, "cpu", settings, ["ours", "textbook"])
    ours, dead = results
    assert (ours.status, dead.status) == ("ok", "failed")
    assert "ended with" in dead.note
    assert len(ours.seconds) >= 2
    assert ours.memory >= 0
    assert len(alone["peak"]) == 1  # the other died before
    assert not alone["peak"] & alone["turn"]
    assert set(ours.errors) == {"mean", "factor", "diagonal"}

    asked.clear()
    ours, other = measure.measure(OPERATORS["entropy"], CASE, "cpu", settings, ["ours", "torch"])
    assert ours.status == other.status == "ok", (ours, other)
    assert asked == ["ours", "torch"] * len(ours.seconds)
    rows = measure.rows(OPERATORS["entropy"], CASE, [ours, other], WHERE)
    assert rows[0].ratio == 1
    assert rows[1].ratio > 0
    assert rows[0].error_entropy < 1e-4


# --- The machine, versions, the guard ---------------------------------------------------------------------------------


def test_the_machine_is_described_without_names_or_paths():
    import platform

    found = json.dumps(machine.describe(copied=1 << 10, product=8))
    for word in (platform.node(), str(ROOT), str(Path.home()) + "/", "http"):
        assert not word or word not in found
    assert {"machine", "cores", "copy_bandwidth", "product_rate", "versions"} <= set(json.loads(found))


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit and a change that is not in it."""
    folder = tmp_path / "repository"
    for name in ("kernels/lowrank_mvn", "sosvae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("VERSION = 1\n")
    git = ("git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one")):
        subprocess.run([*git, *command], check=True)
    (folder / "kernels/lowrank_mvn/__init__.py").write_text("VERSION = 2\n")
    return folder


def test_base_is_checked_out_and_its_packages_are_what_is_imported(repository, tmp_path):
    assert machine.commit(repository).endswith("+")
    with compare.worktree("HEAD", repository) as base, measure.sources(base) as source:
        code = "import lowrank_mvn, sosvae; print(lowrank_mvn.VERSION, sosvae.VERSION)"
        environment = {"PYTHONPATH": str(source)}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert run.stdout == "1 1\n", run.stderr
    assert not base.exists()
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert listed.count("\n") == 1
    assert (repository / "kernels/lowrank_mvn/__init__.py").read_text() == "VERSION = 2\n"


def test_an_unknown_base_is_named(repository):
    with pytest.raises(ValueError, match="git knows no version 'v9'"), compare.worktree("v9", repository):
        pass
    with pytest.raises(ValueError, match="git knows no version '--help'"), compare.worktree("--help", repository):
        pass


@pytest.mark.parametrize(("factor", "worse"), [(1.2, True), (1.0, False), (0.5, False)])
def test_the_guard_says_what_became_slower(monkeypatch, factor, worse):
    def measured(operator, case, device, settings, checkouts):
        old, new = measurements(*checkouts, slower=factor)
        return [old, new]

    monkeypatch.setattr(measure, "measure", measured)
    lines = []
    found = compare.compare(ROOT, [(JOINT, CASE)], "cpu", say=lines.append)
    assert found == ([f"{JOINT.name} {CASE.id}"] if worse else [])
    assert f"{factor:.3f}" in lines[1]
    assert ("slower" in lines[1]) == worse


# --- The option ----------------------------------------------------------------------------------------------------


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_benchmark_is_a_literal_option_that_selects_bench():
    run = collected("--benchmark")
    if importlib.util.find_spec("pytest_benchmark") is None:
        assert run.returncode == pytest.ExitCode.USAGE_ERROR
        assert "--benchmark needs the extra `bench`" in run.stderr
        return
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if "::" in line]
    assert lines
    assert all(line.startswith("bench/test_operators.py::") for line in lines)
    expected = [
        f"bench/test_operators.py::test_operator[{entry.operator.name}-{entry.case.id}-{peer}]"
        for entry in operators.default_plan()
        for peer in entry.peers
    ]
    assert [line for line in lines if "::test_operator[" in line] == expected


def test_plain_pytest_collects_no_benchmark():
    run = collected("--ignore-glob=tests/test_*")
    assert run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, run.stdout + run.stderr
    run = collected("--tune", "--ignore-glob=tests/test_*")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "go with --benchmark" in run.stderr
