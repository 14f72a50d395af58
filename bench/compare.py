"""Two versions in alternation on this machine: `python -m bench.compare BASE`, or `make bench-compare BASE=ref`.

BASE is unpacked into a temporary folder. Both versions' results are checked against the float64
oracle, then they take turns, each in a process of its own. The harness, and so the inputs, are those of this checkout.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import measure
from .machine import ROOT
from .operators import BRAIN, CELEBA, OPERATORS, SMALL, Case, Operator

__all__ = ["LIMIT", "checkout", "compare", "main", "plan"]

LIMIT = 1.05  # slower by more in four of five rounds: a regression
SETTINGS = measure.Settings(budget=5.0, rounds=(9, 25))

FIXED = replace(CELEBA, diagonal="scalar")
QUICK = [  # what is run before each landing: some five minutes on two cores
    ("log_prob", CELEBA),
    ("log_prob_backward", CELEBA),
    ("rsample_backward", CELEBA),
    ("linear_backward", FIXED),
    ("train_step", replace(SMALL, diagonal="scalar")),
]
OTHERS = [
    *(("log_prob_entropy_backward", case) for case in (CELEBA, replace(FIXED, layout="BRN"), BRAIN, SMALL)),
    ("entropy", CELEBA),
    ("condition", CELEBA),
]


def plan(names: Sequence[str] = (), quick: bool = False) -> list[tuple[Operator, Case]]:
    """What is compared: every operator at CelebA's size, the main one in both layouts and at the other sizes too.

    Args:
        names: only operators with one of these texts in their name.
        quick: one case each of log p, log p with backward, a sample with backward, linear and a training step.
    """
    chosen = QUICK if quick else [*QUICK, *OTHERS]
    return [(OPERATORS[name], case) for name, case in chosen if not names or any(text in name for text in names)]


@contextmanager
def checkout(base: str, repository: Path = ROOT) -> Iterator[Path]:
    """The two packages as they are in `base`, in a temporary folder.

    Raises:
        ValueError: git knows no such version.
    """
    git = ("git", "-C", str(repository))
    name = ("rev-parse", "--verify", "--quiet", "--end-of-options", base + "^{commit}")
    commit = subprocess.run([*git, *name], capture_output=True, text=True).stdout.strip()
    if not commit:
        raise ValueError(f"git knows no version {base!r}")
    packed = subprocess.run([*git, "archive", commit, "kernels", "sosvae"], stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def _say(line: str) -> None:
    print(line, flush=True)  # minutes pass before the next


def compare(
    base: Path,
    entries: Sequence[tuple[Operator, Case]],
    device: str,
    say: Callable[[str], None] = _say,
) -> list[str]:
    """Prints a line per case and returns the names of those that became slower or went wrong."""
    worse = []
    say(f"{'operator':28}{'case':36}{'base':>12}{'here':>12}{'here / base':>13}   20–80 %")
    for operator, case in entries:
        old, new = measure.measure(operator, case, device, SETTINGS, checkouts={"base": base, "here": ROOT})
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
            f"{name}{times[0]:9.4g} ms{times[1]:9.4g} ms{statistics.median(ratios):13.3f}   {low:.3f}–{high:.3f}"
            f" of {len(ratios)}{mark}"
        )
        if mark:
            worse.append(f"{operator.name} {case.id}")
    return worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="a git reference: a commit, tag or branch")
    parser.add_argument("--quick", action="store_true", help="five cases, one each of what matters most")
    parser.add_argument(
        *("-k", "--names"),
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only operators with one of these texts in their name",
    )
    options = parser.parse_args(arguments)
    entries = plan(options.names, options.quick)
    if not entries:
        parser.error(f"no operator has {' or '.join(map(repr, options.names))} in its name")
    code = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    device = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    try:
        with checkout(options.base) as base:
            worse = compare(base, entries, device)
    except ValueError as error:
        parser.error(str(error))
    if worse:
        print(f"slower by more than {LIMIT - 1:.0%} in four of five rounds, or wrong: {', '.join(worse)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
