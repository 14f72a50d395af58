"""Compiles in child processes, so that a compiler that hangs or dies costs one row and not the run."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from queue import SimpleQueue

from .launches import AnyCase, Launch, captured, distinct


def row_of(launch: Launch, case: AnyCase, target: str) -> dict:
    """What the compiler says of one launch on one target."""
    from . import model
    from .compiled import compile_launch
    from .machine_code import widths

    built = compile_launch(launch, target)
    names = "registers", "spills", "shared", "programs", "occupancy"
    row: dict = {name: getattr(built, name) for name in names}
    P = launch.tile
    if P is None or not built.loop:
        return row
    lanes = 64 if target == "gfx942" else 32
    rows, columns = launch.tile_size
    rows = min(case.rows, rows)
    size = rows * columns * P.element_size() * built.steps
    kernel = launch.kernel.fn.__name__
    reads = kernel != "sample_backward_kernel"
    writes = kernel in ("backward_kernel", "sample_backward_kernel", "linear_backward_kernel")
    moved = size * (reads + writes)
    tensor = ("HMMA", "HGMMA", "DMMA", "UTC", "v_mfma")
    row |= {
        "loads": widths(built.loop, "LDG", "global_load", "buffer_load"),
        "stores": widths(built.loop, "STG", "global_store", "buffer_store"),
        "tile_in_16_bytes": size // (16 * lanes * launch.num_warps),  # instructions, if all are that wide
        "reads_tile": reads,
        "writes_tile": writes,
        "tensor": sum(n for i, n in built.loop.items() if i.startswith(tensor)),
        "instructions_per_byte": sum(built.loop.values()) * launch.num_warps * lanes / moved,
        "tile": [rows, columns * built.steps],
        "bytes_in_flight": built.programs * size * max(1, launch.num_stages - 1),
        "steps_in_a_turn": built.steps,
        "bank_conflicts": built.conflicts,
    }
    # Beyond 128, tiles of R are loops in the loop, whose turns are not counted.
    if target == "sm_90" and (case.rows <= 128 or kernel == "product_kernel"):
        row["caps"] = model.caps(built.loop, launch.num_warps, moved, built.conflicts)
    return row


_launches = functools.lru_cache(1)(captured)


def head(case: AnyCase, target: str, i: int) -> dict:
    """What a case's launch number `i` is."""
    launch = _launches(case, target)[i]
    return {
        "kernel": launch.name,
        **({"sizes": launch.sizes} if launch.sizes else {}),
        "case": case.name,
        "R": case.R,
        "layout": case.layout,
        "target": target,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def compiled(case: AnyCase, target: str, i: int) -> dict:
    """`row_of` that launch, or what the compiler raises."""
    try:
        return row_of(_launches(case, target)[i], case, target)
    except Exception as error:  # whatever it is, the other rows are wanted
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


class _Child:
    """A process that compiles one launch after the other."""

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.process = self.pool.submit(os.getpid).result()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        self.pool.shutdown()


def compile_all(
    tasks: Iterable[tuple[AnyCase, str]], processes: int, seconds: float, show: Callable[[dict], None]
) -> list[dict]:
    """One row per launch, in the order in which they are done, once where several cases have the same; one that takes
    longer than `seconds` says so."""
    children: SimpleQueue[_Child | None] = SimpleQueue()
    for _ in range(processes):
        children.put(None)

    def row(case: AnyCase, target: str, i: int) -> dict:
        child = children.get() or _Child()
        found = {"kernel": "(dispatch)", "case": case.name, "target": target}
        try:
            for part in (head, compiled):
                found |= child.pool.submit(part, case, target, i).result(seconds)
        except (TimeoutError, BrokenProcessPool) as error:
            died = isinstance(error, BrokenProcessPool)
            found["error"] = "the compiler died" if died else f"given up after {seconds:g} s"
            child.end()
            child = None
        children.put(child)
        return found

    rows = []
    with ThreadPoolExecutor(processes) as threads:
        waiting = [threads.submit(row, case, target, i) for case, target, new in distinct(tasks) for i in new]
        for done in as_completed(waiting):
            rows.append(done.result())
            show(rows[-1])
    for _ in range(processes):
        if child := children.get():
            child.end()
    return rows
