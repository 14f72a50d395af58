"""Sweeps the launches of the kernels on a GPU: `pytest --benchmark --tune`, which takes up to an hour.

What can be chosen is one `Block` (warps, columns, stages) for each kernel, padded rank and layout: a cell. The cells
are those that `launch.block` is asked for while a step runs. The kernels of a linear factor (linear_moments,
linear_residual, linear_backward, linear_sample, and these with an ending) are looked up likewise, but left out here:
what their registers hold depends on the number of channels, which a cell does not know. So is the backward pass of
several samples or half precision (backward_sparing): no step here launches it; and what walks over tiles of R with a
launch of its own (`launch.tiled_block`) is not looked up. In each of the others

1. every candidate computes a whole step, and is left out if it does not compile, if it spills registers, or if a result
   differs from that of the launch that comes with the package;
2. the launches of the cell alone are timed, once for all that are left, then round by round for the fastest of them and
   the one that comes with the package;
3. the fastest is kept if it wins by more than the spread, and if it computes the same in other dtypes, with a scalar
   diagonal, several samples and, where they share the cell, ranks of several tiles.

The table is written to the user's folder (`lowrank_mvn.device.tuned`), a cell at a time. Clocks are left alone.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from lowrank_mvn.device import launch, tuned
from lowrank_mvn.device.launch import Block
from lowrank_mvn.factors.dense import triton as kernels
from sosvae.files import write_atomically

from .measure import percentile
from .static.launches import Case, Launch

__all__ = ["CASES", "Device", "Sweep", "candidates", "gpu", "sweep", "tune", "write"]

RANKS = (10, 25, 64, 100)  # one for each padded rank
CASES = [Case(R, layout, B=16, N=3 * 128 * 128) for R in RANKS for layout in ("BRN", "BNR")]  # past the last cache
TURN = 20  # ms; the median of its calls
ROUNDS = 7
FINALISTS = 4
VALUES = (8, 64)  # least and most of a tile for each lane: fewer leave it idle, more do not fit its registers
# Two launches of a kernel differ by the rounding of what they add up in another order.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Device:
    """Where to measure, and with what."""

    name: str
    device: torch.device
    seconds: Callable[[Sequence[Launch]], float]  # of one turn


def gpu() -> Device:
    """The current CUDA or ROCm device, timed by Triton: between events, the cache overwritten before each call."""
    device = torch.device("cuda", torch.cuda.current_device())

    def seconds(launches: Sequence[Launch]) -> float:
        return do_bench(lambda: [run(one) for one in launches], warmup=1, rep=TURN, return_mode="median") / 1e3

    return Device(torch.cuda.get_device_name(device), device, seconds)


@dataclass
class Sweep:
    """What came out for one cell."""

    cell: tuned.Key
    default: Block
    best: Block | None = None  # None where nothing beats the default
    before: float = 0.0  # seconds
    after: float = 0.0
    spread: float = 0.0  # of before or after, the larger
    tried: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kernel, block_r, by_column = self.cell
        lines = f"{kernel}, R ≤ {block_r}, {'[B, R, N]' if by_column else '[B, N, R]'}: {_shape(self.default)}"
        if self.best is None:
            lines += f" stays, {1e6 * self.before:.1f} µs"
        else:
            lines += f", {1e6 * self.before:.1f} µs → {_shape(self.best)}, {1e6 * self.after:.1f} µs"
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{lines} (± {1e6 * self.spread:.1f}; {self.tried} tried{', ' if reasons else ''}{reasons})"


def _shape(block: Block) -> str:
    return f"{block.num_warps} × {block.columns} × {block.num_stages}"


def candidates(block_r: int) -> list[Block]:
    """All warps × columns × stages with a reasonable number of values per lane."""
    least, most = VALUES
    return [
        Block(warps, columns, stages)
        for warps in tuned.ALLOWED["num_warps"]
        for columns in tuned.ALLOWED["columns"]
        for stages in tuned.ALLOWED["num_stages"]
        if warps <= 8 and stages <= 3 and least <= block_r * columns / (32 * warps) <= most
    ]


def run(one: Launch) -> Any:
    """Starts it again; kernels write what they wrote before. Returns the compiled kernel (None in the interpreter)."""
    return one.kernel[one.grid](**one.arguments, num_warps=one.num_warps, num_stages=one.num_stages)


def spills(launches: Sequence[Launch]) -> int:
    return sum(getattr(run(one), "n_spills", None) or 0 for one in launches)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """x, loc, P, d, ω_p and a seed, the same every time."""
    generator = torch.Generator().manual_seed(0)
    S, B, N, R = case.S, case.B, case.N, case.R

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    P = normal(B, R, N).mT if case.layout == "BRN" else normal(B, N, R)
    d = 0.5 + normal(B, N if case.diagonal == "pixel" else 1).abs()
    return normal(S, B, N), normal(1, B, N), P, d, normal(S, B, R), torch.arange(B, device=device)


def step(x: Tensor, loc: Tensor, P: Tensor, d: Tensor, omega_p: Tensor, seed: Tensor) -> list[Tensor]:
    """Density, sample and all gradients."""
    q, logdet, *rest = kernels.mahalanobis_and_logdet(x, loc, P, d)
    a, b = torch.full_like(q, -0.5), torch.full_like(logdet, 0.5)
    grads = kernels.mahalanobis_and_logdet_backward(a, b, x, loc, P, d, *rest, [True] * 4)
    y = kernels.rsample(loc, P, d, omega_p, None, seed)
    more = kernels.rsample_backward(x, P, d, omega_p, None, seed, [True, True, False])
    return [q, logdet, *rest[:2], *grads, y, *more[:2]]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative error of a result; NaN where one is."""
    errors = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(errors).max())


@contextmanager
def choosing(cell: tuned.Key, chosen: Block | None) -> Iterator[tuple[list[Block], list[Launch]]]:
    """Dispatch with `chosen` for one cell; gives what its look-ups found, and the launches that they led to."""
    found: list[Block] = []
    launches: list[Launch] = []
    look_up, start = launch.block, launch.launch
    asked = False

    def block(kernel: str, table: launch.Table, block_r: int, by_column: bool, device: torch.device) -> Block:
        nonlocal asked
        asked = (kernel, block_r, by_column) == cell
        if asked and chosen is not None:
            return chosen
        own = look_up(kernel, table, block_r, by_column, device)
        if asked:
            found.append(own)
        return own

    def started(kernel: Any, grid: tuple[int, ...], num_warps: int, num_stages: int = 1, **arguments: Any) -> None:
        nonlocal asked
        if asked and all(grid):
            launches.append(Launch(kernel, grid, num_warps, num_stages, arguments))
        asked = False
        start(kernel, grid, num_warps, num_stages, **arguments)

    with patch.object(launch, "block", block), patch.object(launch, "launch", started):
        yield found, launches


def cells(case: Case, device: torch.device) -> list[tuned.Key]:
    """What `launch.block` is asked for in a step, in that order."""
    seen: dict[tuned.Key, None] = {}
    look_up = launch.block

    def block(kernel: str, table: launch.Table, block_r: int, by_column: bool, where: torch.device) -> Block:
        seen[kernel, block_r, by_column] = None
        return look_up(kernel, table, block_r, by_column, where)

    with patch.object(launch, "block", block):
        step(*inputs(case._replace(B=1, N=17), device))
    return list(seen)


def others(case: Case) -> list[Case]:
    """Small cases of the same cell whose result has to be the same: dtypes, diagonals, samples, tiles of R."""
    small = case._replace(B=min(case.B, 2), N=min(case.N, 333))
    ranks = [case.R, 2 * launch.TILED_R + 2] if launch.padded_rank(case.R) == launch.TILED_R else [case.R]
    kinds = ((torch.float32, "scalar", 2), (torch.float64, "pixel", 1), (torch.bfloat16, "pixel", 2))
    return [small._replace(R=R, dtype=dtype, diagonal=diagonal, S=S) for R in ranks for dtype, diagonal, S in kinds]


def sweep(cell: tuned.Key, case: Case, where: Device, tried: Sequence[Block]) -> Sweep:
    """Finds the fastest launch of a cell for a case."""

    def computed(block: Block | None, arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Block], list[Launch]]:
        with choosing(cell, block) as (found, launches):
            return step(*arguments), found, launches

    def checked(block: Block, arguments: Sequence[Tensor], expected: Sequence[Tensor]) -> list[Launch] | str:
        """Its launches, or why it cannot be taken."""
        try:
            results, _, launches = computed(block, arguments)
            if spills(launches):
                return "spill"
        except (TritonError, RuntimeError) as error:
            return f"fail ({type(error).__name__})"
        # Not `difference > tolerance`, which NaN would pass.
        return launches if difference(results, expected) <= TOLERANCE[arguments[0].dtype] else "differ"

    def same_elsewhere(block: Block) -> bool:
        """Whether it computes the other cases too; what comes with the package says what is right there."""
        made = (inputs(other, where.device) for other in others(case))
        return all(not isinstance(checked(block, args, computed(None, args)[0]), str) for args in made)

    arguments = inputs(case, where.device)
    expected, (default, *_), launches = computed(None, arguments)
    out = Sweep(cell, default)
    once: dict[Block, float] = {}
    for block in tried:
        if block != default:
            out.tried += 1
            result = checked(block, arguments, expected)
            if isinstance(result, str):
                out.left_out[result] += 1
            else:
                once[block] = where.seconds(result)
    # Launches hold on to their tensors, so that only the finalists' are kept.
    finalists = sorted(once, key=once.__getitem__)[:FINALISTS]
    timed = {default: launches, **{block: computed(block, arguments)[2] for block in finalists}}
    times: dict[Block, list[float]] = {block: [] for block in timed}
    for _ in range(ROUNDS):
        for block, own in timed.items():
            times[block].append(where.seconds(own))
    out.before, out.spread = statistics.median(times[default]), _spread(times[default])
    for block in sorted(finalists, key=lambda block: statistics.median(times[block])):
        after, spread = statistics.median(times[block]), max(_spread(times[default]), _spread(times[block]))
        if out.before - after <= spread:
            continue
        if same_elsewhere(block):
            out.best, out.after, out.spread = block, after, spread
            break
        out.left_out["differ elsewhere"] += 1
    return out


def write(folder: Path, device_name: str, measured: Mapping[tuned.Key, tuned.Launch | None]) -> Path:
    """Puts entries into a device's file, and forgets those that are None; other processes see it when they start."""
    together: tuned.Entries = tuned.read(folder, device_name)
    for key, found in measured.items():
        if found is None:
            together.pop(key, None)
        elif fault := tuned.fault(tuned.as_item(key, found)):
            raise ValueError(f"{key}: {found} cannot be stored: {fault}")
        else:
            together[key] = found
    path = tuned.file_of(folder, device_name)
    items = ",".join(f"\n    {json.dumps(tuned.as_item(key, found))}" for key, found in sorted(together.items()))
    head = f'{{\n  "format": {tuned.FORMAT},\n  "device": {json.dumps(device_name)},\n  "blocks": ['
    write_atomically(path, f"{head}{items}\n  ]\n}}\n".encode())
    tuned.entries.cache_clear()
    return path


def _spread(times: Sequence[float]) -> float:
    return percentile(times, 80) - percentile(times, 20)


def tune(
    where: Device,
    folder: Path,
    cases: Sequence[Case] = tuple(CASES),
    choose: Callable[[int], Sequence[Block]] = candidates,
    say: Callable[[str], None] = print,
) -> list[Sweep]:
    """Sweeps every cell of the cases and writes the table; says what each of them came to."""
    shipped = tuned.read(tuned.SHIPPED, where.name)
    done: dict[tuned.Key, Sweep] = {}
    path = None
    for case in cases:
        for cell in cells(case, where.device):
            if cell not in done:
                with patch.object(tuned, "entries", lambda device: shipped):  # not what an earlier sweep has found
                    done[cell] = found = sweep(cell, case, where, choose(cell[1]))
                path = write(folder, where.name, {cell: found.best})
                say(str(found))
    better = sum(found.best is not None for found in done.values())
    say(f"{better} of {len(done)} launches are faster on {where.name}; written to {path}")
    return list(done.values())
