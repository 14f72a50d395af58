"""What is run, what of it an earlier run has measured, and what does not fit into memory."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from . import store
from .operators import BRAIN, CELEBA, OPERATORS, SMALL, Case, Operator

__all__ = ["Entry", "default_plan", "does_not_fit", "full_plan", "measured_already"]

SQUARES = (Case(128, 128, 3), Case(256, 256, 3, batch=4), Case(512, 512, 3, batch=1))
RANKS = (10, 25, 64)
STENCILS = (("stencil_backward", SMALL), ("stencil_backward", CELEBA), ("stencil_sample", replace(SMALL, batch=1)))
TRAINED = (replace(SMALL, diagonal="scalar"), replace(CELEBA, batch=2, diagonal="scalar"))
# What others use such normals for: a guide over two numbers for many plates, few and many series, small images, voxels.
USERS = (
    Case(1, 2, 1, batch=1, rank=1),
    Case(1, 2, 1, batch=262_144, rank=1),
    Case(1, 32, 1, batch=64, rank=1),
    Case(1, 8, 1, batch=32_768, rank=4),
    Case(1, 64, 1, batch=4096, rank=10),
    Case(1, 1000, 1, batch=128, rank=10),
    Case(64, 64, 1),
    Case(64, 64, 1, batch=32),
    Case(1, 16_747, 1, batch=1, rank=200),
    Case(64, 64, 3, batch=16),
    Case(128, 128, 3, batch=4, rank=10),
    Case(100, 100, 100, batch=1, rank=5),
)
GROWTH = ("ours", "torch", "numpyro")  # peers of the cases in which only R or B differs: the others grow like torch's


class Entry(NamedTuple):
    """One line of a plan."""

    operator: Operator
    case: Case
    peers: tuple[str, ...]


def _entry(name: str, case: Case, peers: tuple[str, ...] | None = None) -> Entry:
    return Entry(OPERATORS[name], case, peers or OPERATORS[name].peers)


def default_plan() -> list[Entry]:
    """The plan of `pytest --benchmark`: every operator at CelebA's size, and the growth of one in N, B and R."""
    joint = "log_prob_entropy_backward"
    cases = [CELEBA, SMALL, BRAIN, replace(CELEBA, diagonal="scalar", layout="BRN")]
    plan = [_entry(joint, case) for case in cases]
    plan += [_entry(joint, replace(BRAIN, rank=rank), GROWTH) for rank in RANKS if rank != BRAIN.rank]
    plan += [_entry(joint, replace(BRAIN, batch=batch), GROWTH) for batch in (2, 32)]
    plan += [_entry(joint, case) for case in USERS if case not in cases]
    plan += [_entry(name, CELEBA) for name in ("log_prob", "entropy", "rsample_backward", "condition")]
    plan += [_entry("linear_backward", replace(CELEBA, diagonal=diagonal)) for diagonal in ("scalar", "pixel")]
    plan += [_entry(*cell) for cell in STENCILS]
    plan += [_entry("train_step", case) for case in TRAINED]
    return plan


def full_plan() -> list[Entry]:
    """`--benchmark-full`: every operator at all shapes, ranks, diagonals and layouts, with every peer; hours."""
    cells = [(entry.operator.name, entry.case) for entry in default_plan()]
    cells += [("train_step", replace(case, rank=128)) for case in TRAINED]
    cells += [("rsample_backward", case) for case in USERS]
    for name in OPERATORS:
        # A linear factor has no P whose layout could be chosen.
        layouts = ("BNR",) if name == "linear_backward" else ("BNR", "BRN")
        grid = itertools.product((SMALL, BRAIN, CELEBA, *SQUARES), RANKS, ("pixel", "scalar"), layouts)
        if name != "train_step" and not name.startswith("stencil"):  # these have neither ranks nor diagonals
            cells += [(name, replace(shape, rank=R, diagonal=d, layout=layout)) for shape, R, d, layout in grid]
    return [_entry(*cell) for cell in dict.fromkeys(cells)]


# Of a case, good to a factor of two. The oracle and the textbook's peers hold most.
BYTES_PER_PEER, BYTES_PER_VALUE = 5e8, 100.0  # a process with libraries and inputs; what else is held, for each of P
BYTES_PER_PIXEL = 2e4  # what training steps hold, for each value of their images


def does_not_fit(entry: Entry, where: dict[str, Any]) -> str | None:
    """The reason not to begin on a machine of `machine.environment`, or none."""
    images = entry.case.batch * entry.case.N
    training = entry.operator.name == "train_step"
    held = BYTES_PER_PIXEL * images if training else BYTES_PER_VALUE * images * entry.case.rank
    needed, free = len(entry.peers) * BYTES_PER_PEER + held, float(where.get("free", math.nan))
    if not needed > free:  # where nobody says what is free, everything is tried
        return None
    return f"does not fit: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def measured_already(path: Path, where: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    """Peers by operator and case that a file has of the same commit on the same machine with the same versions.

    No two runs of a checkout with changes (a "+" after its commit) are the same; what failed is tried again.
    """
    found: dict[tuple[str, str], set[str]] = {}
    if where["commit"].endswith("+") or where["commit"] == "unknown" or not path.exists():
        return found
    same = ("commit", "machine", "cores", "device", "versions")
    for row in store.read(path):
        if all(getattr(row, key) == where[key] for key in same) and row.status in ("ok", "missing", "wrong"):
            found.setdefault((row.operator, row.case), set()).add(row.peer)
    return found
