"""How results of benchmarks are stored and shown."""

import dataclasses
import math
from pathlib import Path

import pytest
from bench_cases import JOINT, WHERE, measurements, small_results

from bench import measure, plots, report, store, tables
from bench.operators import Case

ROOT = Path(__file__).parent.parent


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


def test_latest_keeps_rows_of_one_run_together():
    old, new = small_results(), small_results(date="2026-02-01T00:00:00Z", commit="new")
    mixed = store.latest([*new[:6], *old])
    assert {(row.case, row.commit) for row in mixed[:6]} == {(row.case, "new") for row in new[:6]}
    assert len(mixed) == len(old)


def test_file_names_are_of_the_machine_alone():
    assert store.default_file("AMD EPYC (x)", 2, "cpu").name == "amd-epyc-x-2-cores.csv"
    assert store.default_file("AMD EPYC", 2, "NVIDIA H100 80GB").name == "nvidia-h100-80gb.csv"


def test_tables():
    rows = small_results()
    answer = tables.answer(rows)
    assert "| torch's class | 23.9 ms | 2.0 (2.0–2.0) | – | 2.00 MB | 2.0 | 0.010 |" in answer
    assert "- NumPyro, jit, log_prob_entropy_backward 8x218x178x3-R25-pixel-BNR: missing, not installed: jax" in answer
    table = tables.operators(rows)
    assert table.count("log p and H with backward |") == 8
    assert "- NumPyro, jit, 4 cases: missing" in table
    assert "A Processor, of a kind, 2 cores" in table
    assert "| lowrank_mvn | 1.00 (3) | – | 1.00 (2) |" in tables.growth(rows)


def test_growth_is_the_slope_of_the_logarithms():
    rows = []
    for n in (16, 32, 64):
        (m,) = measurements("ours")
        m.seconds = [1e-9 * (n * n) ** 1.5]
        rows += measure.rows(JOINT, Case(n, n, 1, batch=2, rank=3), [m], WHERE)
    assert tables.exponent(rows, "N") == (pytest.approx(1.5), 3)
    slope, count = tables.exponent(rows, "R")
    assert math.isnan(slope)
    assert count == 1


def compiled(**of_kernel):
    kernel = {"kernel": "residual", "case": "R=25 BRN", "target": "sm_90", "registers": 96, "spills": 0}
    return kernel | {"shared": 1024, "occupancy": 0.5} | of_kernel


def test_bytes_are_shown_beside_the_case_they_were_counted_for():
    kernels = [
        compiled(kernel="linear_gram", case=f"K=64 BKM float32 {d}", caps={"issue": 5e12}) for d in ("item", "pixel")
    ]
    counted = {"64:BKM": [{"kernel": "linear_gram", "requested": 103, "floor": 100}]}
    item, pixel = tables.static({"kernels": kernels, "requested": counted}).splitlines()[2:4]
    assert item.endswith("| 1.030 | 5.0, issue |")
    assert pixel.endswith("| – | 5.0, issue |")


def test_compiled_kernels_are_shown_without_times():
    table = tables.static({"kernels": [compiled(), compiled(occupancy=None)]})
    assert "| residual | R=25 BRN | sm_90 | 96 | 0 | 1024 | 50% | – | – |" in table
    assert "nothing here was timed" in table
    # Kernels with bounds are shown alone.
    tile = {"tile": [25, 32], "num_stages": 2, "programs": 8, "bytes_in_flight": 25600}
    bound = compiled(**tile, occupancy=None, sizes="3×4×5", caps={"issue": 5e12, "shared memory": 3.25e12})
    counted = [{"kernel": "residual", "requested": 1003, "floor": 1000}, {"kernel": "solve", "floor": None}]
    document = {"kernels": [compiled(), bound], "requested": {"25:BRN": counted}, "assumptions": "Of an\nH100."}
    table = tables.static(document)
    assert table.count("| residual 3×4×5 |") == 1
    assert "| residual |" not in table
    assert "| 1024 | – | 1 × 25×32 × 8 = 25.6 kB | 1.003 | 3.2, shared memory |" in table
    assert table.endswith("nothing here was timed. Of an H100.\n")


def test_plots_of_the_same_results_have_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.plots(small_results(), tmp_path, "some")
    assert [path.name for path in written] == ["some-time.png", "some-memory.png", "some-error.png"]
    first = [path.read_bytes() for path in written]
    assert all(data.startswith(b"\x89PNG") for data in first)
    assert [path.read_bytes() for path in plots.plots(small_results(), tmp_path, "some")] == first


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


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_tables_of_the_documents_are_those_of_their_files(name):
    assert report.check(ROOT / name) == []
