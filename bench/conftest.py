"""What the benchmarks share: the machine, the plan, and the measurements, each made when its first test asks."""

import functools

import pytest

from bench import machine, measure, plan, store


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))


@pytest.fixture(scope="session")
def where():
    """Machine, rates, versions, commit and date of this run."""
    return machine.environment()


@pytest.fixture(scope="session")
def measured(where, request):
    """(entry, peer) -> its measurement and row; all peers of a case are measured once and stored at once.

    `--benchmark-full` goes on where an earlier run of the same commit on this machine has stopped.
    """
    path = request.config.getoption("benchmark_results")
    path = path or store.default_file(where["machine"], where["cores"], where["device"])
    known = plan.measured_already(path, where) if request.config.getoption("benchmark_full") else {}

    @functools.cache
    def of_all(entry):
        if reason := plan.does_not_fit(entry, where):
            results = [measure.Measurement(peer, "skipped", reason) for peer in entry.peers]
        else:
            results = measure.measure(entry.operator, entry.case, where["kind"], names=entry.peers)
        rows = measure.rows(entry.operator, entry.case, results, where)
        store.append(path, rows)
        return {m.peer: (m, row) for m, row in zip(results, rows, strict=True)}

    def get(entry, peer):
        if set(entry.peers) <= known.get((entry.operator.name, entry.case.id), set()):
            pytest.skip("measured already in this commit on this machine")
        return of_all(entry)[peer]

    return get
