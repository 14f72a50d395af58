"""Launches that were measured on a device: one JSON file for each device name, read when a kernel first needs it.

Files that come with the package lie in the folder `tuned/` beside this module. `pytest --benchmark --tune` writes those
of the machine's own devices into $XDG_CACHE_HOME/lowrank_mvn, by default ~/.cache/lowrank_mvn, and they come first:

    {
      "format": 1,
      "device": "NVIDIA H100 80GB HBM3",
      "blocks": [
        {"kernel": "residual", "block_r": 32, "by_column": true, "num_warps": 1, "columns": 32, "num_stages": 1}
      ]
    }

Only plain numbers are taken from a file, and only within bounds. What is damaged, or was written for something else, is
left out with one warning that names the file: a file can change how fast a kernel is, not what it computes.
"""

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["Entries", "Key", "Launch", "as_item", "entries", "fault", "file_of", "read", "users_folder"]

Key = tuple[str, int, bool]  # kernel, padded rank, whether neighbouring columns of P are neighbours in memory
Launch = tuple[int, int, int]  # warps, columns, stages
Entries = dict[Key, Launch]

# Raised when kernels change so that older measurements say nothing about them any more.
FORMAT = 1
SHIPPED = Path(__file__).with_suffix("")
LARGEST = 1 << 20  # bytes of a file; a table of all kernels has less than a hundredth of it
ALLOWED = {
    "block_r": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8, 16),
    "columns": (16, 32, 64, 128, 256, 512, 1024),
    "num_stages": (1, 2, 3, 4),
}


@functools.cache
def entries(device: torch.device) -> Entries:
    """What is known of a device; nothing for CPU tensors, which only the interpreter computes with."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return {**read(SHIPPED, name), **read(users_folder(), name)}


def users_folder() -> Path | None:
    """Where `--tune` writes to; None where there is no home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as the specification of that variable has it
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return cache / "lowrank_mvn"


def file_of(folder: Path, device_name: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read(folder: Path | None, device_name: str) -> Entries:
    """The entries of a device's file in `folder`, if there is one; warns about what cannot be taken."""
    if folder is None:
        return {}
    path = file_of(folder, device_name)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        return _ignored(path, f"it cannot be read: {error.strerror}")
    try:
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        table = json.loads(data)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are ValueErrors
        return _ignored(path, f"it is not a table of launches: {error}")
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("blocks"), list):
        return _ignored(path, f"it is not a table of launches of format {FORMAT}")
    if table.get("device") != device_name:
        return _ignored(path, f"it was not written for {device_name}")
    found: Entries = {}
    refused = []
    for i, item in enumerate(table["blocks"]):
        if wrong := fault(item):
            refused.append(f"entry {i}: {wrong}")
        else:
            launch = item["num_warps"], item["columns"], item["num_stages"]
            found[item["kernel"], item["block_r"], item["by_column"]] = launch
    if refused:
        _ignored(path, refused[0], f"{len(refused)} of {len(table['blocks'])} entries of ")
    return found


def as_item(key: Key, launch: Launch) -> dict[str, Any]:
    """An entry as it stands in a file."""
    names = "kernel", "block_r", "by_column", "num_warps", "columns", "num_stages"
    return dict(zip(names, (*key, *launch), strict=True))


def fault(item: Any) -> str | None:
    """What is wrong with an entry."""
    if not isinstance(item, dict):
        return "it is not an object"
    for name, kind in (("kernel", str), ("by_column", bool)):
        if type(item.get(name)) is not kind:
            return f"{name} is {item.get(name)!r:.40}, expected a {kind.__name__}"
    for name, allowed in ALLOWED.items():
        number = item.get(name)
        if type(number) is not int or number not in allowed:  # True is no number of warps
            return f"{name} is {number!r:.40}, expected one of {allowed}"
    return None


def _ignored(path: Path, reason: str, what: str = "") -> Entries:
    warnings.warn(f"{what}{path} ignored, {reason}", stacklevel=2)
    return {}
