"""One page with everything in it: no server, no network, no second file. It opens from a disk, offline, on a phone.

Mean and factor are float16, variances float32; the page states the error (`parameters.py` computes it).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .document import document
from .parameters import unpack
from .runs import CodeError, Runs

__all__ = ["export"]


def export(runs: Runs, path: Path, codes: int, seed: int = 0) -> dict[str, Any]:
    """Writes the page; every run gets the same codes, so that runs can be compared in it.

    Codes are those of held-out images, or from the prior (seeds `seed`, `seed` + 1, …) where the data is not here.

    Returns:
        `bytes` of the page, `codes` of each run, and the largest float16 `error` (intensity; white is 1).

    Raises:
        ValueError: fewer than one code.
    """
    if codes < 1:
        raise ValueError(f"codes is {codes}, expected at least 1")
    names = runs.names()
    chosen = _codes(runs, names, codes, seed)
    parameters, errors = {}, []
    for name in names:
        for i, code in enumerate(chosen):
            raw = runs.answer(name, code, "float16")
            parameters[f"{names.index(name)}-{i}"] = raw
            errors.append(_error(raw))
    listing = runs.listing()
    for row in listing:
        row["name"] = Path(row["name"]).name  # no more of the machine than that
    settings = {"mode": "file", "runs": listing, "codes": chosen}
    html = document(settings, parameters).encode()
    write_atomically(path, html)
    return {"bytes": len(html), "codes": len(chosen), "error": max(errors)}


def _codes(runs: Runs, names: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    try:
        indices, _ = runs.heldout(names[0], count)
        codes: list[dict[str, Any]] = [{"kind": "heldout", "index": int(i)} for i in indices]
        for name in names:  # the same images in all runs, or none
            runs.answer(name, codes[0], "float16")
    except CodeError:
        return [{"kind": "seed", "seed": seed + i} for i in range(count)]
    return codes


def _error(raw: bytes) -> float:
    return max(unpack(raw)[0]["error"].values())
