"""The device that a configuration or a command names, and its noise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["find", "seeded"]


def find(name: str) -> torch.device:
    """`auto` (a GPU where there is one), or any name that torch knows.

    Raises:
        ValueError: torch does not know the name, or has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:  # torch's are of many types, and some list all that there is
        fault = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device is {name!r}, expected auto, cpu or a device that torch has here: {fault}") from None
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no numbers, expected auto, cpu or a device that torch has here")
    return device


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Noise from a seed; the caller's generators are afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
