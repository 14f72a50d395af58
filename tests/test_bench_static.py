"""The static benchmark: its reading of machine code, its model, and the bounds that it found and that must stay.

It compiles, so Triton must not be interpreting: a process of its own, like the interpreter's (test_triton_session.py).
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """One rank, one layout, one target of each vendor."""
    path = tmp_path_factory.mktemp("static") / "static.json"
    # Coverage is not asked for here, and doubles the interpreter's time.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("COVERAGE_")}
    env["PYTHONPATH"] = os.pathsep.join(p or "." for p in sys.path)
    env["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    command = [sys.executable, "-m", "bench.static", "--rank", "25", "--layout", "BRN", "--json", str(path)]
    command += ["--target", "sm_90", "gfx942"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not timings" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))


def rows(document, target="sm_90", dtype="float32"):
    return {row["kernel"]: row for row in document["kernels"] if row["target"] == target and dtype in row["case"]}


@pytest.mark.slow
def test_no_spills(document):
    assert {name: row["spills"] for name, row in rows(document).items() if row["spills"]} == {}
    half = rows(document, dtype="bfloat16")
    assert {"capacitance", "capacitance (float64)", "backward", "sample"} <= half.keys()
    assert not any(row["spills"] for row in half.values())
    residual = rows(document)["residual"]
    rank, columns = residual["tile"]
    assert rank == 25
    assert residual["bytes_in_flight"] == residual["programs"] * rank * columns * 4  # one stage
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
    found = {"capacitance": 6.6, "residual": 11.2, "backward": 8.6, "sample": 8.8, "sample_backward": 10.0}
    for kernel, bound in found.items():
        assert min(rows(document)[kernel]["caps"].values()) > 0.97e12 * bound, kernel
    assert rows(document)["capacitance"]["bank_conflicts"] == {"LDSM": 1.0, "LDGSTS": 1.0}
    assert all(row["steps_in_a_turn"] == 1 for row in document["kernels"] if "caps" in row)


@pytest.mark.slow
def test_nothing_is_asked_for_twice(document):
    for row in document["requested"]["25:BRN"]:
        if row["floor"]:
            assert 1 <= row["requested"] / row["floor"] <= 1.05, row


@pytest.mark.slow
def test_bars(document):
    bars = {bar["name"]: bar["reached"] for bar in document["bars"]}
    assert {name for name in bars if name.startswith("capacitance")} == {
        "capacitance ≥ 4.5 TB/s, BRN",
        "capacitance in flight ≥ 13.6 kB, BRN",
        "capacitance moves P 16 bytes at a time, BRN",
        "capacitance asks for ≤ 1.05 × the least",
    }
    assert all(bars.values()), bars


def test_widths():
    pytest.importorskip("triton")
    from bench.static.machine_code import width, widths

    names = ("LDG.E.128", "STG.E", "LDS.64", "LDSM.16.M88.4", "LDG.E.U8", "global_load_dwordx4", "global_load_dword")
    assert [width(name) for name in names] == [16, 4, 8, 16, 1, 16, 4]
    assert widths(Counter({"LDG.E.128": 2, "LDGSTS.E.64": 1, "STG.E": 5}), "LDG") == {8: 1, 16: 2}


def test_model():
    pytest.importorskip("triton")
    from bench.static.model import CLOCK, MULTIPROCESSORS, SYNC, caps

    rate = MULTIPROCESSORS * CLOCK * 1024
    found = caps(Counter({"LDG.E.128": 2, "FFMA": 30, "DFMA": 4, "MUFU.RCP": 1, "LOP3.LUT": 4}), 1, 1024)
    assert found == {
        "issue": rate / (41 / 4),
        "load/store": rate / 2,
        "L1": rate / 8,
        "float64": rate / 2,
        "special": rate / 2,
        "integer": rate / 2,
    }
    # 16 × 8 × 8 products and additions by mma.sync; 64 × 64 × 8 by four warps, one operand in shared memory.
    assert caps(Counter({"HMMA.1688.F32.TF32": 1}), 1, 1024)["tensor"] == pytest.approx(rate * SYNC)
    group = caps(Counter({"HGMMA.64x64x8.F32.TF32.RS": 1}), 4, 4096)
    assert group["tensor"] == pytest.approx(rate / 8)
    assert group["shared"] == pytest.approx(rate / 4)
    assert caps(Counter({"HGMMA.64x64x8.F32.TF32.SS": 1}), 4, 4096)["shared"] == pytest.approx(rate / 8)
    assert caps(Counter({"LDSM.16.M88.4": 1}), 1, 1024, {"LDSM": 8.0})["shared"] == rate / 32


def test_main_loop():
    pytest.importorskip("triton")
    from bench.static.machine_code import nvidia_loop

    code = """
.L_x_0:
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/              @P1  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/             @!PT  LDS RZ, [RZ] ;
        /*0040*/                   HGMMA.64x64x8.F32.TF32 R24, R4, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24 ;
.L_x_2:
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/              @P2  BRA `(.L_x_2) ;
        /*0080*/              @P0  BRA `(.L_x_1) ;
        /*0090*/                   STG.E desc[UR4][R2.64], R4 ;
"""
    assert nvidia_loop(code) == {
        "LDG.E.128": 1,
        "HGMMA.64x64x8.F32.TF32.RS": 1,
        "HGMMA.64x64x8.F32.TF32.SS": 1,
        "FADD": 1,
        "BRA": 2,
    }


def test_bank_conflicts():
    pytest.importorskip("triton")
    from bench.static.banks import clocks, conflicts

    lanes = np.arange(32)
    assert clocks(4 * lanes, 4) == 1
    assert clocks(0 * lanes, 4) == 1  # one word for all
    assert clocks(8 * lanes, 4) == 2
    assert clocks(128 * lanes, 4) == 32
    assert clocks(16 * lanes, 16) == 4
    assert clocks(256 * lanes[:8], 16) == 8  # rows of a tile that is not swizzled
    rows = """
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 7;
        shl.b32 %r3, %r2, 8;
        {shift}
        mov.b32 %r5, global_smem;
        add.s32 %r6, %r5, %r4;
$L__BB0_1:
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r6];
        @%p1 bra $L__BB0_1;
        st.shared.b32 [%r3], %r7;
"""
    plain = "add.s32 %r4, %r3, 0;"
    swizzled = "shl.b32 %r11, %r2, 4;\n        xor.b32 %r4, %r3, %r11;"
    assert conflicts(rows.format(shift=plain)) == {"LDSM": 8.0}
    assert conflicts(rows.format(shift=swizzled)) == {"LDSM": 1.0}


def test_verdict():
    pytest.importorskip("triton")
    from bench.static.verdict import verdict

    row = {
        "kernel": "capacitance",
        "case": "R=10 BRN float32 pixel",
        "R": 10,
        "layout": "BRN",
        "target": "sm_90",
        "spills": 0,
        "loads": {8: 1, 16: 5},
        "stores": {},
        "tile_in_16_bytes": 5,
        "reads_tile": True,
        "writes_tile": False,
        "bytes_in_flight": 38400,
        "caps": {"issue": 5e12, "shared": 4.8e12},
    }
    requested = {"10:BRN": [{"kernel": "capacitance", "requested": 104, "floor": 100}]}
    assert all(bar.reached for bar in verdict([row], requested))
    worse = [
        {"spills": 8},
        {"programs": 0, "shared": 300_000},
        {"caps": {"issue": 4.4e12}},
        {"loads": {4: 20, 16: 4}},
        {"bytes_in_flight": 10400},  # 13.5 kB with x, μ and d
        {"error": "given up after 120 s"},
    ]
    for change in worse:
        assert sum(not bar.reached for bar in verdict([row | change], requested)) == 1, change
    for bytes_requested in (106, 5):  # the latter of a kernel that left its work to another
        missed = verdict([row], {"10:BRN": [{"kernel": "capacitance", "requested": bytes_requested, "floor": 100}]})
        assert [bar.name for bar in missed if not bar.reached] == ["capacitance asks for ≤ 1.05 × the least"]


@pytest.mark.parametrize("target", ["sm_75", "sm_90", "gfx942"])
def test_every_configuration_is_captured(target):
    """What `--all` compiles: each case launches its kernels, those of given noise and of conditioning among them."""
    pytest.importorskip("triton")
    from bench.static.launches import all_cases, captured

    seen = {launch.name for case in all_cases([25, 200], ["BRN", "BNR"]) for launch in captured(case, target)}
    assert {"capacitance", "residual", "backward", "sample", "sample_backward", "gram"} <= seen


def test_all_has_what_changes_a_launch():
    pytest.importorskip("triton")
    from bench.static.launches import all_cases, all_linear_cases, captured

    def seen(cases, kernel, look):
        return {look(l.arguments) for case in cases for l in captured(case, "sm_90") if l.name == kernel}

    def given(*names):
        return lambda arguments: tuple(arguments[name] is not None for name in names)

    def dtypes(*names):
        return lambda arguments: tuple(arguments[name] and arguments[name][0].dtype for name in names)

    def alignment(arguments):
        return arguments["TILE"].ALIGN

    full, linear = [*all_cases([25], ["BRN"])], [*all_linear_cases([64], ["BKM"])]
    gradients = given("grad_x_ptr", "grad_loc_ptr", "grad_P_at", "grad_d_ptr")
    assert seen(full, "backward", gradients) == {(True,) * 4, (False, True, True, False), (False, False, True, True)}
    samples = seen(full, "sample", lambda a: (a["cut"][2], a["omega_d_at"] is not None))
    assert samples == {(1, False), (1, True), (20, False)}
    means = seen(full, "backward", lambda a: (a["sizes"][0], a["SAMPLES"]))
    assert {(0, "own"), (1, "one"), (2, "share"), (2, "own")} <= means
    half = (torch.float32, torch.bfloat16, torch.float32)
    assert half in seen(full, "capacitance", dtypes("x_at", "P_at", "d_at"))
    assert seen(full, "residual", alignment) == {1, 4, 16}
    assert half in seen(linear, "linear_moments", dtypes("x_at", "F_at", "d_at"))
    assert seen(linear, "linear_residual", alignment) == {1, 4, 16}
    flags = seen(linear, "linear_residual", lambda a: (a["loc_at"] is not None, a["INVERTED"], a["u_ptr"] is not None))
    assert {(False, False, True), (True, False, True), (True, True, False)} <= flags
    assert seen(linear, "linear_sample", given("loc_at", "omega_d_at")) == {(False, False), (True, True)}
    assert (False, True, False) in seen(linear, "linear_backward", given("grad_x_ptr", "grad_F_at", "grad_d_ptr"))
    names = [case.name for case in linear]
    assert "K=64 BKM bfloat16 item others=float32 grads=F" in names


def test_what_several_cases_launch_is_compiled_once():
    pytest.importorskip("triton")
    from bench.static.launches import Case, LinearCase, all_linear_cases, captured, distinct

    cases = [Case(25), Case(25, diagonal="item"), Case(25), Case(25, "BNR"), LinearCase(64)]
    tasks = list(distinct((case, target) for target in ("sm_80", "sm_90") for case in cases))
    assert [(case, target) for case, target, _ in tasks] == [
        (case, target) for target in ("sm_80", "sm_90") for case in (cases[0], cases[1], cases[3], cases[4])
    ]
    names = [[captured(case, target)[i].name for i in new] for case, target, new in tasks[:3]]
    assert "refine" in names[0]
    assert "refine" not in names[1]  # which knows nothing of d, nor of the layout
    assert "refine" not in names[2]
    assert "residual" in names[2]
    assert {case.dtype for case in all_linear_cases([64], ["BKM"])} >= {torch.float32, torch.bfloat16}


def test_a_linear_factor_is_covered(monkeypatch, capsys):
    """Both diagonals and layouts on every target, their own kernels only, and bytes over the least with one d."""
    pytest.importorskip("triton")
    from bench.static import __main__ as static
    from bench.static.launches import LinearCase, captured

    asked = {}
    row = {"kernel": "linear_backward", "case": "K=64 BKM float32 item", "target": "sm_80", "spills": 8, "shared": 0}
    row |= {"registers": 255, "occupancy": 0.125}
    bytes_of = [{"kernel": "linear_moments", "requested": 106, "floor": 100}]
    monkeypatch.setattr(static, "compile_all", lambda tasks, *rest: [row] if asked.update(tasks=tasks) is None else [])
    monkeypatch.setattr(static, "in_interpreter", lambda cases: asked.update(counted=cases) or {"64:BKM": bytes_of})
    assert static.main(["--check"]) == 1
    output = capsys.readouterr().out
    assert "NO  no spills, sm_80" in output
    assert "NO  linear_moments asks for ≤ 1.05 × the least" in output
    linear = [(case, target) for case, target in asked["tasks"] if isinstance(case, LinearCase)]
    assert {(case[:4], target) for case, target in linear} == {
        ((K, layout, torch.float32, diagonal), target)
        for K in (64, 256)
        for layout in ("BKM", "BMK")
        for diagonal in ("item", "pixel")
        for target in TARGETS
    }
    assert asked["counted"][-2:] == [(64, "BKM"), (64, "BMK")]
    static.main(["--features", "16"])
    assert {case.rows for case, _ in asked["tasks"]} == {16}
    static.main(["--rank", "25"])
    assert not any(isinstance(case, LinearCase) for case, _ in asked["tasks"])
    static.main(["--all", "--no-requested"])
    assert {case.rows for case, _ in asked["tasks"] if isinstance(case, LinearCase)} >= {32, 64, 128, 200}
    assert {case.rows for case, _ in asked["tasks"] if not isinstance(case, LinearCase)} >= {16, 32, 64, 128, 200}

    parts = ("linear_moments", "linear_residual", "linear_backward", "linear_sample")
    for layout in ("BKM", "BMK"):
        launches = {launch.name: launch for launch in captured(LinearCase(64, layout, B=1, pixels=64), "sm_80")}
        assert launches.keys() == {*parts, "linear_moments (float64)", "linear_backward (float64)"}
        assert all(launches[name].tile_size[0] == 64 for name in parts)
        assert all(launches[name].tile.shape == (1, 64, 64) for name in parts)
        many = {launch.name for launch in captured(LinearCase(256, layout, B=1, pixels=64), "sm_80")}
        assert many == {"linear_residual", "linear_sample", "product", "product (float64)"}
        sizes = {launch.sizes for launch in captured(LinearCase(256, layout, B=1, pixels=64), "sm_80")}
        assert sizes == {None, "75×256×64", "78×64×256", "256×78×64"}  # P, grad_W and grad_m, grad_F


def _hang(case, target, i):
    """The second launch never ends, the fourth kills its compiler."""
    if i == 1:
        time.sleep(60)
    if i == 3:
        os._exit(1)
    return {"registers": i}


def test_a_compiler_that_hangs_or_dies_costs_one_row(monkeypatch):
    pytest.importorskip("triton")
    from bench.static import children
    from bench.static.launches import Case, captured

    monkeypatch.setattr(children, "compiled", _hang)
    monkeypatch.setattr(children, "distinct", lambda tasks: [(*task, [0, 1, 2, 3, 4]) for task in tasks])
    fork = multiprocessing.get_context("fork")  # "_hang" as it is here, and nothing imported again
    monkeypatch.setattr(children.multiprocessing, "get_context", lambda kind: fork)
    rows = children.compile_all([(Case(3), "sm_90")], 1, 1.0, lambda row: None)
    assert [row["kernel"] for row in rows] == [launch.name for launch in captured(Case(3), "sm_90")[:5]]
    found = [row.get("registers", row.get("error")) for row in rows]
    assert found == [0, "given up after 1 s", 2, "the compiler died", 4]
