"""Compiles every kernel for every target, and prints what the machine code and the interpreter say of it.

python -m bench.static                      R = 10, 25, 64, and a linear factor of 64 features; float32, both layouts,
                                            all targets; R = 25 in bfloat16, and 256 features (minutes)
python -m bench.static --features 16 64     linear factors alone, R = 25, C = 3, one d and a d per pixel
python -m bench.static --stencils           stencils alone: 3×3, 5×5, channels, a volume
python -m bench.static --rank 25 --target sm_90 --json static.json
python -m bench.static --all                dtypes, diagonals, channels, several samples, padded sizes (hours)
python -m bench.static --check              fails where a bar is not reached
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sosvae.files import write_atomically

from . import model
from .children import compile_all
from .compiled import TARGETS
from .launches import AnyCase, Case, LinearCase, all_cases, all_linear_cases, stencil_cases
from .requested import in_interpreter
from .verdict import verdict

# sm_86 takes sm_80's launches, where they fit its shared memory.
DEFAULT_TARGETS = [target for target in TARGETS if target != "sm_86"]
# Ranks that fill their padding and ranks that do not, and one that is walked over in tiles.
ALL_RANKS = [10, 16, 25, 32, 48, 64, 100, 128, 200]
# One number of features for every padded one, and one that no tile holds.
ALL_FEATURES = [10, 32, 64, 128, 200]


# The layout of F in which columns are neighbours where those of P are.
LINEAR_LAYOUT = {"BRN": "BKM", "BNR": "BMK"}


SHOWN = "registers", "spills", "shared", "occupancy", "loads", "stores", "tensor", "instructions_per_byte", "error"


def line(row: dict) -> str:
    """What is known of a kernel, in the words of the JSON; the most that each pipe allows, in TB/s of P, the narrowest
    first."""
    shown = {name: row[name] for name in SHOWN if name in row}
    if "tile" in row:
        shown["in flight"] = model.in_flight(row)
    if "caps" in row:
        caps = sorted(row["caps"].items(), key=lambda cap: cap[1])
        shown["at most"] = " ".join(f"{pipe} {cap / 1e12:.1f}" for pipe, cap in caps)
    words = (f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())
    return f"{row['kernel']} {row.get('sizes', '')} {row['case']}, {row['target']}: " + ", ".join(words)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, nargs="+", help="ranks R (default: 10 25 64)")
    parser.add_argument("--features", type=int, nargs="+", help="features K of a linear factor (default: 64)")
    parser.add_argument("--stencils", action="store_true", help="the kernels of a stencil")
    parser.add_argument(
        "--layout", nargs="+", choices=["BRN", "BNR"], default=["BRN", "BNR"], help="P in memory (F, likewise)"
    )
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=DEFAULT_TARGETS)
    parser.add_argument("--all", action="store_true", help="all dtypes, diagonals, channels, samples, and padded sizes")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a bar is not reached")
    parser.add_argument("--no-requested", action="store_true", help="leave out the bytes counted in the interpreter")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at once")
    parser.add_argument("--seconds", type=float, default=120.0, help="to give up the compilation of one kernel after")
    options = parser.parse_args(arguments)
    print(model.ASSUMPTIONS)
    named = options.rank or options.features or options.stencils
    ranks = options.rank or ([] if named else [10, 25, 64])
    features = options.features or ([] if named else [64])
    plain = [Case(R, layout) for R in ranks for layout in options.layout]
    one_d = [LinearCase(K, LINEAR_LAYOUT[layout]) for K in features for layout in options.layout]
    # Half precision is loaded, and given to matrix products, in ways of its own.
    halves = [Case(R, layout, torch.bfloat16) for R in ranks if R == 25 for layout in options.layout]
    cases: list[AnyCase] = [*plain, *halves]
    # More features than a tile holds: blocks of P.
    many = [] if named else [LinearCase(256, LINEAR_LAYOUT[layout]) for layout in options.layout]
    cases += [case._replace(diagonal=diagonal) for case in (*one_d, *many) for diagonal in ("item", "pixel")]
    if options.all:
        own = [LINEAR_LAYOUT[layout] for layout in options.layout]
        cases = [*all_cases(options.rank or ([] if named else ALL_RANKS), options.layout)]
        cases += all_linear_cases(options.features or ([] if named else ALL_FEATURES), own)
    if options.stencils or not named:
        cases += stencil_cases(options.all)
    tasks = [(case, target) for target in options.target for case in cases]
    rows = compile_all(tasks, options.processes, options.seconds, lambda row: print(line(row), flush=True))
    rows.sort(key=lambda row: (options.target.index(row["target"]), row["case"], row["kernel"]))
    requested = {}
    if not options.no_requested:
        requested = in_interpreter([(case.rows, case.layout) for case in (*plain, *one_d)])
        print("\nBytes requested per launch (interpreter, one item) over the least possible")
        for name, launches in requested.items():
            for row in launches:
                if row["floor"]:
                    print(f"{row['kernel']:26}{name:10}{row['requested']:12}{row['requested'] / row['floor']:8.3f}")
    bars = verdict(rows, requested)
    print("\nTo reach, and what is seen (float32, per-pixel d, sm_90 where no target is named)")
    for bar in bars:
        print(f"{'yes' if bar.reached else 'NO ':4}{bar.name:56}{bar.seen[:400]}")
    if options.json:
        document = {
            "assumptions": model.ASSUMPTIONS,
            "kernels": rows,
            "requested": requested,
            "bars": [bar._asdict() for bar in bars],
        }
        write_atomically(options.json, _a_row_a_line(document).encode())
    return int(options.check and not all(bar.reached for bar in bars))


def _a_row_a_line(document: dict[str, Any]) -> str:
    """JSON in which each kernel, each launch and each bar has a line, so that a difference shows what changed."""

    def rows(value: Any, indent: str) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"{indent} {_json(row)}" for row in value) + f"\n{indent}]"
        if isinstance(value, dict) and value:
            inner = (f"{indent} {_json(name)}: {rows(part, indent + ' ')}" for name, part in value.items())
            return "{\n" + ",\n".join(inner) + f"\n{indent}}}"
        return _json(value)

    return rows(document, "") + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
