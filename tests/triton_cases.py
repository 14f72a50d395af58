"""Inputs and checks for the tests of the Triton kernels; a module of data and functions, without tests."""

import os

import pytest
import torch
from lowrank_cases import BF16, F16, F32, F64, factor, relative

from lowrank_mvn.factors.dense import aten

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
ON_A_DEVICE = [] if INTERPRET else [pytest.mark.gpu]
MARKS = [
    *ON_A_DEVICE,
    pytest.mark.usefixtures("poisoned", "tensor_cores"),
    # The interpreter is numpy: NaN and infinity, which some tests are about, warn there.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# Rounding of the outputs, and of float32 inside: C is summed from products with an error of 2⁻²¹.
TOLERANCE = {F32: 2e-6, F64: 1e-12, BF16: 8e-3, F16: 1e-3}
NAMES = ("q", "logdet", "L_inv", "v", "grad_x", "grad_loc", "grad_P", "grad_d")


def name(case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case)


def inputs(dtype, S, B, N, R, layout, diagonal, shared, d=1.0, scale=1.0):
    """x, loc, P, d in canonical shapes."""
    options = {"dtype": F64, "device": DEVICE}
    P = factor(dtype, (B,), N, R, layout, scale, device=DEVICE)
    x, loc = torch.randn(S, B, N, **options), torch.randn(1 if shared else S, B, N, **options)
    diag = d * (0.5 + torch.rand(B, N if diagonal == "pixel" else 1, **options))
    return x.to(dtype), loc.to(dtype), P, diag.to(dtype)


def weights(S, B):
    return torch.randn(S, B, dtype=F64, device=DEVICE), torch.randn(B, dtype=F64, device=DEVICE)


def wide(args):
    return [None if t is None else t.double() for t in args]


def both(implementation, args, a, b, needs=None):
    """Outputs and gradients of an implementation, of dense factors or linear ones."""
    out = implementation.mahalanobis_and_logdet(*args)
    needs = [True] * (4 if len(args) == 4 else 3) if needs is None else [bool(need) for need in needs]
    return out, implementation.mahalanobis_and_logdet_backward(a, b, *args, *out[2:], needs)


def oracle(args, a, b):
    """`both` by the closed forms in float64, which test_lowrank_oracle holds against dense algebra."""
    return both(aten, wide(args), a, b)


def check(kernels, args, tolerance=None, needs=(True,) * 4):
    """Density and gradients of every item against float64; returns what the forward pass gave."""
    a, b = weights(*args[0].shape[:2])
    expected, expected_grads = oracle(args, a, b)
    out, grads = both(kernels, args, a, b, needs)
    tolerance = tolerance or TOLERANCE[args[2].dtype]
    for what, ours, theirs in zip(NAMES[:4], out, expected, strict=False):
        assert relative(ours, theirs) < tolerance, what
    for what, need, ours, theirs in zip(NAMES[4:], needs, grads, expected_grads, strict=True):
        assert relative(ours, theirs) < tolerance if need else ours.numel() == 0, what
    return out


def check_logdet(implementation, closed_forms, args, b, tolerance, allowed):
    """log|Σ| alone, with its gradients and with one of them; `allowed` are the errors of the gradients."""
    (found, *kept), (expected, *of_wide) = implementation.logdet(*args), closed_forms.logdet(*wide(args))
    assert relative(found, expected) < tolerance
    assert relative(kept[0], of_wide[0]) < tolerance
    grads = implementation.logdet_backward(b, *args, *kept, [True, True])
    theirs = closed_forms.logdet_backward(b, *wide(args), *of_wide, [True, True])
    for mine, exact, like, most in zip(grads, theirs, args, allowed, strict=True):
        assert (mine.shape, mine.dtype) == (like.shape, like.dtype)
        assert relative(mine, exact) < most
    for needs in ([True, False], [False, True]):
        made = needs if len(args) == 2 else [needs[0], True, needs[1]]  # the weights' gradient always
        alone = implementation.logdet_backward(b, *args, *kept, needs)
        for need, mine, again in zip(made, alone, grads, strict=True):
            assert torch.equal(mine, again) if need else mine.numel() == 0
