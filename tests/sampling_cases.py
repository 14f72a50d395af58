"""Inputs, oracle and the one check of samples with their gradients, for every implementation; without tests."""

import torch
from lowrank_cases import BF16, F16, F32, F64, factor

TOLERANCE = {F32: 3e-7, F64: 1e-13, BF16: 4e-3, F16: 6e-4}

# dtype, S, B, N, R, layout of P, diagonal, whether all samples share the mean
CASES = [
    (F32, 1, 1, 1, 1, "BRN", "pixel", True),
    (F32, 3, 2, 1000, 2, "BNR", "item", True),
    (F32, 2, 3, 5, 3, "strided", "pixel", False),
    (F32, 1, 2, 128, 16, "BRN", "item", True),
    (F32, 1, 1, 1000, 25, "BNR", "pixel", True),
    (F32, 3, 2, 63, 25, "BRN", "pixel", False),
    (F32, 2, 1, 128, 32, "strided", "item", True),
    (F32, 2, 2, 130, 33, "BNR", "item", True),
    (F32, 1, 1, 63, 64, "BRN", "pixel", True),
    (F32, 2, 1, 5, 100, "BNR", "pixel", False),
    (F32, 1, 1, 20, 130, "BNR", "pixel", True),
    (F64, 2, 1, 40, 3, "BRN", "item", True),
    (F64, 1, 2, 63, 33, "strided", "pixel", False),
    (BF16, 2, 1, 40, 16, "BRN", "pixel", True),
    (BF16, 1, 2, 63, 25, "BNR", "item", False),
    (F16, 2, 2, 128, 3, "BRN", "item", True),
    (F16, 1, 1, 63, 64, "strided", "pixel", True),
]


def name(case) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case)


def inputs(dtype, S, B, N, R, layout="BRN", diagonal="pixel", shared=True, device="cpu"):
    """μ, P, d and ω_p in canonical shapes."""
    options = {"dtype": F64, "device": device}
    P = factor(dtype, (B,), N, R, layout, device=device)
    d = 0.5 + torch.rand(B, N if diagonal == "pixel" else 1, **options)
    loc, omega_p = torch.randn(1 if shared else S, B, N, **options), torch.randn(S, B, R, **options)
    return loc.to(dtype), P, d.to(dtype), omega_p.to(dtype)


def formula(loc, P, d, omega_p, omega_d):
    return loc + torch.einsum("bnr,sbr->sbn", P, omega_p) + d.sqrt() * omega_d


def check(implementation, case, given: bool, device) -> None:
    """Samples and every gradient of `rsample` and `rsample_backward`, the noise given or drawn from a seed."""
    dtype, S, B, N, R = case[:5]
    tolerance = 1e-6 if dtype == F32 and R > 64 else TOLERANCE[dtype]  # a sum of R products in float32
    loc, P, d, omega_p = inputs(*case, device=device)
    seed = None if given else torch.randint(2**62, (B,), device=device)
    omega_d = torch.randn(S, B, N, device=device).to(dtype) if given else None
    noise = omega_d
    if noise is None:  # the noise alone: no mean, no factor, variance 1
        plain = [t.float() for t in (loc * 0, torch.zeros_like(P), torch.ones_like(d), omega_p)]
        noise = implementation.rsample(*plain, None, seed)
    wide = [t.to(F64, copy=True).requires_grad_() for t in (loc, P, d, omega_p, noise)]
    expected = formula(*wide)
    y = implementation.rsample(loc, P, d, omega_p, omega_d, seed)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    grad_y = torch.randn(S, B, N, device=device).to(dtype)
    _, grad_P, grad_d, _, grad_noise = torch.autograd.grad(expected, wide, grad_y.double())
    ours = implementation.rsample_backward(grad_y, P, d, omega_p, omega_d, seed, [True, True, given])
    for what, mine, theirs in zip(("P", "d", "omega_d"), ours, (grad_P, grad_d, grad_noise), strict=True):
        if what != "omega_d" or given:
            assert mine.shape == theirs.shape, what
            assert mine.dtype == dtype, what
            assert (mine.double() - theirs).norm() < 4 * tolerance * theirs.norm(), what
    # Only what is needed.
    alone = implementation.rsample_backward(grad_y, P, d, omega_p, omega_d, seed, [False, True, False])
    assert torch.equal(alone[1], ours[1])
    assert alone[0].numel() == alone[2].numel() == 0
