"""Options of `pytest` itself, which only a file at the root can add."""

import importlib.util
from pathlib import Path

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("sosvae", "benchmarks of this repository (pytest-benchmark's own are --benchmark-...)")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks in bench/ in place of the tests")
    group.addoption("--benchmark-full", action="store_true", help="everything, hours; goes on where it was stopped")
    group.addoption(
        "--benchmark-results",
        metavar="CSV",
        type=Path,
        help="file that rows are appended to, after = (default: this machine's, in bench/results/)",
    )
    group.addoption("--tune", action="store_true", help="with --benchmark, on a GPU: sweep launch configurations")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if not option.benchmark:
        if option.benchmark_full or option.tune or option.benchmark_results:
            raise pytest.UsageError("--benchmark-full, --benchmark-results and --tune go with --benchmark")
        return
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise pytest.UsageError("--benchmark needs the extra `bench`: make bench, or pip install -e '.[bench]'")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "bench")]
