"""The sampling kernels: the noise they are given, the noise they draw, and the gradients.

Runs as `test_triton_kernels.py` does.
"""

import functools

import pytest
import sampling_cases
import torch
from sampling_cases import CASES
from triton_cases import DEVICE, MARKS

from lowrank_mvn.device import launch

pytestmark = MARKS
inputs = functools.partial(sampling_cases.inputs, device=DEVICE)


@pytest.fixture(scope="module")
def sampling():
    from lowrank_mvn.factors.dense.triton import sampling

    return sampling


@pytest.mark.parametrize("case", CASES, ids=sampling_cases.name)
@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
def test_samples_and_gradients(sampling, case, given):
    sampling_cases.check(sampling, case, given, DEVICE)


@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
@pytest.mark.parametrize(
    "case",
    [
        (torch.float32, 5, 2, 70, 3, "BRN", "item", True),
        (torch.float32, 4, 2, 63, 25, "BNR", "pixel", False),
        (torch.float64, 2, 1, 40, 3, "BRN", "pixel", True),
        (torch.bfloat16, 4, 2, 40, 16, "strided", "pixel", True),
    ],
    ids=sampling_cases.name,
)
def test_samples_that_several_programs_share(sampling, monkeypatch, case, given):
    monkeypatch.setattr(launch, "sample_chunks", lambda S, N, R: 3)
    sampling_cases.check(sampling, case, given, DEVICE)


def test_noise_is_standard_normal(sampling):
    """Moments and a quantile within 5 standard errors, neighbours and samples uncorrelated."""
    S, N = 4, 20000
    y = sampling.noise(torch.tensor([7], device=DEVICE), S, N, torch.float32).double().view(S, N)
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
    monkeypatch.setattr(launch, "block", lambda *_: launch.Block(1, 16))
    monkeypatch.setattr(launch, "split_columns", lambda N, R, block_n: block_n)
    assert torch.equal(first, sampling.rsample(loc, P, d, omega_p, None, seed))
    monkeypatch.setattr(launch, "sample_chunks", lambda S, N, R: 3)
    assert torch.equal(first, sampling.rsample(loc, P, d, omega_p, None, seed))
    assert torch.equal(first[:1], sampling.rsample(loc, P, d, omega_p[:1], None, seed))
    assert not torch.equal(first, sampling.rsample(loc, P, d, omega_p, None, seed + 1))


@pytest.mark.parametrize("N", [5, 1024, 1500])
def test_noise_is_that_of_a_sample(sampling, N):
    loc, P, d, omega_p = inputs(torch.float32, 3, 2, N, 3)
    seed = torch.randint(2**62, (2,), device=DEVICE)
    drawn = sampling.rsample(0 * loc, 0 * P, torch.ones_like(d), omega_p, None, seed)
    assert torch.equal(sampling.noise(seed, 3, N, torch.float32), drawn)
    assert torch.equal(sampling.noise(seed, 3, N, torch.float64).float(), drawn)


def test_either_noise_or_seed(sampling):
    loc, P, d, omega_p = inputs(torch.float32, 1, 1, 5, 2)
    with pytest.raises(ValueError, match="either omega_d or seed"):
        sampling.rsample(loc, P, d, omega_p, None, None)


def test_empty_batch(sampling):
    loc, P, d, omega_p = inputs(torch.float32, 2, 0, 5, 2)
    assert sampling.rsample(loc, P, d, omega_p, omega_p.new_empty(2, 0, 5), None).shape == (2, 0, 5)
