"""Ours in the place of torch's class, for programs that one cannot edit."""

import copyreg
import threading
from types import FunctionType, TracebackType
from typing import Any

import torch.distributions as td
from torch.distributions import LowRankMultivariateNormal as TorchLowRank
from torch.distributions import lowrank_multivariate_normal as module

from .normal import LowRankMultivariateNormal

NAME = TorchLowRank.__name__
_lock = threading.Lock()
_patches: set["Patch"] = set()
_expand: Any = TorchLowRank.expand


class Patch:
    """Undoes a call of `patch_torch`: `undo()`, or the end of a `with` block."""

    def undo(self) -> None:
        """Torch's names mean torch's class again, once every call of `patch_torch` is undone; else nothing."""
        with _lock:
            if self in _patches:
                _patches.remove(self)
                if not _patches:
                    _remove()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_torch() -> Patch:
    """Makes `torch.distributions.LowRankMultivariateNormal` ours, until what it returns is undone.

    Call it before the program is imported: a name that somebody has bound already (`from torch.distributions import …`)
    and instances that exist stay torch's, and go on working. Calls may be nested, and come from several threads; all
    threads see the change.

    Example:
        >>> with lowrank_mvn.patch_torch():
        ...     import program
        >>> patch = lowrank_mvn.patch_torch()  # or for longer
        >>> patch.undo()
    """
    patch = Patch()
    with _lock:
        if not _patches:
            _place()
        _patches.add(patch)
    return patch


def _place() -> None:
    # Torch's own method looks its class up under the name that is replaced.
    TorchLowRank.expand = FunctionType(  # type: ignore[method-assign]
        _expand.__code__,
        {**vars(module), NAME: TorchLowRank},
        _expand.__name__,
        _expand.__defaults__,
        _expand.__closure__,
    )
    copyreg.pickle(TorchLowRank, _reduced)
    for holder in (td, module):
        setattr(holder, NAME, LowRankMultivariateNormal)


def _remove() -> None:
    for holder in (td, module):
        if getattr(holder, NAME) is LowRankMultivariateNormal:  # else somebody else has put a class there since
            setattr(holder, NAME, TorchLowRank)
    copyreg.dispatch_table.pop(TorchLowRank, None)
    TorchLowRank.expand = _expand  # type: ignore[method-assign]


def _reduced(p: TorchLowRank) -> tuple[Any, ...]:
    """How an instance of torch's class is copied and pickled while its name means ours."""
    return _instance_of_torchs, (), p.__dict__


def _instance_of_torchs() -> TorchLowRank:
    return TorchLowRank.__new__(TorchLowRank)
