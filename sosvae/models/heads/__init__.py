"""Heads, from the decoder's features to p(x|z): one module each, whose `HEAD` is the class (see `base.Head`).

The configuration `model.head = global-local` would find `global_local.py`.
"""

from typing import TYPE_CHECKING, cast

from ... import registry

if TYPE_CHECKING:  # the configuration reads the names from here, and the heads are made of a configuration
    from .base import Head

__all__ = ["NAMES", "find"]

NAMES = registry.names(__path__)


def find(name: str) -> "type[Head]":
    """The class of a head."""
    return cast("type[Head]", registry.module(__name__, name).HEAD)
