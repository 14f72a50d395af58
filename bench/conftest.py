"""What the benchmarks share: the machine, the plan, and the measurements, each made when its first test asks."""

import pytest

from bench import measure, store
from bench.operators import Entry


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with --benchmark"))


@pytest.fixture(scope="session")
def settings():
    """How long to measure."""
    return measure.Settings()


@pytest.fixture(scope="session")
def where():
    """Machine, rates, versions, commit and date of this run."""
    return measure.environment()


@pytest.fixture(scope="session")
def measured(where, settings, request):
    """Operator and case -> rows of all its peers, measured once and stored at once."""
    found: dict[tuple[str, str], tuple[list[measure.Measurement], list[store.Row]]] = {}
    path = request.config.getoption("benchmark_results")
    path = path or store.default_file(where["machine"], where["cores"], where["device"])

    def get(entry: Entry) -> tuple[list[measure.Measurement], list[store.Row]]:
        key = entry.operator.name, entry.case.id
        if key not in found:
            results = measure.measure(entry.operator, entry.case, where["kind"], settings, entry.peers)
            rows = measure.rows(entry.operator, entry.case, results, where)
            store.append(path, rows)
            found[key] = results, rows
        return found[key]

    return get
