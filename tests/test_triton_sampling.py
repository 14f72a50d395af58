"""The sampling kernels: the noise they are given, the noise they draw, and the gradients.

Runs as `test_triton_kernels.py` does.
"""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [] if INTERPRET else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def sampling():
    from lowrank_mvn.triton import sampling

    return sampling


def inputs(dtype, S, B, N, R, layout="BRN", diagonal="pixel"):
    options = {"dtype": torch.float64, "device": DEVICE}
    P = torch.randn(B, R, N, **options).mT if layout == "BRN" else torch.randn(B, N, R, **options)
    d = 0.5 + torch.rand(B, N if diagonal == "pixel" else 1, **options)
    loc, omega_p = torch.randn(1, B, N, **options), torch.randn(S, B, R, **options)
    return tuple(t.to(dtype) for t in (loc, P, d, omega_p))


def formula(loc, P, d, omega_p, omega_d):
    return loc + torch.einsum("bnr,sbr->sbn", P, omega_p) + d.sqrt() * omega_d


CASES = [
    (torch.float32, 1, 1, 1, 1, "BRN", "pixel", 3e-7),
    (torch.float32, 3, 2, 63, 25, "BRN", "pixel", 3e-7),
    (torch.float32, 2, 2, 130, 33, "BNR", "item", 3e-7),
    (torch.float32, 1, 1, 20, 130, "BNR", "pixel", 1e-6),
    (torch.float64, 2, 1, 40, 3, "BRN", "item", 1e-13),
    (torch.bfloat16, 2, 1, 40, 16, "BRN", "pixel", 4e-3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v).removeprefix("torch.") for v in case))
@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
def test_samples_and_gradients(sampling, case, given):
    *shape, tolerance = case
    loc, P, d, omega_p = inputs(*shape)
    S, B, N = shape[1:4]
    seed = None if given else torch.randint(2**62, (B,), device=DEVICE)
    omega_d = torch.randn(S, B, N, device=DEVICE).to(loc.dtype) if given else None
    noise = omega_d
    if noise is None:  # the noise alone: no mean, no factor, variance 1
        plain = [t.float() for t in (loc * 0, P * 0, torch.ones_like(d), omega_p)]
        noise = sampling.rsample(*plain, None, seed)
    wide = [t.double().requires_grad_() for t in (loc, P, d, omega_p, noise)]
    expected = formula(*wide)
    y = sampling.rsample(loc, P, d, omega_p, omega_d, seed)
    assert y.dtype == loc.dtype
    assert (y.double() - expected).norm() < tolerance * expected.norm()
    grad_y = torch.randn(S, B, N, device=DEVICE).to(loc.dtype)
    _, grad_P, grad_d, _, grad_noise = torch.autograd.grad(expected, wide, grad_y.double())
    ours = sampling.rsample_backward(grad_y, P, d, omega_p, omega_d, seed, [True, True, given])
    for name, mine, theirs in zip(("P", "d", "omega_d"), ours, (grad_P, grad_d, grad_noise), strict=True):
        if name != "omega_d" or given:
            assert (mine.double() - theirs).norm() < 4 * tolerance * theirs.norm(), name


def test_noise_is_standard_normal(sampling):
    """Moments and a quantile within 5 standard errors, neighbours and samples uncorrelated."""
    S, N = 4, 20000
    zero, one = torch.zeros(1, 1, N, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    P, omega_p = torch.zeros(1, N, 1, device=DEVICE), torch.zeros(S, 1, 1, device=DEVICE)
    y = sampling.rsample(zero, P, one, omega_p, None, torch.tensor([7], device=DEVICE)).double().view(S, N)
    n = S * N
    assert y.mean().abs() < 5 / n**0.5
    assert (y.square().mean() - 1).abs() < 5 * (2 / n) ** 0.5
    assert (y.pow(4).mean() - 3).abs() < 5 * (96 / n) ** 0.5
    assert ((y < -1.0).double().mean() - 0.158655).abs() < 5 * (0.1335 / n) ** 0.5
    for lag in (1, 2, 3):
        assert (y[:, lag:] * y[:, :-lag]).mean().abs() < 5 / n**0.5
    assert (y[0] * y[1]).mean().abs() < 5 / N**0.5


def test_the_same_seed_is_the_same_sample_whatever_the_blocks(sampling, monkeypatch):
    loc, P, d, omega_p = inputs(torch.float32, 2, 2, 150, 3)
    P = P.zero_()
    seed = torch.randint(2**62, (2,), device=DEVICE)
    first = sampling.rsample(loc, P, d, omega_p, None, seed)
    monkeypatch.setitem(sampling.BLOCKS, (16, True), sampling.Block(1, 16))
    monkeypatch.setattr(sampling.common, "split_columns", lambda N, R, block_n: block_n)
    assert torch.equal(first, sampling.rsample(loc, P, d, omega_p, None, seed))
    assert torch.equal(first[:1], sampling.rsample(loc, P, d, omega_p[:1], None, seed))
    assert not torch.equal(first, sampling.rsample(loc, P, d, omega_p, None, seed + 1))


def test_either_noise_or_seed(sampling):
    loc, P, d, omega_p = inputs(torch.float32, 1, 1, 5, 2)
    with pytest.raises(ValueError, match="either omega_d or seed"):
        sampling.rsample(loc, P, d, omega_p, None, None)


def test_empty_batch(sampling):
    loc, P, d, omega_p = inputs(torch.float32, 2, 0, 5, 2)
    assert sampling.rsample(loc, P, d, omega_p, omega_p.new_empty(2, 0, 5), None).shape == (2, 0, 5)
