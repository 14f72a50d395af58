"""The launches of a step, captured with their arguments: every configuration that dispatch can choose."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from lowrank_mvn import triton as kernels
from lowrank_mvn.triton import common


class Case(NamedTuple):
    """One problem: sizes, the layout of P in memory ("BRN" is a convolution's output), and the dtype of everything."""

    R: int
    layout: str = "BRN"
    dtype: torch.dtype = torch.float32
    diagonal: str = "pixel"
    B: int = 8
    N: int = 12288
    S: int = 1

    @property
    def name(self) -> str:
        return f"R={self.R} {self.layout} {str(self.dtype).removeprefix('torch.')} {self.diagonal}"


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        name = self.kernel.fn.__name__.removesuffix("_kernel")
        flags = self.arguments
        wide = flags.get("WIDE") or (name == "solve" and flags["FINAL"])
        return f"{name} (float64)" if wide else name


def inputs(case: Case, make: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x, loc, P and d."""
    S, B, N, R = case.S, case.B, case.N, case.R
    P = make(B, R, N).to(case.dtype).mT if case.layout == "BRN" else make(B, N, R).to(case.dtype)
    d = make(B, N if case.diagonal == "pixel" else 1).to(case.dtype)
    return make(S, B, N).to(case.dtype), make(1, B, N).to(case.dtype), P, d


def step(case: Case, make: Callable[..., torch.Tensor]) -> None:
    """Log-density and entropy with every gradient, and a sample with its gradients."""
    x, loc, P, d = inputs(case, make)
    q, logdet, *rest = kernels.mahalanobis_and_logdet(x, loc, P, d)
    kernels.mahalanobis_and_logdet_backward(q, logdet, x, loc, P, d, *rest, [True] * 4)
    seed = torch.zeros(case.B, dtype=torch.int64)
    omega_p = make(case.S, case.B, case.R).to(case.dtype)
    y = kernels.rsample(loc, P, d, omega_p, None, seed)
    kernels.rsample_backward(y, P, d, omega_p, None, seed, [True, True, False])


@contextmanager
def dispatching(target: str, tensor_cores: bool, matrix_float64: bool):
    """Dispatch as it would on a device of that kind."""

    def products(*tensors):
        if any(t.dtype == torch.float64 for t in tensors):
            return "float64"
        return "tf32" if tensor_cores else "float32"

    with (
        patch.object(common, "products", products),
        patch.object(common, "matrix_float64", lambda device: matrix_float64),
        patch.object(common, "target", lambda device: target),
    ):
        yield


def captured(case: Case, target: str = "sm_90", tensor_cores: bool = True, matrix_float64: bool = True) -> list[Launch]:
    seen: list[Launch] = []

    def launch(kernel, grid, num_warps, num_stages=1, **arguments):
        seen.append(Launch(kernel, grid, num_warps, num_stages, arguments))

    with dispatching(target, tensor_cores, matrix_float64), patch.object(common, "launch", launch):
        step(case, torch.empty)
    return seen
