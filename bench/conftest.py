"""What the benchmarks share: the machine, the plan, and the measurements, each made when its first test asks."""

import functools

import pytest

from bench import measure, plan, store
from bench.operators import Entry

_environment = functools.cache(measure.environment)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))


def _file(config, where):
    path = config.getoption("benchmark_results")
    return path or store.default_file(where["machine"], where["cores"], where["device"])


def pytest_report_collectionfinish(config, items):
    """Before hours begin: how many, and what will be left out."""
    if not config.getoption("benchmark_full") or config.option.collectonly:
        return []
    calls = [item.callspec.params for item in items if "callspec" in item.__dict__]
    entries = list(dict.fromkeys(call["entry"] for call in calls if "entry" in call))
    where = _environment()
    return list(plan.summary(entries, where, measure.Settings(), _file(config, where)))


@pytest.fixture(scope="session")
def settings():
    """How long to measure."""
    return measure.Settings()


@pytest.fixture(scope="session")
def where():
    """Machine, rates, versions, commit and date of this run."""
    return _environment()


@pytest.fixture(scope="session")
def measured(where, settings, request):
    """Operator and case -> rows of all its peers, measured once and stored at once.

    `--benchmark-full` goes on where an earlier run of the same commit on this machine has stopped.
    """
    found: dict[tuple[str, str], tuple[list[measure.Measurement], list[store.Row]]] = {}
    path = _file(request.config, where)
    known = plan.measured_already(path, where) if request.config.getoption("benchmark_full") else {}

    def get(entry: Entry) -> tuple[list[measure.Measurement], list[store.Row]]:
        key = entry.operator.name, entry.case.id
        if set(entry.peers) <= known.get(key, set()):
            pytest.skip("measured already in this commit on this machine")
        if key not in found:
            reason = plan.does_not_fit(plan.estimate(entry, where, settings), where)
            if reason:
                results = [measure.Measurement(peer, "skipped", reason) for peer in entry.peers]
            else:
                results = measure.measure(entry.operator, entry.case, where["kind"], settings, entry.peers)
            rows = measure.rows(entry.operator, entry.case, results, where)
            store.append(path, rows)
            found[key] = results, rows
        return found[key]

    return get
