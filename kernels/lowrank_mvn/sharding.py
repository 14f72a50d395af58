"""Distributed tensors (`torch.distributed.tensor.DTensor`): every operator works on each shard of the batch.

The table of dimensions says where the items B are in each tensor of an operator, and nothing but them is divided: what
has no items, or one for all, is replicated, and the gradient of such a tensor is a sum over the shards. Anything else
(a shard of the pixels or of the samples) is gathered first.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .registry import Operator

TENSORS = "torch.distributed.tensor"
Placements = tuple[list[Any], list[Any]]  # of the outputs, and of the arguments


def in_use() -> bool:
    """Whether somebody has imported distributed tensors; no import of ours does."""
    return TENSORS in sys.modules


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    distributed: Any = t
    held: Tensor = distributed.to_local() if is_distributed(t) else t
    return held


def whole(t: Tensor) -> Tensor:
    """All of a tensor, gathered where it is distributed."""
    distributed: Any = t
    gathered: Tensor = distributed.full_tensor() if is_distributed(t) else t
    return gathered


def is_distributed(t: Tensor) -> bool:
    return hasattr(t, "to_local")


def beside(t: Tensor, *others: Tensor) -> Tensor:
    """What every process makes alike (a number, or noise from one seed), replicated where others are distributed."""
    for other in filter(is_distributed, others):
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = other.device_mesh  # type: ignore[attr-defined]
        return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return t


_registered: set[str] = set()


def register(operators: Iterable["Operator"]) -> None:
    """Tells DTensor how the operators are divided; those that it knows already, once."""
    missing = [o for o in operators if o.name not in _registered]
    if not missing:
        return
    _registered.update(o.name for o in missing)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for operator in missing:
        overload = getattr(torch.ops.lowrank_mvn, operator.name).default
        register_sharding(overload)(_placements(operator))
        # Which outputs are empty depends on arguments that are no tensors: what was found out is kept for each of them.
        propagator.op_to_schema_info[overload] = RuntimeSchemaInfo(0, needs_pytree=True)


def _placements(operator: "Operator") -> Callable[..., list[Placements]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def at(name: str, shape: torch.Size, B: int, alone: Any) -> Any:
        """The dimension of a tensor that holds the items; `alone` if it has none of its own."""
        word = operator.dims[name]
        i = word.find("B")
        if len(word) != len(shape):  # an empty output, which nobody needs
            return Replicate()
        return Shard(i) if i >= 0 and shape[i] == B else alone

    def placements(*given: Any) -> list[Placements]:
        arguments = dict(zip(operator.arguments, given, strict=True))
        shapes = {n: arguments[n].shape for n in operator.tensors if arguments[n] is not None}
        made = [
            torch.empty(shapes[n], device="meta", dtype=arguments[n].tensor_meta.dtype) if n in shapes else v
            for n, v in arguments.items()
        ]
        outputs = operator.fake(*made)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        B = max(shape[operator.dims[n].index("B")] for n, shape in shapes.items() if "B" in operator.dims[n])

        def each(divided: bool) -> Placements:
            B_ = B if divided else -1
            alone = Partial() if divided else Replicate()
            return (
                [at(n, t.shape, B_, alone) for n, t in zip(operator.outputs, outputs, strict=True)],
                [at(n, shapes[n], B_, Replicate()) if n in shapes else None for n in operator.arguments],
            )

        return [each(divided) for divided in ([True, False] if B > 1 else [False])]

    return placements
