"""Compiles in child processes, so that a compiler that hangs or dies costs one row and not the run."""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing import connection

from .launches import AnyCase, Launch, captured, distinct

Task = tuple[AnyCase, str, list[int]]  # a case, a target, and which of its launches


def row_of(launch: Launch, case: AnyCase, target: str) -> dict:
    """What is known of one launch on one target."""
    from . import model
    from .compiled import compile_launch
    from .machine_code import widths

    built = compile_launch(launch, target)
    row = _head(launch, case, target) | {
        "registers": built.registers,
        "spills": built.spills,
        "shared": built.shared,
        "programs": built.programs,
        "occupancy": built.occupancy,
    }
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


def _head(launch: Launch, case: AnyCase, target: str) -> dict:
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


def _work(pipe: connection.Connection) -> None:
    while (task := pipe.recv()) is not None:
        case, target, wanted = task
        launches = captured(case, target)
        for launch in (launches[i] for i in wanted):
            pipe.send(("begins", _head(launch, case, target)))
            try:
                pipe.send(("row", row_of(launch, case, target)))
            except Exception as error:  # whatever the compiler does, the other rows are wanted
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                pipe.send(("row", _head(launch, case, target) | {"error": text}))
        pipe.send(("done", None))


class _Child:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.head: dict | None = None  # of the launch that is being compiled
        self.since = time.monotonic()

    def give(self, task: Task | None) -> None:
        self.task, self.head, self.since = task, None, time.monotonic()
        self.pipe.send(task)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def compile_all(
    tasks: Iterable[tuple[AnyCase, str]], processes: int, seconds: float, show: Callable[[dict], None]
) -> list[dict]:
    """One row per launch, in the order in which they are done, once where several cases have the same; one that takes
    longer than `seconds` says so."""
    waiting = deque(distinct(tasks))
    children: list[_Child] = []
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        show(row)

    while waiting or any(child.task for child in children):
        while waiting and len(children) < processes:
            children.append(_Child())
        for child in children:
            if child.task is None and waiting:
                child.give(waiting.popleft())
        busy = [child for child in children if child.task]
        ready = connection.wait([child.pipe for child in busy], timeout=1.0)
        for child in busy:
            try:
                if child.pipe in ready:
                    kind, content = child.pipe.recv()
                    child.since = time.monotonic()
                    if kind == "begins":
                        child.head = content
                    elif kind == "row":
                        assert child.task is not None
                        child.task[2].pop(0)
                        add(content)
                    else:
                        child.task = None
                    continue
                if time.monotonic() - child.since < seconds:
                    continue
                reason = f"given up after {seconds:g} s"
            except EOFError:
                reason = "the compiler died"
            case, target, wanted = child.task or (None, "", [])
            head = child.head or {"kernel": "(dispatch)", "case": case.name, "target": target}  # type: ignore[union-attr]
            add(head | {"error": reason})
            if child.head is not None:
                waiting.appendleft((case, target, wanted[1:]))  # type: ignore[arg-type]
            child.end()
            children.remove(child)
    for child in children:
        child.end()
    return rows
