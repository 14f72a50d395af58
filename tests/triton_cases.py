"""Inputs and oracles for the tests of the Triton kernels; a module of data and functions, without tests."""

import os

import pytest
import torch

from lowrank_mvn.factors.dense import aten

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
MARKS = [
    *([] if INTERPRET else [pytest.mark.gpu]),
    pytest.mark.usefixtures("poisoned", "tensor_cores"),
    # The interpreter is numpy: NaN and infinity, which some tests are about, warn there.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Rounding of the outputs, and of float32 inside: C is summed from products with an error of 2⁻²¹.
TOLERANCE = {F32: 2e-6, F64: 1e-12, BF16: 8e-3, F16: 1e-3}


def inputs(dtype, S, B, N, R, layout, diagonal, shared, d=1.0, scale=1.0):
    """x, loc, P, d in canonical shapes; what lies between the elements of a strided P is NaN."""
    options = {"dtype": F64, "device": DEVICE}
    P = torch.randn(B, R, N, **options).mT if layout == "BRN" else torch.randn(B, N, R, **options)
    P = (P * scale).to(dtype)
    if layout == "strided":
        holder = P.new_full((B, 2 * N, 2 * R), float("nan"))
        holder[:, ::2, ::2] = P
        P = holder[:, ::2, ::2]
    x, loc = torch.randn(S, B, N, **options), torch.randn(1 if shared else S, B, N, **options)
    diag = d * (0.5 + torch.rand(B, N if diagonal == "pixel" else 1, **options))
    return x.to(dtype), loc.to(dtype), P, diag.to(dtype)


def relative(a, b):
    b = b.double()
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item()


def oracle(x, loc, P, d, needs=(True,) * 4, a=None, b=None):
    """Outputs and gradients of the closed forms in float64, which test_lowrank_oracle holds against dense algebra."""
    wide = [t.double() for t in (x, loc, P, d)]
    out = aten.mahalanobis_and_logdet(*wide)
    return out, aten.mahalanobis_and_logdet_backward(a, b, *wide, *out[2:], list(needs)) if a is not None else None


def weights(S, B):
    return torch.randn(S, B, dtype=F64, device=DEVICE), torch.randn(B, dtype=F64, device=DEVICE)
