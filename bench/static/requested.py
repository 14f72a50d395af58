"""Bytes that each launch asks for, counted in Triton's interpreter, over the least it could ask for.

Run with TRITON_INTERPRET=1, in a process of its own: `python -m bench.static.requested R:layout ...` writes JSON. With
the layout BKM or BMK it is a linear factor of R features, with one d for each item.
"""

import json
import os
import subprocess
import sys
from unittest.mock import patch

import torch

B, N = 1, 12288
LINEAR_N = 12_288


def count(R: int, layout: str) -> list[dict]:
    """One row per kernel launch of a step, float32, per-pixel d (one d, if the factor is linear)."""
    from triton.runtime.interpreter import InterpreterBuilder

    from lowrank_mvn.device import launch as launches

    from .launches import Case, Launch, LinearCase

    linear = "K" in layout
    case = LinearCase(R, layout, B=B, pixels=LINEAR_N) if linear else Case(R, layout, B=B, N=N)
    total = 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        nonlocal total
        total += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        nonlocal total
        total += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *rest)

    rows = []
    plain = launches.launch

    def launch(kernel, grid, num_warps, num_stages=1, **arguments):
        nonlocal total
        total = 0
        plain(kernel, grid, num_warps, num_stages, **arguments)
        name = kernel.fn.__name__.removesuffix("_kernel")
        if linear and not name.startswith("linear"):
            return
        if not Launch(kernel, grid, num_warps, num_stages, arguments).wide:
            least = linear_floor(name, R, case.S * case.channels) if isinstance(case, LinearCase) else floor(name, R)
            rows.append({"kernel": name, "requested": total, "floor": least})

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)  # columns of one sign are collinear enough to be left to float64

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        patch.object(launches, "launch", launch),
    ):
        case.step(make)
    return rows


def floor(name: str, R: int) -> int | None:
    """Bytes of the arguments, each once: P [N, R], columns [N], and what is R×R or smaller."""
    P, column = 4 * N * R, 4 * N
    return {
        "capacitance": P + 3 * column + 4 * R * (R + 1) // 2 + 4 * R + 8,
        "residual": P + 4 * column + 16 * R + 8,
        "backward": 2 * P + 5 * column + 8 * R * R + 16 * R + 24,
        "sample": P + 3 * column + 4 * R + 8,
        "sample_backward": P + 3 * column + 4 * R + 8,
    }.get(name)


def linear_floor(name: str, K: int, columns: int) -> int | None:
    """Likewise: F [K, LINEAR_N], its gradient, and columns of x, the residual, their gradient, loc and a sample."""
    F, column = 4 * K * LINEAR_N, 4 * columns * LINEAR_N
    return {
        "linear_moments": F + column,
        "linear_residual": F + 2 * column,
        "linear_backward": 2 * F + 2 * column,
        "linear_sample": F + 2 * column,
    }.get(name)


def in_interpreter(cases: list[tuple[int, str]]) -> dict[str, list[dict]]:
    """`count` of each case, in a process of its own."""
    command = [sys.executable, "-m", "bench.static.requested", *(f"{R}:{layout}" for R, layout in cases)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    print(json.dumps({case: count(int(case.split(":")[0]), case.split(":")[1]) for case in sys.argv[1:]}))
