"""Two versions in alternation on this machine: `python -m bench.compare BASE`, or `make bench-compare BASE=ref`.

BASE is checked out into a temporary folder (a git worktree). Both versions' results are checked against the float64
oracle, then they take turns, each in a process of its own. The harness, and so the inputs, are those of this checkout.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import measure
from .machine import ROOT
from .operators import BRAIN, CELEBA, OPERATORS, SMALL, Case, Operator

__all__ = ["LIMIT", "compare", "main", "worktree"]

LIMIT = 1.05  # slower by more in four of five rounds: a regression
SETTINGS = measure.Settings(budget=5.0, rounds=(9, 25))


def plan() -> list[tuple[Operator, Case]]:
    """What is compared: each operator at CelebA's size, the main one in both layouts and at the other sizes too."""
    joint = OPERATORS["log_prob_entropy_backward"]
    fixed = replace(CELEBA, diagonal="scalar")
    found = [(joint, case) for case in (CELEBA, replace(fixed, layout="BRN"), BRAIN, SMALL)]
    found += [(OPERATORS[name], CELEBA) for name in ("log_prob", "entropy", "rsample_backward", "condition")]
    return [
        *found,
        (OPERATORS["linear_backward"], fixed),
        (OPERATORS["train_step"], replace(SMALL, diagonal="scalar")),
    ]


@contextmanager
def worktree(base: str, repository: Path = ROOT) -> Iterator[Path]:
    """A checkout of `base` in a temporary folder, gone afterwards.

    Raises:
        ValueError: git knows no such version.
    """
    git = ("git", "-C", str(repository))
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", base + "^{commit}"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    if not commit:
        raise ValueError(f"git knows no version {base!r}")
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "base"
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(checkout), commit], check=True)
        try:
            yield checkout
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(checkout)], check=True)


def compare(
    base: Path,
    entries: Sequence[tuple[Operator, Case]],
    device: str,
    settings: measure.Settings = SETTINGS,
    say: Callable[[str], None] = print,
    here: Path = ROOT,
) -> list[str]:
    """Prints a line per case and returns the names of those that became slower or went wrong."""
    worse = []
    say(f"{'operator':28}{'case':36}{'base':>10}{'here':>10}{'here / base':>13}   20–80 %")
    for operator, case in entries:
        old, new = measure.measure(operator, case, device, settings, checkouts={"base": base, "here": here})
        name = f"{operator.name:28}{case.id:36}"
        if not old.status == new.status == "ok":
            reasons = "; ".join(f"{m.peer} is {m.status}: {m.note}" for m in (old, new) if m.status != "ok")
            say(f"{name}  not compared: {reasons}")
            if new.status not in ("ok", "missing"):
                worse.append(f"{operator.name} {case.id}")
            continue
        ratios = [b / a for a, b in zip(old.seconds, new.seconds, strict=False)]
        low, high = (measure.percentile(ratios, q) for q in (20, 80))
        times = [statistics.median(m.seconds) * 1e3 for m in (old, new)]
        mark = "  slower" if low > LIMIT else ""
        say(
            f"{name}{times[0]:7.3g} ms{times[1]:7.3g} ms{statistics.median(ratios):13.3f}   {low:.3f}–{high:.3f}"
            f" of {len(ratios)}{mark}"
        )
        if mark:
            worse.append(f"{operator.name} {case.id}")
    return worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="a git reference: a commit, tag or branch")
    parser.add_argument("-k", default="", metavar="TEXT", help="only operators whose name has TEXT in it")
    options = parser.parse_args(arguments)
    entries = [(operator, case) for operator, case in plan() if options.k in operator.name]
    if not entries:
        parser.error(f"no operator has {options.k!r} in its name")
    kind = subprocess.run(
        [sys.executable, "-c", "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        with worktree(options.base) as base:
            worse = compare(base, entries, kind)
    except ValueError as error:
        parser.error(str(error))
    if worse:
        print(f"slower by more than {LIMIT - 1:.0%} in four of five rounds, or wrong: {', '.join(worse)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
