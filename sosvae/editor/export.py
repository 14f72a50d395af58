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

    Codes are those of held-out images, and where there are fewer or none, from the prior (seeds `seed`, `seed` + 1, …).

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
    for r, name in enumerate(names):
        for c, code in enumerate(chosen):
            raw = runs.answer(name, _same_image(runs, names[0], name, code), "float16")
            parameters[f"{r}-{c}"] = raw
            errors.append(_error(raw))
    listing = runs.listing()
    for row in listing:
        row["name"] = Path(row["name"]).name  # no more of the machine than that
    settings = {"mode": "file", "runs": listing, "codes": chosen}
    html = document(settings, parameters).encode()
    write_atomically(path, html)
    return {"bytes": len(html), "codes": len(chosen), "error": max(errors)}


def _codes(runs: Runs, names: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out images as far as they go, then seeds."""
    codes: list[dict[str, Any]] = []
    try:
        for name in names:  # all runs have the images, or none is asked for them
            indices, _ = runs.heldout(name, count)
        codes = [{"kind": "heldout", "index": int(i)} for i in indices]
    except CodeError:
        pass
    return codes + [{"kind": "seed", "seed": seed + i} for i in range(count - len(codes))]


def _same_image(runs: Runs, first: str, name: str, code: dict[str, Any]) -> dict[str, Any]:
    """A seed means another image to each run: the others encode what the first one makes of it."""
    shapes = {runs.run(run).config.image_shape for run in (first, name)}
    if name == first or code["kind"] != "seed" or len(shapes) > 1:
        return code
    return {"kind": "mean of", "run": first, "code": code}


def _error(raw: bytes) -> float:
    errors: dict[str, float] = unpack(raw)[0]["error"]
    return max(errors.values())
