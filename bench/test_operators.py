"""The benchmarks: `pytest --benchmark`. One test per operator, case and peer; a case is a group of pytest-benchmark.

The rounds of all peers of a case are measured in alternation, each peer in a process of its own, when the first of
its tests runs (`bench.measure`). Every test then gives its peer's rounds to pytest-benchmark, whose clock is here the
one that the peers' processes have read.
"""

import math

import pytest

pytest.importorskip("pytest_benchmark", reason="needs the extra `bench`")

from bench import measure, plan
from bench.operators import OPERATORS, SMALL


class WorkersClock:
    """The clock that pytest-benchmark reads: it stands still but for what the peers' processes have measured."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = WorkersClock()


def pytest_generate_tests(metafunc):
    if "entry" not in metafunc.fixturenames:
        return
    cells = []
    for entry in plan.full_plan() if metafunc.config.getoption("benchmark_full") else plan.default_plan():
        mark = pytest.mark.benchmark(group=f"{entry.operator.title}, {entry.case.id}", timer=CLOCK)
        names = {peer: f"{entry.operator.name}-{entry.case.id}-{peer}" for peer in entry.peers}
        cells += [pytest.param(entry, peer, id=name, marks=mark) for peer, name in names.items()]
    metafunc.parametrize(("entry", "peer"), cells)


def test_operator(entry, peer, measured, benchmark):
    result, row = measured(entry, peer)
    if result.status in ("missing", "skipped"):
        pytest.skip(f"{peer} is {result.status}: {result.note}")
    if result.status != "ok":
        pytest.fail(f"{peer} is {result.status}: {result.note}", pytrace=False)
    benchmark.extra_info |= {
        "ratio to ours": row.ratio,
        "errors": result.errors,
        "memory [byte]": row.peak,
        "over the floor": row.seconds / row.floor,
    }
    rounds = iter(result.seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(result.seconds))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "train_step"])
def test_graph_capture(name, where):
    if where["kind"] == "cpu":
        pytest.skip("no GPU: there is no graph to capture; `python -m bench.static` reports on the compiled kernels")
    error = measure.capture(OPERATORS[name], SMALL, where["kind"])
    # Each replay of a sample draws other noise: that it can be captured, and gives numbers, is what can be said.
    assert error < (math.inf if name == "rsample_backward" else 1e-5)


def test_tune(request, capsys):
    if not request.config.getoption("tune"):
        pytest.skip("sweeps launch configurations with --tune")
    import torch

    if not torch.cuda.is_available():
        pytest.fail("--tune needs a GPU: a launch configuration is chosen by measuring it", pytrace=False)
    from bench import tune  # which imports the kernels

    folder = tune.tuned.users_folder()
    if folder is None:
        pytest.fail("--tune has nowhere to write to: set XDG_CACHE_HOME", pytrace=False)
    with capsys.disabled():
        assert tune.tune(tune.gpu(), folder)
