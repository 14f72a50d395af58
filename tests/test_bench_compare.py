"""The comparison of two versions, and pytest's own option."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from bench_cases import CASE, JOINT, measurements

from bench import compare, machine, measure, plan, process

ROOT = Path(__file__).parent.parent


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


def test_the_packages_of_base_are_what_is_imported(repository, tmp_path):
    assert machine.commit(repository).endswith("+")
    home = tmp_path / "home"
    home.mkdir()
    with compare.checkout("HEAD", repository) as base:
        process.link_packages(base, home)
        code = "import lowrank_mvn, sosvae; print(lowrank_mvn.VERSION, sosvae.VERSION)"
        environment = {"PYTHONPATH": str(home)}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
    assert run.stdout == "1 1\n", run.stderr
    assert not base.exists()
    assert (repository / "kernels/lowrank_mvn/__init__.py").read_text() == "VERSION = 2\n"


@pytest.mark.parametrize("base", ["v9", "--help"])
def test_an_unknown_base_is_named(repository, base):
    with pytest.raises(ValueError, match=f"git knows no version '{base}'"), compare.checkout(base, repository):
        pass


def test_operators_are_selected_by_names():
    names = [operator.name for operator, _ in compare.plan(quick=True)]
    assert names == ["log_prob", "log_prob_backward", "rsample_backward", "linear_backward", "train_step"]
    assert {operator.name for operator, _ in compare.plan(["linear", "train"])} == {"linear_backward", "train_step"}
    with pytest.raises(SystemExit):
        compare.main(["HEAD", "-k", "linaer"])


@pytest.mark.parametrize(("factor", "worse"), [(1.2, True), (1.0, False), (0.5, False)])
def test_the_guard_says_what_became_slower(monkeypatch, factor, worse):
    def measured(operator, case, device, settings, checkouts):
        return measurements(*checkouts, slower=factor)

    monkeypatch.setattr(measure, "measure", measured)
    lines = []
    found = compare.compare(ROOT, [(JOINT, CASE)], "cpu", say=lines.append)
    assert found == ([f"{JOINT.name} {CASE.id}"] if worse else [])
    assert f"{factor:.3f}" in lines[1]
    assert ("slower" in lines[1]) == worse


@pytest.mark.parametrize(("status", "worse"), [("wrong", True), ("failed", True), ("missing", False)])
def test_the_guard_says_what_went_wrong(monkeypatch, status, worse):
    def measured(operator, case, device, settings, checkouts):
        return [measurements("base")[0], measure.Measurement("here", status, "a reason")]

    monkeypatch.setattr(measure, "measure", measured)
    lines = []
    found = compare.compare(ROOT, [(JOINT, CASE)], "cpu", say=lines.append)
    assert bool(found) == worse
    assert f"here is {status}: a reason" in lines[1]


def collected(*arguments):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_benchmark_is_an_option_that_selects_bench():
    run = collected("--benchmark")
    if importlib.util.find_spec("pytest_benchmark") is None:
        assert run.returncode == pytest.ExitCode.USAGE_ERROR
        assert "--benchmark needs the extra `bench`" in run.stderr
        return
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if "::" in line]
    assert all(line.startswith("bench/test_operators.py::") for line in lines)
    expected = [
        f"bench/test_operators.py::test_operator[{entry.operator.name}-{entry.case.id}-{peer}]"
        for entry in plan.default_plan()
        for peer in entry.peers
    ]
    assert [line for line in lines if "::test_operator[" in line] == expected


def test_plain_pytest_collects_no_benchmark():
    run = collected("--ignore-glob=tests/test_*")
    assert run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, run.stdout + run.stderr
    run = collected("--tune", "--ignore-glob=tests/test_*")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "go with --benchmark" in run.stderr
