"""Features of half precision: the same distribution on every path, copied nowhere, rounded once."""

import pytest
import torch
from linear_cases import B, N, NothingAsLargeAs, R, distribution, tensors
from lowrank_cases import gradients, relative

import lowrank_mvn
from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal
from lowrank_mvn.factors.linear import factor as linear_factor
from lowrank_mvn.factors.linear.aten import blocks


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", ["scalar", "pixel"])
def test_features_are_never_copied(monkeypatch, diagonal, dtype, last):
    """Forward and backward make one tensor of their size, the gradient, in any precision and layout."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 1 << 9)
    F = torch.randn(2, 16, 20, 20).to(dtype)
    F = (F.to(memory_format=torch.channels_last) if last else F).requires_grad_()
    weight, mean_weight = torch.randn(4, 3, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    d, x = torch.rand(2, 1200 if diagonal == "pixel" else 1) + 0.5, torch.randn(2, 1200)
    with torch.autocast("cpu", torch.bfloat16):
        D = LowRankMultivariateNormal(LinearMean(F, mean_weight), LinearFactor(F, weight), d, validate_args=False)
        with NothingAsLargeAs(F.numel()):
            loss = D.log_prob(x).sum() + D.entropy().sum()
        with NothingAsLargeAs(F.numel(), but=1):
            loss.backward()
    assert F.grad.stride() == F.stride()
    with pytest.raises(AssertionError), NothingAsLargeAs(F.numel()):
        F.clone()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, in jvp
def test_half_precision_features_give_one_distribution_by_every_path():
    """Joined, with a mean of other features, with a mask, and in forward mode, which all but the first make P."""
    B, K, R, N = 2, 64, 4, 600
    F, W, Wm = torch.randn(B, K, N).bfloat16(), torch.randn(R, 1, K) / 8, torch.randn(1, K) / 8
    d, P = torch.tensor(1e-5), torch.einsum("rck,bkn->bnr", W.double(), F.double())
    loc = torch.einsum("ck,bkn->bn", Wm.double(), F.double())
    x = (loc + (P @ torch.randn(B, R, 1).double())[..., 0] + 1e-5**0.5 * torch.randn(B, N)).float()
    exact = torch.distributions.LowRankMultivariateNormal(loc, P, torch.full((B, N), 1e-5, dtype=torch.float64))
    exact = exact.log_prob(x.double())
    mean, factor = LinearMean(F, Wm), LinearFactor(F, W)
    every = torch.ones(N, dtype=torch.bool)

    def jvp(x):
        return torch.func.jvp(lambda x: lowrank_mvn.log_prob(x, mean, factor, d), (x,), (x,))[0]

    with torch.autocast("cpu", torch.bfloat16):
        found = {
            "joined": lowrank_mvn.log_prob(x, mean, factor, d),
            "other features": lowrank_mvn.log_prob(x, LinearMean(F.clone(), Wm), factor, d),
            "mask": lowrank_mvn.log_prob(x, mean, factor.masked(every), d),
            "forward mode": jvp(x),
        }
    for name, ours in found.items():
        assert (ours - exact).abs().max() < 1e-2, name  # of μ in float32 alone: ε|μ|√(N/d), a few 1e-3


def test_kl_of_half_precision_features_is_exact_and_keeps_no_factor():
    F, weight, bias, mean_weight, mean_bias, *_ = tensors(torch.float32)
    F = F.bfloat16()
    ours = distribution(F, weight, bias, mean_weight, mean_bias, torch.tensor(0.1))
    exact = distribution(*(t.double() for t in (F, weight, bias, mean_weight, mean_bias, torch.tensor(0.1))))
    other = torch.distributions.LowRankMultivariateNormal(exact.loc * 0, exact.cov_factor, torch.ones(N).double())
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(kl(ours, other), kl(exact, other))
    torch.testing.assert_close(kl(other, ours.expand((2, B))), kl(other, exact).expand(2, B))
    assert not any(isinstance(t, torch.Tensor) for t in ours.__dict__.values())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("diagonal", ["pixel", "scalar"])
def test_half_precision_features(half, last, diagonal):
    """Features of half precision, all else float32 (as under autocast): the numbers of the rounded features."""
    F, weight, bias, mean_weight, mean_bias, d, x = tensors(torch.float32, last=last)
    F, d = F.to(half), d if diagonal == "pixel" else d[0, 0]

    def loss(F, weight, mean_weight, d):
        with torch.autocast("cpu", dtype=half):
            return distribution(F, weight, bias, mean_weight, mean_bias, d).log_prob(x.to(F.dtype)).double().sum()

    def exact(F, weight, mean_weight, d):
        means = mean_bias.double()
        return distribution(F, weight, bias.double(), mean_weight, means, d).log_prob(x.to(half).double()).sum()

    inputs = F, weight, mean_weight, d
    doubled = [t.double() for t in inputs]
    assert relative(loss(*inputs), exact(*doubled)) < 1e-5
    ours = gradients(loss, *inputs)
    assert ours[0].stride() == F.stride()
    for t, a, b in zip(inputs, ours, gradients(exact, *doubled), strict=True):
        assert a.dtype == t.dtype
        assert relative(a, b) < (torch.finfo(half).eps if a.dtype == half else 1e-4)
    with torch.autocast("cpu", dtype=half):
        D = distribution(F, weight, bias, mean_weight, mean_bias, d)
        samples, edited = D.sample((2,)), D.condition(x.to(half), x > 0.5).sample((2,))
        inside = D.log_prob(x.to(half))
    assert torch.equal(D.log_prob(x.to(half)), inside)  # where a training loop leaves autocast for the loss
    gram = LinearFactor(F, weight, bias).gram()
    assert relative(gram, LinearFactor(doubled[0], doubled[1], bias.double()).gram()) < 1e-6
    assert samples.dtype == edited.dtype == half
    assert torch.isfinite(edited.float()).all()
    full = distribution(*doubled[:2], bias.double(), doubled[2], mean_bias.double(), doubled[3])
    torch.testing.assert_close(D.variance.double(), full.variance, rtol=torch.finfo(half).eps, atol=1e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_rounded_once(monkeypatch, half):
    """Neither coefficients nor products: what a sample is off by is half a unit of its own dtype."""
    monkeypatch.setattr(linear_factor, "CONVERTED", 7)
    F, weight, bias, _, _, d, _ = tensors(torch.float32)
    F, loc = F.to(half), torch.zeros(B, N, dtype=half)
    noise = torch.randn(3, B, R).to(half), torch.randn(3, B, N).to(half)
    leaf = F.requires_grad_()
    y = lowrank_mvn.rsample(loc, LinearFactor(leaf, weight, bias), d, (3,), noise=noise)
    factor = LinearFactor(*(t.detach().double() for t in (F, weight, bias)))
    exact = lowrank_mvn.rsample(loc.double(), factor, d.double(), (3,), noise=[t.double() for t in noise])
    assert y.dtype == half
    assert ((y.double() - exact).abs() <= 0.501 * torch.finfo(half).eps * exact.abs() + 1e-5).all()
    y.sum().backward()
    assert leaf.grad.dtype == half
