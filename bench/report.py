"""Tables and plots from the stored results: `python -m bench.report` writes them, `--check` says whether they differ.

A document has a table between two comments, the first of which names the table and the file that it is made of:

    <!-- bench.report answer bench/results/NAME.csv -->
    <!-- /bench.report -->
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sosvae import files

from . import store
from .machine import ROOT
from .operators import OPERATORS
from .plots import plots
from .tables import TABLES, static

__all__ = ["DOCUMENTS", "check", "main", "update"]

DOCUMENTS = ("README.md", "docs/cpu.md", "bench/README.md", "kernels/LOG.md")

_BLOCK = re.compile(r"(<!-- bench\.report (\w+) (\S+) -->\n)(.*?)(<!-- /bench\.report -->)", re.S)


def _expected(table: str, file: str, root: Path) -> str:
    path = root / file
    if not path.exists():
        raise ValueError(f"{file}, which a table names, does not exist")
    if table == "static":
        return "\n" + static(json.loads(path.read_text(encoding="utf-8"))) + "\n"
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r}, expected one of {[*TABLES, 'static']}")
    return "\n" + TABLES[table](_newest(path)) + "\n"


def _newest(path: Path) -> list[store.Row]:
    """The newest rows of every case, of operators that there still are."""
    return store.latest(row for row in store.read(path) if row.operator in OPERATORS)


def update(document: Path, root: Path = ROOT) -> bool:
    """Makes the tables of a document anew from the files they name; whether anything changed.

    Raises:
        ValueError: an unknown table, or a file that is not there or cannot be read.
    """
    text = document.read_text(encoding="utf-8")
    new = _BLOCK.sub(lambda found: found[1] + _expected(found[2], found[3], root) + found[5], text)
    if new != text:
        files.write_atomically(document, new.encode())
    return new != text


def check(document: Path, root: Path = ROOT) -> list[str]:
    """The tables of a document that differ from the files they name, one line each."""
    differing = []
    for found in _BLOCK.finditer(document.read_text(encoding="utf-8")):
        try:
            if found[4] != _expected(found[2], found[3], root):
                raise ValueError(f"table {found[2]} differs from {found[3]}; run python -m bench.report")
        except ValueError as error:
            differing.append(f"{document.name}: {error}")
    return differing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, help=f"default: {', '.join(DOCUMENTS)}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table differs")
    options = parser.parse_args(arguments)
    documents = options.documents or [ROOT / name for name in DOCUMENTS if (ROOT / name).exists()]
    if options.check:
        differing = [line for document in documents for line in check(document)]
        print("\n".join(differing) or "every table agrees with its file")
        return 1 if differing else 0
    for file in sorted(store.RESULTS.glob("*.csv")):
        for path in plots(_newest(file), store.RESULTS, file.stem):
            print(f"drew {path.relative_to(ROOT)}")
    for document in documents:
        print(f"{document.name}: {'tables written' if update(document) else 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
