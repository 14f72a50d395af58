"""The same of the kernels of a linear factor: `python -m bench.static.linear`; bytes are those of the features F."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from lowrank_mvn.triton import common, linear

from . import model
from .compiled import TARGETS, compile_launch
from .launches import Launch, dispatching


class LinearCase(NamedTuple):
    """One problem; the layout of F is channels first ("BKM") or last ("BMK")."""

    K: int
    layout: str = "BKM"
    dtype: torch.dtype = torch.float32
    diagonal: str = "item"
    R: int = 25
    C: int = 3
    B: int = 8
    M: int = 12288
    S: int = 1

    @property
    def name(self) -> str:
        return f"K={self.K} {self.layout} {str(self.dtype).removeprefix('torch.')} {self.diagonal}"


def linear_step(case: LinearCase, make: Callable[..., torch.Tensor]) -> None:
    """Log-density and entropy with every gradient."""
    dtype, K, R, C, B, M, S = case.dtype, case.K, case.R, case.C, case.B, case.M, case.S
    F = make(B, K, M).to(dtype) if case.layout == "BKM" else make(B, M, K).to(dtype).mT
    W, m = make(1, C, R, K + 1).to(dtype), make(C, K + 1).to(dtype)
    d = (make(B, C, M) if case.diagonal == "pixel" else make(B, 1, 1)).abs() + 0.5
    x = make(S, B, C, M).to(dtype)
    q, logdet, *kept = linear.linear_mahalanobis_and_logdet(x, None, F, W, m, d)
    linear.linear_mahalanobis_and_logdet_backward(q, logdet, x, None, F, W, m, d, *kept, [True] * 3)


def captured(case: LinearCase, tensor_cores: bool = True, matrix_float64: bool = True) -> list[Launch]:
    """The launches of a step that are a linear factor's own."""
    seen: list[Launch] = []

    def launch(kernel, grid, num_warps, num_stages=1, **arguments):
        seen.append(Launch(kernel, grid, num_warps, num_stages, arguments))

    with dispatching(tensor_cores, matrix_float64), patch.object(common, "launch", launch):
        linear_step(case, torch.zeros)
    return [launch for launch in seen if launch.name.startswith("linear")]


def measure(case: LinearCase, target: str) -> list[dict]:
    """One row per distinct launch."""
    rows = []
    nvidia = target != "gfx942"
    for launch in captured(case, tensor_cores=nvidia and target != "sm_75", matrix_float64=nvidia):
        built = compile_launch(launch, target)
        row = {
            "kernel": launch.name,
            "case": case.name,
            "target": target,
            "num_warps": launch.num_warps,
            "registers": built.registers,
            "spills": built.spills,
            "shared": built.shared,
            "occupancy": built.occupancy,
        }
        if target == "sm_90" and not launch.arguments.get("WIDE"):
            size = case.K * launch.arguments["BLOCK_N"] * case.dtype.itemsize
            moved = size * (2 if launch.name == "linear_backward" else 1)
            row["caps"] = model.caps(built.loop, launch.num_warps, moved)
        rows.append(row)
    return rows


def line(row: dict) -> str:
    occupancy = "" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
    text = f"{row['kernel']:26}{row['target']:8}{row['case']:28}{row['num_warps']:3}{row['registers']:5}"
    text += f"{row['spills']:6}{row['shared']:8}{occupancy:>6}"
    for pipe, cap in sorted(row.get("caps", {}).items(), key=lambda item: item[1])[:3]:
        text += f"{cap / 1e12:7.2f} {pipe}"
    return text


def requested(case: LinearCase) -> list[dict]:
    """Bytes that each launch asks for, and the least it could ask for; in Triton's interpreter, as in `requested`.

    The floor is each argument once: F, its gradient, the columns of x, r, d and their gradients.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    total = 0
    load, store, plain = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, common.launch

    def size(pointers, mask):
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *rest):
        nonlocal total
        total += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        nonlocal total
        total += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    rows = []
    features = case.B * case.K * case.M * case.dtype.itemsize
    column = 4 * case.B * case.C * case.M
    per_pixel = column if case.diagonal == "pixel" else 0
    floors = {
        "linear_gram": features + case.S * column + per_pixel,
        "linear_residual": features + 2 * case.S * column + per_pixel,
        "linear_backward": 2 * features + 2 * case.S * column + 2 * per_pixel,
    }

    def launch(kernel, grid, num_warps, num_stages=1, **arguments):
        nonlocal total
        total = 0
        plain(kernel, grid, num_warps, num_stages, **arguments)
        name = kernel.fn.__name__.removesuffix("_kernel")
        if name in floors and not arguments.get("WIDE"):
            rows.append({"kernel": name, "case": case.name, "requested": total, "floor": floors[name]})

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        patch.object(common, "launch", launch),
    ):
        linear_step(case, torch.randn)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static.linear", description=__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 64], help="numbers of features K")
    parser.add_argument("--layout", nargs="+", choices=["BKM", "BMK"], default=["BKM", "BMK"], help="F in memory")
    parser.add_argument("--diagonal", nargs="+", choices=["item", "pixel"], default=["item", "pixel"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of F")
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--requested", action="store_true", help="count bytes instead, with TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    if options.requested:
        for layout in options.layout:
            for diagonal in options.diagonal:
                for row in requested(LinearCase(64, layout, diagonal=diagonal, B=1)):
                    print(f"{row['kernel']:18}{row['case']:28}{row['requested'] / row['floor']:8.3f}", flush=True)
        return
    print(model.ASSUMPTIONS, "", sep="\n")
    rows = []
    for target in options.target:
        for K in options.features:
            for layout in options.layout:
                for dtype in options.dtype:
                    for diagonal in options.diagonal:
                        case = LinearCase(K, layout, getattr(torch, dtype), diagonal)
                        for row in measure(case, target):
                            rows.append(row)
                            print(line(row), flush=True)
    if options.json:
        document = {"assumptions": model.ASSUMPTIONS, "kernels": rows}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
