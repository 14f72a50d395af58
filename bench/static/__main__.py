"""Compiles every kernel for every target, and prints what the machine code and the interpreter say of it.

python -m bench.static                      everything (minutes)
python -m bench.static --rank 25 --target sm_90 --json static.json
"""

import argparse
import json
from pathlib import Path

from . import model
from .compiled import TARGETS, compile_launch
from .launches import Case, captured
from .requested import in_interpreter

HEADER = (
    f"{'kernel':22}{'target':8}{'case':26}{'regs':>5}{'spill':>6}{'shared':>8}{'occ.':>6}{'flight':>8}"
    f"{'loads':>18}{'stores':>11}{'tensor':>7}{'ins/B':>7}{'cap':>7}  by"
)


def measure(case: Case, target: str) -> list[dict]:
    """One row per distinct launch of a step."""
    rows = []
    nvidia = target != "gfx942"
    for launch in captured(case, target if nvidia else "gfx", nvidia and target != "sm_75", matrix_float64=nvidia):
        built = compile_launch(launch, target)
        row = {
            "kernel": launch.name,
            "case": case.name,
            "target": target,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "registers": built.registers,
            "spills": built.spills,
            "shared": built.shared,
            "occupancy": built.occupancy,
        }
        name = launch.kernel.fn.__name__.removesuffix("_kernel")
        if nvidia and name in ("capacitance", "residual", "backward", "sample", "sample_backward"):
            size = case.R * launch.arguments["BLOCK_N"] * case.dtype.itemsize
            loads, stores = built.widths("LDG", "LDGSTS"), built.widths("STG")
            instructions = sum(built.loop.values())
            moved = size * (2 if name == "backward" else 1)
            row |= {
                "loads": loads,
                "stores": stores,
                "tensor": sum(n for i, n in built.loop.items() if i.split(".")[0] in ("HMMA", "HGMMA", "DMMA")),
                "instructions_per_byte": instructions * launch.num_warps * 32 / moved,
                "bytes_in_flight": built.programs * size * max(1, launch.num_stages - 1),
            }
            if target == "sm_90":
                row["caps"] = model.caps(built.loop, launch.num_warps, moved)
        rows.append(row)
    return rows


def line(row: dict) -> str:
    def widths(name):
        return " ".join(f"{n}×{w}" for w, n in row.get(name, {}).items())

    occupancy = "" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
    text = f"{row['kernel']:22}{row['target']:8}{row['case']:26}{row['registers']:5}{row['spills']:6}{row['shared']:8}"
    text += f"{occupancy:>6}"
    if "loads" in row:
        text += f"{row['bytes_in_flight']:8}{widths('loads'):>18}{widths('stores'):>11}{row['tensor']:7}"
        text += f"{row['instructions_per_byte']:7.2f}"
    if "caps" in row:
        pipe = min(row["caps"], key=row["caps"].__getitem__)
        text += f"{row['caps'][pipe] / 1e12:7.2f}  {pipe}"
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, nargs="+", default=[10, 25, 64], help="ranks R")
    parser.add_argument("--layout", nargs="+", choices=["BRN", "BNR"], default=["BRN", "BNR"], help="P in memory")
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--no-requested", action="store_true", help="leave out the bytes counted in the interpreter")
    options = parser.parse_args(arguments)
    print(model.ASSUMPTIONS, HEADER, sep="\n\n")
    cases = [Case(R, layout) for R in options.rank for layout in options.layout]
    rows = []
    for target in options.target:
        for case in cases:
            for row in measure(case, target):
                rows.append(row)
                print(line(row), flush=True)
    requested = {}
    if not options.no_requested:
        requested = in_interpreter([(case.R, case.layout) for case in cases])
        print("\nBytes requested per launch (interpreter, one item, N = 12288) over the least possible")
        for name, launches in requested.items():
            for row in launches:
                if row["floor"]:
                    ratio = row["requested"] / row["floor"]
                    print(f"{row['kernel']:22}{name:10}{row['requested']:12}{ratio:8.3f}")
    if options.json:
        document = {"assumptions": model.ASSUMPTIONS, "kernels": rows, "requested": requested}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
