"""Folders that hold one module for each of a kind (commands, heads): adding one is adding a file."""

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

__all__ = ["module", "names"]


def names(path: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules in a package's `__path__`, with dashes for underscores; `base` is what they share."""
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(path) if m.name != "base"))


def module(package: str, name: str) -> ModuleType:
    """The module of that name, imported now."""
    return import_module(f"{package}.{name.replace('-', '_')}")
