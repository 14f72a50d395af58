"""The static benchmark: its reading of machine code, its model, and the bounds that it found and that must stay.

It compiles, so Triton must not be interpreting: a process of its own, like the interpreter's (test_triton_session.py).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """One rank, one layout, one target of each vendor."""
    path = tmp_path_factory.mktemp("static") / "static.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p or "." for p in sys.path)
    env["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    command = [sys.executable, "-m", "bench.static", "--rank", "25", "--layout", "BRN", "--json", str(path)]
    command += ["--target", "sm_90", "gfx942"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not timings" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def rows(document, target="sm_90"):
    return {row["kernel"]: row for row in document["kernels"] if row["target"] == target}


@pytest.mark.slow
def test_no_spills(document):
    assert {name: row["spills"] for name, row in rows(document).items() if row["spills"]} == {}
    assert rows(document, "gfx942").keys() == rows(document).keys()


@pytest.mark.slow
def test_wide_loads_and_stores(document):
    for kernel in ("capacitance", "residual", "backward", "sample"):
        loads = rows(document)[kernel]["loads"]
        assert max(loads, key=loads.__getitem__) == "16", kernel
    for kernel in ("backward", "sample_backward"):
        stores = rows(document)[kernel]["stores"]
        assert max(stores, key=stores.__getitem__) == "16", kernel


@pytest.mark.slow
def test_bounds_stay(document):
    """Bytes/s that the narrowest pipe of an H100 would allow, as found (kernels/LOG.md), less 3 %."""
    found = {"capacitance": 4.79, "residual": 11.2, "backward": 4.6, "sample": 8.8, "sample_backward": 10.0}
    for kernel, bound in found.items():
        assert min(rows(document)[kernel]["caps"].values()) > 0.97e12 * bound, kernel


@pytest.mark.slow
def test_nothing_is_asked_for_twice(document):
    for row in document["requested"]["25:BRN"]:
        if row["floor"]:
            assert 1 <= row["requested"] / row["floor"] <= 1.05, row


def test_widths_and_model():
    pytest.importorskip("triton")
    from bench.static.compiled import width
    from bench.static.model import CLOCK, MULTIPROCESSORS, caps

    assert [width(i) for i in ("LDG.E.128", "STG.E", "LDS.64", "LDSM.16.M88.4", "LDG.E.U8")] == [16, 4, 8, 16, 1]
    rate = MULTIPROCESSORS * CLOCK * 1024
    found = caps(Counter({"LDG.E.128": 2, "FFMA": 30, "DFMA": 4, "MUFU.RCP": 1}), 1, 1024)
    assert found == {
        "issue": rate / (37 / 4),
        "load/store": rate / 2,
        "L1": rate / 8,
        "float64": rate / 2,
        "special": rate / 2,
    }
