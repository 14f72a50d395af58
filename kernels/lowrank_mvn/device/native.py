"""The compiled CPU backend: its library, how a call is packed for it, and why there may be none.

The sources are plain C++ (`csrc/` here, and `cpu/` in the folder of each kind of factor) with a C interface, so that
one build serves every version of Python and torch. Work is shared out to a small pool of its own, as many threads as
`torch.get_num_threads()`, and cut the same way whatever their number: 1 thread and 16 give the same bits.
"""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = ("_cpu.abi3.so", "_cpu.pyd")
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# What C++ sees of a tensor: address, kind and three strides.
View = tuple[int, int, int, int, int]
NOTHING: View = (0, 0, 0, 0, 0)


def _load() -> ctypes.CDLL | str:
    """The library, or why it is missing. It starts no thread before the first call that has work for two."""
    package = Path(__file__).parent.parent
    found = [package / name for name in FILES if (package / name).exists()]
    if not found:
        return (
            "it was not built when lowrank_mvn was installed, which needs a C++17 compiler (GCC 12, Clang 15 or newer)"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"its library does not load: {error}"
    library.lowrank_variant.restype = ctypes.c_char_p
    return library


_LIBRARY = _load()
_MISSING = _LIBRARY if isinstance(_LIBRARY, str) else None


def missing() -> str | None:
    """Why there is no compiled backend; none where there is one."""
    return _MISSING


def library() -> ctypes.CDLL:
    if isinstance(_LIBRARY, str):
        raise RuntimeError(f"the compiled CPU backend is missing: {_LIBRARY}")
    return _LIBRARY


def variant() -> str:
    """The instructions that the passes use: "baseline", "avx2" or "avx512"."""
    return str(library().lowrank_variant().decode())


def use_variant(name: str) -> None:
    """Takes other instructions; for tests.

    Raises:
        ValueError: this processor, or this build, does not have them.
    """
    if library().lowrank_use_variant(name.encode()):
        raise ValueError(f"the variant {name!r} does not run here")


def function(name: str, numbers: int) -> Callable[..., int]:
    """A function of the library that takes one call of so many numbers: sizes, addresses and strides. It returns how
    many items it is not sure of."""
    pack = struct.Struct(f"={numbers}q").pack
    called: Any = None  # looked up at the first call: without a library there is none

    def call(*values: int) -> int:
        nonlocal called
        if called is None:
            called = getattr(library(), name)
            called.argtypes, called.restype = [ctypes.c_char_p], ctypes.c_int64
        unsure: int = called(pack(*values))
        if unsure < 0:
            raise MemoryError(f"no memory for {name}")
        return unsure

    return call


def view_of(t: Tensor, i: int, j: int, k: int) -> View:
    """A tensor with these strides."""
    return t.data_ptr(), KINDS[t.dtype], i, j, k


def view(t: Tensor, samples: int = 0) -> View:
    """A tensor [S, B, N] or [B, N, R]; one that has fewer than `samples` has one for all."""
    i, j, k = t.stride()
    return t.data_ptr(), KINDS[t.dtype], 0 if t.shape[0] < samples else i, j, k


def view_of_diagonal(d: Tensor) -> View:
    """d [B, N], or [B, 1] of one value for all pixels, without samples."""
    i, j = d.stride()
    return d.data_ptr(), KINDS[d.dtype], 0, i, j
