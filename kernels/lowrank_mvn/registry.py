"""How an operator is made known to torch, once for every kind of factor: schema, shapes, derivative, batching.

An operator is opaque to `torch.compile` and `torch.export` (no graph break), has a rule for `torch.func.vmap`, and
differentiates in closed form. Its tensors are known by name: contexts, derivatives and batching rules read the names
from the schema, and from a table of dimensions (`Dims`) where the items B and the samples S are.

An operator of `torch.library` and its derivative do not take part in the transforms of `torch.func` outside of
`torch.compile` (torch 2.13); there the same functions are called as an `autograd.Function`.
"""

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import sharding
from .batching import into_items
from .device import native

NAMESPACE = "lowrank_mvn"
library = torch.library.Library(NAMESPACE, "DEF")

# Name of a tensor → its dimensions as a word: "SBN" has samples first, then items, then pixels.
Dims = Mapping[str, str]
# From what was saved, what is needed and the gradients of the outputs, all by name, to the gradients of inputs by name.
Derivative = Callable[[SimpleNamespace, SimpleNamespace, SimpleNamespace], Mapping[str, Tensor | None]]


class WhenUsed(ModuleType):
    """A module that is imported when something of it is asked for: no import of ours imports Triton."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def implementations(room: str) -> dict[str, Any]:
    """The implementations of a kind of factor, modules of its package `room`, by the name that `impl=` gives them."""
    found: dict[str, Any] = {"aten": importlib.import_module(f"{room}.aten")}
    # A room without compiled passes takes torch's operators on the CPU, so that rooms can be used together.
    found["cpu"] = WhenUsed(f"{room}.cpu") if importlib.util.find_spec(f"{room}.cpu") else found["aten"]
    if importlib.util.find_spec("triton") and importlib.util.find_spec(f"{room}.triton"):
        found["triton"] = WhenUsed(f"{room}.triton")
    return found


def runs_on(impl: str, device: torch.device) -> bool:
    """Whether an implementation can take tensors of that device; Triton's takes CPU tensors in its interpreter only."""
    if impl == "cpu":
        return device.type == "cpu" and native.missing() is None
    return impl != "triton" or device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def chosen(impl: str | None, modules: Mapping[str, Any], device: torch.device, kind: str) -> str:
    """`impl`, or the default for that device.

    Raises:
        ValueError: it is not available for that `kind` of argument; the error lists what is.
    """
    if _plain.depth and impl in (None, *modules):
        return "aten"
    if impl is None:
        own = "triton" if device.type == "cuda" else "cpu"
        return own if own in modules and runs_on(own, device) else "aten"
    available = [name for name in (*modules, "reference") if runs_on(name, device)]
    if impl not in available:
        why = f": {native.missing()}" if impl == "cpu" and device.type == "cpu" and native.missing() else ""
        raise ValueError(f"impl={impl!r} is not available for {kind} on {device}, expected one of {available}{why}")
    return impl


def forward_mode() -> bool:
    """Whether forward-mode differentiation is under way: the operators do not take part in it."""
    return forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether a program is recorded, which may be run with other needs for gradients."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxy is not None or torch._C._get_tracing_state() is not None


class _Plain(threading.local):
    depth = 0  # of `plain_operators`, in this thread


_plain = _Plain()


@contextmanager
def plain_operators() -> Iterator[None]:
    """Within it, functions and distributions are composed of torch's own operators.

    A program that is recorded with ours (`torch.export`, AOTInductor, `torch.jit.trace`) needs `import lowrank_mvn` in
    the process that loads it; one that is recorded within this context needs nothing. It is differentiable and as exact
    (the residual form of the log-density, in float64), but takes the memory of a copy of P in float64, and time.

    Example:
        >>> with lowrank_mvn.plain_operators():
        ...     program = torch.export.export(module, (x,))
        >>> torch.export.save(program, "program.pt2")
    """
    _plain.depth += 1
    try:
        yield
    finally:
        _plain.depth -= 1


def decomposed() -> bool:
    """Whether torch's own operators are to be used: in forward mode and within `plain_operators`.

    Not what the implementations do: they decide by values which products are made in float64, cut their passes by the
    memory at hand and write into what they have made, which a recorded program cannot.
    """
    return _plain.depth > 0 or forward_mode()


def transformed() -> bool:
    """Whether a transform of `torch.func` is under way (while compiling, the compiler sees to it)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The operators choose their own precision. Tensors without values have no autocast."""
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def pull_back(function: Callable[..., Any], inputs: Sequence[Tensor], cotangents: Any) -> tuple[Tensor, ...]:
    """∂(cotangents · function)/∂inputs through float64 copies, differentiable again."""
    pull: Any = torch.func.vjp(lambda *tensors: function(*(t.double() for t in tensors)), *inputs)[1]
    return tuple(pull(cotangents.double() if isinstance(cotangents, Tensor) else tuple(c.double() for c in cotangents)))


def like(t: Tensor) -> Tensor:
    """An empty tensor of that shape and dtype, contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def kept(value: Tensor, need: bool) -> Tensor:
    """An output that nobody needs is empty."""
    return value if need else value.new_empty(0)


def second_derivative(textbook: Callable[..., Any], cotangents: Sequence[str], parameters: Sequence[str]) -> Derivative:
    """The derivative of an operator whose outputs `grad_NAME` are the first derivatives of `textbook`(*parameters).

    Through the textbook in float64: what an implementation keeps for its backward pass is a function of the parameters
    and the total derivative goes through it.
    """

    def derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor]:
        given = [n for n in parameters if getattr(saved, n) is not None]
        outputs = [n for n in given if _given_for(getattr(grads, f"grad_{n}", None), getattr(saved, n))]

        def everything(*tensors: Tensor) -> Any:
            named = dict(zip(given, tensors, strict=True))
            return textbook(*(named.get(n) for n in parameters))

        def first(*tensors: Tensor) -> tuple[Tensor, ...]:
            count = len(cotangents)
            pulled = pull_back(everything, tensors[count:], tensors[:count] if count > 1 else tensors[0])
            return tuple(g for n, g in zip(given, pulled, strict=True) if n in outputs)

        names = [*cotangents, *given]
        wanted = tuple(getattr(grads, f"grad_{n}") for n in outputs)
        return dict(zip(names, pull_back(first, [getattr(saved, n) for n in names], wanted), strict=True))

    return derivative


def _given_for(grad: Tensor | None, t: Tensor) -> bool:
    """Whether there is a gradient of an output; one that nobody needed is empty, and so is its gradient."""
    return grad is not None and grad.shape == t.shape


operators: list["Operator"] = []

# --- Operators ----------------------------------------------------------------------------------------------------


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        device = next(t.device for t in inputs if isinstance(t, Tensor))  # the first argument may be none
        with without_autocast(device):
            return kernel(*inputs)

    return call


PLAIN_TENSORS = Tensor, torch.nn.Parameter


def _only_autograd(inputs: Sequence[Any]) -> bool:
    """Whether nobody but autograd looks at what is done with these tensors, on the CPU: no compiler, trace, transform
    or mode, and no other kind of tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(t) in PLAIN_TENSORS and t.is_cpu and not t.is_neg() for t in inputs if isinstance(t, Tensor))


class Operator:
    """An operator of this package: call it with the arguments of its schema.

    Args:
        schema: in torch's notation; the last argument may be `str impl`.
        kernel: computes it; called without autocast.
        fake: makes empty outputs of the right shape and dtype.
        dims: the dimensions of each tensor of the schema.
    """

    def __init__(self, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], dims: Dims) -> None:
        parsed = torch._C.parse_schema(schema)
        self.name: str = parsed.name
        self.arguments = [a.name for a in parsed.arguments]
        self.tensors = [a.name for a in parsed.arguments if "Tensor" in str(a.type)]
        self.outputs = [r.name for r in parsed.returns]
        self.dims, self.fake, self.kernel = dims, fake, _without_autocast(kernel)
        library.define(schema)
        library.impl(self.name, self.kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._shapes, lib=library)
        self._operator = getattr(torch.ops.lowrank_mvn, self.name)
        self._function: Any = None  # as an `autograd.Function`, for transforms
        self._direct: Any = None  # and for autograd alone, without the dispatcher
        operators.append(self)

    def _shapes(self, *inputs: Any) -> Any:
        """Empty outputs. Distributed tensors ask for them before they ask how an operator is divided."""
        if sharding.in_use():
            sharding.register(operators)
        return self.fake(*inputs)

    def __call__(self, *inputs: Any) -> Any:
        if _plain.depth:
            return self.kernel(*inputs)
        if self._direct and _only_autograd(inputs):
            recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
            return self._direct.apply(*inputs) if recorded else self.kernel(*inputs)
        return self._function.apply(*inputs) if self._function and transformed() else self._operator(*inputs)

    def register(
        self,
        derivative: Derivative,
        saves: Sequence[str],
        batched: Callable[..., Any] | None = None,
        constants: Sequence[str] = (),
    ) -> None:
        """Gives the operator a derivative and a batching rule.

        Args:
            derivative: gets the values of `saves`, which inputs need a gradient, and the gradients of the outputs.
            saves: names of inputs and outputs that it reads; tensors are saved for the backward pass.
            batched: called with the mapped size, and per name the input and the mapped dimension; by default the mapped
                dimension joins the items (`into_items`).
            constants: outputs that have no gradient.
        """

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            outputs = dict(zip(self.outputs, output if isinstance(output, tuple) else (output,), strict=True))
            values = dict(zip(self.arguments, inputs, strict=True)) | outputs
            tensors = {n: values[n] for n in saves if isinstance(values[n], Tensor)}
            ctx.names = list(tensors)
            ctx.rest = {n: values[n] for n in saves if n not in tensors}
            ctx.save_for_backward(*tensors.values())
            ctx.mark_non_differentiable(*(outputs[n] for n in constants))
            ctx.set_materialize_grads(False)  # else zeros are made for each output, the largest too

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if all(g is None for g in grads):
                return (None,) * len(self.arguments)
            saved = SimpleNamespace(**dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **ctx.rest)
            needs = SimpleNamespace(**dict(zip(self.arguments, ctx.needs_input_grad, strict=True)))
            named = SimpleNamespace(**dict(zip(self.outputs, grads, strict=True)))
            device = next(g.device for g in grads if g is not None)
            with without_autocast(device):
                found = derivative(saved, needs, named)
            return tuple(found.get(n) if getattr(needs, n) else None for n in self.arguments)

        rule = batched or into_items

        def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
            given = dict(zip(self.arguments, inputs, strict=True))
            mapped = {n: d for n, d in zip(self.arguments, in_dims, strict=True) if isinstance(d, int)}
            return rule(self, info.batch_size, given, mapped)

        qualname = f"{NAMESPACE}::{self.name}"
        torch.library.register_autograd(qualname, backward, setup_context=setup_context, lib=library)
        torch.library.register_vmap(qualname, vmap, lib=library)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self.kernel(*inputs)
            setup_context(ctx, inputs, output)
            return output

        direct = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._direct = type(self.name, (torch.autograd.Function,), direct)
        members = {
            "forward": staticmethod(lambda *inputs: self._operator(*inputs)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(vmap),
        }
        self._function = type(self.name, (torch.autograd.Function,), members)

    def cotangents(self, names: Sequence[str], saved: SimpleNamespace, grads: SimpleNamespace) -> dict[str, Tensor]:
        """The gradients of these outputs, zeros in float64 where one has none: sizes are those of the letters of `dims`
        in what was saved."""
        given = {n: getattr(grads, n) for n in names}
        if all(grad is not None for grad in given.values()):
            return given
        known = [(self.dims[n], t) for n, t in vars(saved).items() if isinstance(t, Tensor)]
        sizes: dict[str, int] = {}
        for word, t in known:
            sizes |= {letter: size for letter, size in zip(word, t.shape, strict=True) if sizes.get(letter, 1) == 1}

        def zeros(name: str) -> Tensor:
            return known[0][1].new_zeros([sizes[letter] for letter in self.dims[name]], dtype=torch.float64)

        return {n: zeros(n) if grad is None else grad for n, grad in given.items()}

    def differentiate_by(
        self,
        backward: "Operator",
        needs: Sequence[str] = (),
        batched: Callable[..., Any] | None = None,
        finish: Callable[..., Mapping[str, Tensor]] = lambda found, *_: found,
    ) -> None:
        """Registers the operator that computes the gradients. It takes by name: `grad_NAME` for each output that has a
        gradient, what is saved for it, and which gradients are wanted, `needs` of these inputs ("x|loc": of either) or
        `need_NAME`.

        Args:
            finish: from its results by name, what was saved and what is needed to the gradients by name.
        """
        of_inputs = ("needs", *(f"need_{n}" for n in self.arguments))
        saves = [n for n in backward.arguments if n not in of_inputs and not n.startswith("grad_")]
        outputs = [n for n in self.outputs if f"grad_{n}" in backward.arguments]

        def derivative(saved: Any, needed: Any, grads: Any) -> Mapping[str, Tensor]:
            given = vars(saved) | {f"grad_{n}": t for n, t in self.cotangents(outputs, saved, grads).items()}
            given |= {f"need_{n}": need for n, need in vars(needed).items()}
            given["needs"] = [any(getattr(needed, n) for n in names.split("|")) for names in needs]
            made = backward(*(given[n] for n in backward.arguments))
            found = {n.removeprefix("grad_"): t for n, t in zip(backward.outputs, made, strict=True)}
            return finish(found, saved, needed)

        self.register(derivative, saves, batched, [n for n in self.outputs if n not in outputs])

    def differentiate(self, textbook: Callable[..., Any], batched: Callable[..., Any] | None = None) -> None:
        """Registers the derivative of `textbook`, the same function of the same tensors, in float64."""

        def derivative(saved: Any, needs: Any, grads: Any) -> dict[str, Tensor]:
            cotangents = tuple(self.cotangents(self.outputs, saved, grads).values())
            inputs = [getattr(saved, n) for n in self.tensors]
            pulled = pull_back(textbook, inputs, cotangents if len(cotangents) > 1 else cotangents[0])
            return dict(zip(self.tensors, pulled, strict=True))

        self.register(derivative, self.tensors, batched)

    def differentiate_again(
        self, textbook: Callable[..., Any], parameters: Sequence[str], batched: Callable[..., Any] | None = None
    ) -> None:
        """Registers the derivative of an operator that computes the gradients of `textbook`(*parameters)."""
        cotangents = [n for n in self.arguments if n.startswith("grad_")]
        self.register(second_derivative(textbook, cotangents, parameters), (*cotangents, *parameters), batched)
