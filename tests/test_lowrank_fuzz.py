"""Random calls: each gives what torch's class gives in float64, or an error that names an argument."""

import random

import numpy as np
import pytest
import torch
from lowrank_cases import oracle

import lowrank_mvn
from lowrank_mvn import LinearFactor, LowRankMultivariateNormal

# What an error may name.
NAMES = (
    "value",
    "loc",
    "cov_factor",
    "cov_diag",
    "noise",
    "observed",
    "features",
    "weight",
    "bias",
    "mask",
    "A has",
    "A must",
    "A is",
    "of A and",
)


def draws(r):
    """Tensors of a random problem, each with its own broadcast batch, by name."""
    N, R = r.choice((1, 2, 5, 9)), r.choice((1, 2, 7))
    batch = r.choice(((), (1,), (3,), (2, 3), (0,)))
    dtype = r.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))

    def some():
        """The batch, or what broadcasts to it."""
        kept = batch[r.randrange(len(batch) + 1) :]
        return tuple(r.choice((size, size, 1)) for size in kept)

    def tensor(*shape):
        t = torch.randn(shape, dtype=torch.float64).to(dtype)
        if r.random() < 0.3 and len(shape) > 1:
            t = t.mT.contiguous().mT  # the other layout
        return t

    d = (0.5 + torch.rand((*some(), r.choice((N, N, 1))))).to(dtype)
    given = {
        "value": tensor(*some(), N),
        "loc": tensor(*batch, N),
        "cov_factor": tensor(*some(), N, R),
        "cov_diag": r.choice((d, d, d, 0.7, torch.tensor(0.7, dtype=dtype))),
        "omega_p": tensor(*some(), R),
        "omega_d": tensor(*some(), N),
        "observed": torch.rand(*some(), N) < 0.5,
        "A": tensor(R, r.choice((1, 3))),
    }
    if r.random() < 0.4:
        given |= features(r, batch, N, R, dtype)
    return given


def features(r, batch, N, R, dtype):
    """In the place of a factor: what it is a linear map of, with one batch dimension or an item."""
    channels, K = r.choice([c for c in (1, 3) if N % c == 0]), r.choice((1, 4))
    spatial = r.choice(((N // channels,), (1, N // channels)))
    weight = torch.randn((*r.choice(((), (), (1,))), R, channels, K))
    return {
        "cov_factor": None,
        "features": torch.randn((batch[-1] if batch else 1, K, *spatial)).to(dtype),
        "weight": weight.to(dtype),
        "bias": r.choice((None, torch.randn(weight.shape[:-1]).to(dtype))),
        "mask": r.choice((None, None, torch.rand(N) < 0.7)),
    }


def spoiled(r, t):
    """Something else in the place of an argument."""
    if not isinstance(t, torch.Tensor):
        return r.choice((None, "1", [t], 10**400, np.array(t), True, t))
    changes = [
        lambda t: None,
        lambda t: t.tolist(),
        lambda t: np.ones(t.shape),
        lambda t: t.int(),
        lambda t: t > 0,
        lambda t: t.to(torch.complex64),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.double(),
        lambda t: t.half(),
        lambda t: t.float(),
        lambda t: t.float().to(torch.float8_e4m3fn),
        lambda t: t[..., :-1] if t.dim() else t,
        lambda t: t[..., :0] if t.dim() else t,
        lambda t: torch.cat([t, t], -1) if t.dim() else t,
        lambda t: t.unsqueeze(0),
        lambda t: t.unsqueeze(-1),
        lambda t: t.mT if t.dim() > 1 else t,
        lambda t: t[0] if t.dim() and len(t) else t,
        lambda t: t.expand(4, *t.shape),
        lambda t: t.sum(),
        lambda t: torch.view_as_complex(torch.stack([-t.float(), -t.float()], -1)).conj().imag,  # a lazy negation
        lambda t: t.clone().as_strided(t.shape, [0] * t.dim()),
    ]
    return r.choice(changes)(t)


def calls(r, a):
    """Name, call and what the same is by torch's class in float64."""
    loc, d, x, validate = a["loc"], a["cov_diag"], a["value"], r.random() < 0.5

    def factor():
        linear = "features" in a
        return LinearFactor(a["features"], a["weight"], a["bias"], mask=a["mask"]) if linear else a["cov_factor"]

    def exact():
        P = factor()
        return P.materialise(torch.float64) if isinstance(P, LinearFactor) else P.double()

    def ours():
        return LowRankMultivariateNormal(loc, factor(), d, validate_args=validate)

    def theirs():
        return oracle(loc, exact(), d if isinstance(d, torch.Tensor) else torch.tensor(float(d)))

    return {
        "log_prob": (lambda: ours().log_prob(x), lambda: theirs().log_prob(x.double())),
        "function": (lambda: lowrank_mvn.log_prob(x, loc, factor(), d), lambda: theirs().log_prob(x.double())),
        "entropy": (lambda: ours().entropy(), lambda: theirs().entropy()),
        "rsample": (
            lambda: ours().rsample(noise=(a["omega_p"], a["omega_d"])),
            lambda: (
                theirs().loc
                + (exact() @ a["omega_p"].double().unsqueeze(-1)).squeeze(-1)
                + theirs().cov_diag.sqrt() * a["omega_d"].double()
            ),
        ),
        "condition": (lambda: ours().condition(x, a["observed"]).loc, lambda: conditional(theirs(), x, a["observed"])),
        "mix": (
            lambda: ours().mix(a["A"]).entropy(),
            lambda: oracle(loc, exact() @ a["A"].double(), theirs().cov_diag).entropy(),
        ),
        "variance": (lambda: ours().variance, lambda: theirs().variance),
    }


def conditional(p, x, observed):
    """The mean given what is observed, densely."""
    shape = torch.broadcast_shapes(x.shape, observed.shape, p.loc.shape)
    x, loc, observed = (t.expand(shape) for t in (x.double(), p.loc, observed))
    Sigma = p.covariance_matrix.expand(*shape, shape[-1])
    both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    known = torch.where(both, Sigma, torch.eye(shape[-1], dtype=torch.float64))
    gain = torch.linalg.solve(known, torch.where(observed, x - loc, 0).unsqueeze(-1))
    across = torch.where(observed.unsqueeze(-2), Sigma, 0)
    return torch.where(observed, x, loc + (across @ gain).squeeze(-1))


def check(seed):
    """Whether the call was right, or an error."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    given = draws(r)
    for name in r.sample(sorted(given), r.choice((0, 1, 1, 2))):
        given[name] = spoiled(r, given[name])
    name, (call, expected) = r.choice(list(calls(r, given).items()))
    try:
        found = call()
    except (ValueError, TypeError, NotImplementedError) as error:
        message = str(error)
    else:
        if found.numel() and not found.is_meta and not found.isnan().any() and given["loc"].shape[-1]:
            half = any(isinstance(t, torch.Tensor) and t.dtype in (torch.half, torch.bfloat16) for t in given.values())
            rounded = half and name in ("rsample", "condition", "variance", "mix")
            tolerance = 1e-8 if found.dtype == torch.float64 else 3e-2 if rounded else 1e-4
            exact = expected()
            assert found.shape == exact.shape, (seed, name)
            assert torch.allclose(found.double(), exact.double(), rtol=tolerance, atol=10 * tolerance), (seed, name)
        return True
    assert any(n in message for n in NAMES), (seed, name, message)
    return False


@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|deprecat)")
@pytest.mark.parametrize("block", range(8))
def test_a_random_call_is_right_or_an_error_that_names_an_argument(block):
    right = sum(check(seed) for seed in range(75 * block, 75 * block + 75))
    assert 20 <= right <= 65
