"""`StencilMultivariateNormal` as a distribution of torch's, and bad input.

`test_triton_session.py` runs it a second time with the kernels in Triton's interpreter; with a device they are compiled
(marker `gpu`).
"""

import copy
import pickle

import pytest
import torch
import torch.distributions as td
from stencil_cases import F64, GREY, SHAPES, Dense, distribution, make, weights

import lowrank_mvn
from lowrank_mvn import LinearMean, Stencil, StencilMultivariateNormal

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


def test_contract():
    D = distribution(SHAPES[9])
    N = D.event_shape[0]
    assert (D.batch_shape, D.event_shape, D.has_rsample) == ((2, 3), (18,), True)
    assert D.mean.shape == D.mode.shape == D.variance.shape == D.stddev.shape == (2, 3, N)
    assert D.sample().shape == (2, 3, N)
    assert D.rsample((2, 1)).shape == (2, 1, 2, 3, N)
    assert D.log_prob(torch.zeros(4, 1, 1, N, dtype=F64)).shape == (4, 2, 3)
    assert D.entropy().shape == D.perplexity().shape == (2, 3)
    assert repr(D).startswith("StencilMultivariateNormal(loc: torch.Size([2, 3, 18]), stencil.log_diagonal: ")
    E = D.expand((4, 2, 3))
    x = torch.randn(2, 3, N, dtype=F64)
    assert type(E) is type(D)
    torch.testing.assert_close(E.log_prob(x), D.log_prob(x).expand(4, 2, 3))
    torch.testing.assert_close(E.entropy(), D.entropy().expand(4, 2, 3))
    assert E.sample((2,)).shape == (2, 4, 2, 3, N)
    assert E.variance.shape == (4, 2, 3, N)
    for copied in (copy.deepcopy(D), pickle.loads(pickle.dumps(D)), copy.copy(D)):
        torch.testing.assert_close(copied.log_prob(x), D.log_prob(x))
    torch.testing.assert_close(td.Independent(D, 1).log_prob(x), D.log_prob(x).sum(-1))
    torch.testing.assert_close(D.log_prob(torch.zeros(N, dtype=torch.int64)), D.log_prob(torch.zeros(N, dtype=F64)))


def test_parameters_broadcast():
    stencil, _ = make(GREY)
    shared = Stencil(stencil.log_diagonal[:1], stencil.neighbours)
    loc = torch.randn(3, 1, 20, dtype=F64)
    D = StencilMultivariateNormal(loc, shared)
    assert D.batch_shape == (3, 2)
    x = torch.randn(3, 2, 20, dtype=F64)
    torch.testing.assert_close(
        D.log_prob(x), Dense(loc, Stencil(stencil.log_diagonal[[0, 0]], shared.neighbours)).log_prob(x)
    )
    assert D.sample((4,)).shape == (4, 3, 2, 20)


def test_equal_seeds_give_equal_samples():
    D = distribution(GREY)
    samples = []
    for _ in range(2):
        torch.manual_seed(5)
        samples.append(D.sample((2,)))
    assert torch.equal(*samples)


def test_a_linear_mean():
    stencil, _ = make(GREY)
    F = torch.randn(2, 3, 4, 5, dtype=F64)
    mean = LinearMean(F, torch.randn(1, 3, dtype=F64), torch.randn(1, dtype=F64))
    x = torch.randn(2, 20, dtype=F64)
    D = StencilMultivariateNormal(mean, stencil)
    torch.testing.assert_close(D.log_prob(x), Dense(mean.materialise(), stencil).log_prob(x))


def test_meta_tensors():
    log_diagonal, neighbours, _ = (None if t is None else t.to("meta") for t in weights((3,), 1, (4, 5), (3, 3)))
    loc = torch.zeros(3, 20, dtype=F64, device="meta")
    D = StencilMultivariateNormal(loc, Stencil(log_diagonal, neighbours), validate_args=False)
    assert [t.shape for t in (D.log_prob(loc), D.entropy(), D.rsample((2,)))] == [(3,), (3,), (2, 3, 20)]


BAD = [
    ("image-mean", ValueError, r"loc has shape \[1, 4, 5\], expected \[..., 20\] because the stencil has 1 channels of",
     lambda t, s, loc: StencilMultivariateNormal(loc[0].view(1, 4, 5), Stencil(t, s))),
    ("value", ValueError, r"value has shape \[2, 21\], expected \[..., 20\]",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s), validate_args=False).log_prob(
         torch.zeros(2, 21, dtype=F64))),
    ("mask", ValueError, r"observed has shape \[19\], expected \[..., 20\]",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s)).condition(loc, torch.ones(19) > 0)),
    ("mask-dtype", TypeError, "observed must be a tensor of dtype bool",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s)).condition(loc, torch.ones(20))),
    ("variance", ValueError, "variance has values that are negative",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s)).condition(loc, torch.ones(20) > 0, -1.0)),
    ("neighbours", ValueError, r"neighbours has shape \[2, 1, 3, 4, 5\], expected \[..., 1, 4, 4, 5\]",
     lambda t, s, loc: Stencil(t, s[:, :, :3])),
    ("spatial", ValueError, r"neighbours has shape", lambda t, s, loc: Stencil(t, s[..., :4])),
    ("too-wide", ValueError, r"neighbourhood \(9, 3\) has neighbours that no pixel of an image of \[4, 5\] has",
     lambda t, s, loc: Stencil(t, s, neighbourhood=(9, 3))),
    ("even", ValueError, r"neighbourhood is \(2, 3\), expected odd", lambda t, s, loc: Stencil(t, s, None, (2, 3))),
    ("dims", ValueError, r"log_diagonal has shape \[5\]", lambda t, s, loc: Stencil(t[0, 0, 0], s)),
    ("channels", ValueError, r"expected 1 or channels = 3", lambda t, s, loc: Stencil(t[:, [0, 0]], s, channels=3)),
    ("ties", ValueError, r"ties has shape \[2, 1, 4, 5\], expected 3 pairs of 3 channels, \[3, 4, 5\] or \[3, 1, 1\]",
     lambda t, s, loc: Stencil(t, s, t, channels=3)),
    ("batch", ValueError, "Incompatible batch shapes of log_diagonal, neighbours and ties",
     lambda t, s, loc: Stencil(t, s[[0, 0, 0]])),
    ("batch-loc", ValueError, "Incompatible batch shapes of loc and stencil",
     lambda t, s, loc: StencilMultivariateNormal(loc[[0, 0, 0]], Stencil(t, s))),
    ("dtype", TypeError, "neighbours has dtype torch.float32, log_diagonal has torch.float64",
     lambda t, s, loc: Stencil(t, s.float())),
    ("dtype-loc", TypeError, "stencil.log_diagonal has dtype",
     lambda t, s, loc: StencilMultivariateNormal(loc.float(), Stencil(t, s))),
    ("no-tensor", TypeError, "log_diagonal must be a floating-point tensor, got float",
     lambda t, s, loc: Stencil(0.5, s)),
    ("no-stencil", TypeError, "stencil must be a Stencil, got a tensor",
     lambda t, s, loc: StencilMultivariateNormal(loc, t)),
    ("noise", ValueError, r"noise\[1\] has shape \[3\]",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s)).rsample(noise=(None, torch.zeros(3, dtype=F64)))),
    ("nan", ValueError, "stencil.neighbours of shape .* has values that are not finite",
     lambda t, s, loc: StencilMultivariateNormal(loc, Stencil(t, s / 0), validate_args=True)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, message, call):
    stencil, loc = make(GREY)
    with pytest.raises(error, match=message):
        call(stencil.log_diagonal, stencil.neighbours, loc)


def test_public():
    assert {"Stencil", "StencilMultivariateNormal", "GlobalLocalNormal"} <= set(lowrank_mvn.__all__)
