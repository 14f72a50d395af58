"""What cannot be computed with meets an error that names the argument, what was found and what was expected."""

import fractions
import re

import numpy as np
import pytest
import torch
import torch.distributions as td
from torch._subclasses.fake_tensor import FakeTensorMode

import lowrank_mvn
from lowrank_mvn import (
    GlobalLocalNormal,
    LinearFactor,
    LinearMean,
    LowRankMultivariateNormal,
    Stencil,
    StencilMultivariateNormal,
)

LOC, P, D = torch.zeros(2, 6), torch.ones(2, 6, 3), torch.ones(2, 6)
F, W = torch.ones(2, 4, 3, 2), torch.ones(3, 1, 4)


@pytest.fixture(autouse=True)
def validated(monkeypatch):
    """By default arguments are validated, also after a test that compiled: `torch.compile` turns it off for good."""
    monkeypatch.setattr(td.Distribution, "_validate_args", True)


STENCIL = Stencil(torch.zeros(1, 3, 2), torch.zeros(1, 4, 3, 2))
NO_TENSORS = {
    "none": None,
    "list": [0.0] * 6,
    "array": np.zeros(6),
    "string": "0",
    "class": torch.Tensor,
    "mean": LinearMean(F, torch.ones(1, 4)),
}
NO_NUMBERS = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.flatten(0, -2).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "lazy": lambda t: torch.nn.UninitializedParameter(),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}
PLACES = {
    "loc": lambda t: LowRankMultivariateNormal(t, P, D),
    "cov_factor": lambda t: LowRankMultivariateNormal(LOC, t, D),
    "cov_diag": lambda t: LowRankMultivariateNormal(LOC, P, t),
    "value": lambda t: LowRankMultivariateNormal(LOC, P, D).log_prob(t),
    "noise[0]": lambda t: LowRankMultivariateNormal(LOC, P, D).rsample(noise=(t, LOC)),
    "noise[1]": lambda t: LowRankMultivariateNormal(LOC, P, D).rsample(noise=(P[:, 0], t)),
    "A": lambda t: LowRankMultivariateNormal(LOC, P, D).mix(t),
    "features": lambda t: LinearFactor(t, W),
    "weight": lambda t: LinearFactor(F, t),
    "bias": lambda t: LinearMean(F, torch.ones(1, 4), t),
}
GIVEN = {"cov_factor": P, "noise[0]": P[:, 0], "A": torch.ones(3, 3), "features": F, "weight": W, "bias": torch.ones(1)}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|quantiz|CSR|deprecat)")
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_tensor_of_numbers_is_named(name):
    call, given = PLACES[name], GIVEN.get(name, LOC)
    for what, make in NO_NUMBERS.items():
        with pytest.raises(TypeError, match=f"^{re.escape(name)} must be .*, got ") as caught:
            call(make(given))
        assert what == "lazy" or "expected one" in str(caught.value)
    for what, thing in NO_TENSORS.items():
        if (name, what) in (("bias", "none"), ("loc", "mean")):
            continue  # which may be left out; which is one
        # As in torch, a value that is no tensor is a ValueError.
        error = ValueError if name == "value" else TypeError
        with pytest.raises(error, match=f"^{re.escape(name)} must be .*, got {type(thing).__name__}$"):
            call(thing)
    integers = given.int()
    if name == "value":
        assert call(integers).shape == (2,)  # as in torch's arithmetic
        assert call(integers.to(torch.uint16)).shape == call(integers > 0).shape == (2,)
    else:
        with pytest.raises(TypeError, match=f"^{re.escape(name)} must be .*, got a tensor of dtype torch.int32"):
            call(integers)


def test_values_that_are_no_tensors_are_torchs_error_everywhere():
    stencil = StencilMultivariateNormal(LOC, STENCIL)
    calls = [
        LowRankMultivariateNormal(LOC, P, D, validate_args=False).log_prob,
        LowRankMultivariateNormal(LOC, P, D).log_prob_and_entropy,
        lambda x: LowRankMultivariateNormal(LOC, P, D).condition(x, LOC > 0),
        lambda x: lowrank_mvn.log_prob(x, LOC, P, D),
        stencil.log_prob,
        lambda x: stencil.condition(x, LOC > 0),
        GlobalLocalNormal(LOC, P, STENCIL).log_prob,
    ]
    for call in [td.LowRankMultivariateNormal(LOC, P, D).log_prob, *calls]:
        with pytest.raises(ValueError, match=r"value.* must be a [tT]ensor"):
            call(None)


NUMBERS = {
    "float": 0.5,
    "float32": np.float32(0.5),
    "float64": np.float64(0.5),
    "int": np.int64(2),
    "fraction": fractions.Fraction(1, 2),
    "0-d": torch.tensor(0.5),
    "[1]": torch.tensor([0.5]),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_variances_that_are_numbers(kind):
    d = NUMBERS[kind]
    expected = td.LowRankMultivariateNormal(LOC, P, torch.full((2, 6), float(d))).entropy()
    torch.testing.assert_close(LowRankMultivariateNormal(LOC, P, d).entropy(), expected)
    torch.testing.assert_close(lowrank_mvn.entropy(P, d), expected)


def covariance_row(index):
    return lambda: LowRankMultivariateNormal(LOC, P, D).covariance_row(index)


def sample(shape):
    return lambda: LowRankMultivariateNormal(LOC, P, D).rsample(shape)


def noise(given):
    return lambda: LowRankMultivariateNormal(LOC, P, D).rsample(noise=given)


def expand(shape, p=None):
    return lambda: (p or LowRankMultivariateNormal(LOC, P, D)).expand(shape)


def diag(number):
    return lambda: LowRankMultivariateNormal(LOC, P, number)


OTHERS = [
    (ValueError, diag(10**400), "cov_diag is an integer of 1329 bits, expected a number that torch.float32 holds"),
    (ValueError, diag(1e300), r"cov_diag is 1e\+300, expected a number that torch.float32 holds"),
    (ValueError, diag(-(10**400)), "cov_diag is an integer of 1329 bits"),
    (ValueError, diag(float("nan")), r"cov_diag of shape \[1\] has values that are not finite"),
    (ValueError, diag(-1), "cov_diag .* found values that are not positive"),
    (TypeError, diag(True), "cov_diag must be a number or a floating-point tensor, got bool"),
    (TypeError, diag(1j), "cov_diag must be a number or a floating-point tensor, got complex"),
    (TypeError, covariance_row(1.7), "index must be an integer, got float"),
    (TypeError, covariance_row(True), "index must be an integer, got bool"),
    (TypeError, covariance_row(None), "index must be an integer, got NoneType"),
    (TypeError, covariance_row(torch.tensor(1.7)), r"index must be an integer, got a tensor of dtype torch.float32"),
    (TypeError, covariance_row(torch.tensor([1, 2])), r"index must be an integer, .* of shape \[2\]"),
    (ValueError, covariance_row(6), r"index 6 is out of range for event shape \[6\]"),
    (ValueError, covariance_row(-7), r"index -7 is out of range for event shape \[6\]"),
    (TypeError, sample(3), "sample_shape must be a sequence of sizes, got 3"),
    (TypeError, sample((1.5,)), r"sample_shape must be a sequence of sizes, got \(1.5,\)"),
    (ValueError, sample((-1,)), r"sample_shape is \[-1\], expected sizes that are not negative"),
    (TypeError, noise((LOC,)), r"noise must be a pair, ω_p \[..., 3\] and ω_d \[..., 6\]; got 1 values"),
    (TypeError, noise((LOC, LOC, LOC)), "noise must be a pair, .*; got 3 values"),
    (TypeError, noise(LOC), "noise must be a pair, .*; got a tensor of dtype torch.float32"),
    (ValueError, noise((LOC, LOC)), r"noise\[0\] has shape \[2, 6\], expected one that broadcasts to \[2, 3\]"),
    (ValueError, expand((5,)), r"batch_shape is \[5\], expected one that \[2\] expands to"),
    (ValueError, expand(()), r"batch_shape is \[\], expected one that \[2\] expands to"),
    (ValueError, expand((-1,)), r"batch_shape is \[-1\], expected sizes that are not negative"),
    (TypeError, expand(3), "batch_shape must be a sequence of sizes, got 3"),
    (ValueError, expand((5,), StencilMultivariateNormal(LOC, STENCIL)), r"batch_shape is \[5\]"),
    (
        ValueError,
        lambda: LinearFactor(F[..., 0, 0], W),
        r"features has shape \[2, 4\], expected .* at least one spatial",
    ),
    (TypeError, lambda: LinearFactor(F, W, channels="1"), "channels must be an integer, got str"),
    (ValueError, lambda: LinearFactor(F, W, channels=0), "channels is 0, expected at least 1"),
    (TypeError, lambda: LinearFactor(F, W, mask=torch.ones(6)), "mask must be a tensor of dtype bool, got a tensor"),
    (ValueError, lambda: LinearFactor(F, W, mask=torch.ones(5) > 0), r"mask has shape \[5\], expected \[..., 6\]"),
    (ValueError, lambda: LinearFactor(F, W).mix(torch.ones(4, 2)), r"A has shape \[4, 2\], expected \[..., 3, Q\]"),
    (ValueError, lambda: LinearFactor(F, W).times(torch.ones(4)), r"omega has shape \[4\], expected \[..., 3\]"),
    (ValueError, lambda: LowRankMultivariateNormal(LOC, P, D).mix(torch.ones(3, 0)), r"A has shape \[3, 0\]"),
    (ValueError, lambda: LowRankMultivariateNormal(LOC, P, D).mix(torch.ones(5, 3, 2)), "batch shapes of A and of the"),
    (ValueError, lambda: LowRankMultivariateNormal(LOC, P, D).log_prob(LOC.to("meta")), "value is on meta, loc on cpu"),
    (
        ValueError,
        lambda: LowRankMultivariateNormal(LOC, P, D).condition(LOC, (LOC > 0).to("meta")),
        "observed is on meta",
    ),
    (TypeError, lambda: GlobalLocalNormal(LOC, P, D), "stencil must be a Stencil, got a tensor"),
    (
        TypeError,
        lambda: StencilMultivariateNormal(LOC, STENCIL).rsample(temperature=(1,)),
        "temperature must be a pair, t_P and t_L; got 1 values",
    ),
    (
        TypeError,
        lambda: GlobalLocalNormal(LOC, P, STENCIL).rsample(temperature=("1", 1)),
        "temperature must be a pair of numbers, got str",
    ),
    (TypeError, lambda: StencilMultivariateNormal(LOC, STENCIL).covariance_row(1.7), "index must be an integer"),
    (
        TypeError,
        lambda: StencilMultivariateNormal(LOC, STENCIL).condition(LOC, LOC > 0, variance="1"),
        "variance must be a number or a floating-point tensor, got str",
    ),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case[2][:24])
def test_other_arguments_are_named(case):
    error, call, message = case
    with pytest.raises(error, match=message):
        call()


# --- No pixels, no values --------------------------------------------------------------------------------------------


def test_no_pixels():
    """As in torch's class, whose scale_tril and divergence fail: everything is 0, and differentiable."""
    loc, P, d = torch.zeros(2, 0, requires_grad=True), torch.zeros(2, 0, 3, requires_grad=True), torch.ones(2, 0)
    theirs = td.LowRankMultivariateNormal(loc, P, d)
    linear = LinearFactor(torch.zeros(2, 4, 0, 5), torch.ones(3, 1, 4))
    for factor in (P, linear):
        for diagonal in (d, 0.5):
            p = LowRankMultivariateNormal(loc, factor, diagonal)
            for call in (
                lambda p: p.log_prob(torch.zeros(3, 2, 0)),
                lambda p: p.entropy(),
                lambda p: p.rsample((3,)),
                lambda p: p.variance,
                lambda p: p.covariance_matrix,
                lambda p: p.precision_matrix,
                lambda p: p.expand((3, 2)).log_prob(torch.zeros(0)),
                repr,
            ):
                found, expected = call(p), call(theirs)
                assert found == expected if isinstance(found, str) else torch.equal(found, expected)
            assert p.scale_tril.shape == (2, 0, 0)
            assert torch.equal(td.kl_divergence(p, p), torch.zeros(2))
            assert torch.equal(p.factor_gram(), torch.zeros(2, 3, 3, dtype=torch.float64))
            assert p.condition(torch.zeros(2, 0), torch.zeros(2, 0) > 0).log_prob(torch.zeros(2, 0)).tolist() == [0, 0]
            assert p.mix(torch.ones(3, 2)).entropy().tolist() == [0, 0]
            (p.log_prob(torch.zeros(2, 0)) + p.entropy()).sum().backward()


def test_dry_runs_validate_nothing():
    """Meta and fake tensors have no values; shapes are checked, and distributions validate by default."""
    with FakeTensorMode():
        fake = [torch.ones(t.shape) for t in (LOC, P, D)]
        assert LowRankMultivariateNormal(*fake).log_prob(fake[0]).shape == (2,)
    meta = [t.to("meta") for t in (LOC, P, D)]
    p = LowRankMultivariateNormal(*meta)
    assert [t.is_meta for t in (p.log_prob(meta[0]), p.entropy(), p.rsample(), p.variance)] == [True] * 4
    with pytest.raises(ValueError, match="cov_diag has shape"):
        LowRankMultivariateNormal(*meta[:2], meta[2][:, :4])
