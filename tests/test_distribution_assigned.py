"""One state: what is assigned to an attribute of torch's class is followed everywhere, or refused."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributions as td
from state_cases import CALLS, KINDS, B, N, R, dense, same

from lowrank_mvn import LowRankMultivariateNormal

# --- Assignments ----------------------------------------------------------------------------------------------------

ATTRIBUTES = [
    "loc",
    "cov_factor",
    "cov_diag",
    "_unbroadcasted_cov_factor",
    "_unbroadcasted_cov_diag",
    "_capacitance_tril",
]


def assigned(p, *names):
    return LowRankMultivariateNormal(*(getattr(p, n) for n in ("loc", "cov_factor", "cov_diag")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ATTRIBUTES[:5])
def test_what_is_assigned_is_followed_everywhere(kind, name):
    leaves, arguments = KINDS[kind]()
    x = torch.randn(B, N, dtype=torch.float64)
    for call in CALLS.values():
        p = LowRankMultivariateNormal(*arguments())
        call(p, x)
        setattr(p, name, 1.5 * getattr(p, name).detach())
        torch.testing.assert_close(getattr(p, name), 1.5 * getattr(LowRankMultivariateNormal(*arguments()), name))
        now = tuple(getattr(p, n) for n in ("loc", "cov_factor", "cov_diag"))
        same(p, lambda now=now: now, x, leaves, more=call is CALLS["both"])


def test_in_place_operators_on_attributes():
    p = LowRankMultivariateNormal(*(t.detach() for t in dense()[0].values()))
    x = torch.randn(B, N, dtype=torch.float64)
    p.log_prob(x)
    expected = p.loc + 10, 2 * p.cov_factor, p.cov_diag / 4
    p.loc += 10
    p.cov_factor *= 2
    p._unbroadcasted_cov_diag /= 4
    torch.testing.assert_close((p.loc, p.cov_factor, p.cov_diag), expected)
    torch.testing.assert_close(p.log_prob(x), LowRankMultivariateNormal(*expected).log_prob(x))
    torch.testing.assert_close(p.mean, expected[0])


@pytest.mark.parametrize("kind", ["dense", "one-d", "linear-mean"])
def test_moved_by_hand(kind):
    """Attribute by attribute, public and underscored, in many orders, to another dtype as to another device."""
    _, arguments = KINDS[kind]()
    x = torch.randn(B, N)
    exact = LowRankMultivariateNormal(*arguments())
    for names in itertools.islice(itertools.permutations(ATTRIBUTES), None, None, 17):
        p = LowRankMultivariateNormal(*arguments())
        p.entropy()
        for name in names:
            setattr(p, name, getattr(p, name).float())
        found = p.log_prob(x)
        assert found.dtype == p.loc.dtype == p.cov_diag.dtype == torch.float32
        torch.testing.assert_close(found, exact.log_prob(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_parts_on_two_devices_are_refused_by_name():
    p = LowRankMultivariateNormal(*(t.detach() for t in dense()[0].values()))
    p.cov_factor = p.cov_factor.to("meta")
    with pytest.raises(ValueError, match="cov_factor is on meta, loc on cpu"):
        p.log_prob(torch.zeros(N, dtype=torch.float64))


REFUSED = {
    "loc": (lambda p: torch.zeros(N + 1), ValueError, "loc has shape"),
    "cov_factor": (lambda p: torch.zeros(5, N, R), ValueError, "cov_factor has shape"),
    "cov_diag": (lambda p: torch.zeros(3, N), ValueError, "cov_diag has shape"),
    "_unbroadcasted_cov_factor": (lambda p: torch.zeros(R), ValueError, "cov_factor has shape"),
    "_unbroadcasted_cov_diag": (lambda p: [1.0], TypeError, "cov_diag must be"),
    "_capacitance_tril": (lambda p: 2 * p._capacitance_tril, ValueError, "_capacitance_tril follows from"),
    "mean": (lambda p: p.mean, AttributeError, "has no setter"),
    "variance": (lambda p: p.variance, AttributeError, "has no setter"),
    "covariance_matrix": (lambda p: p.covariance_matrix, AttributeError, "has no setter"),
    "precision_matrix": (lambda p: p.precision_matrix, AttributeError, "has no setter"),
    "scale_tril": (lambda p: p.scale_tril, AttributeError, "has no setter"),
    "batch_shape": (lambda p: p.batch_shape, AttributeError, "has no setter"),
    "event_shape": (lambda p: p.event_shape, AttributeError, "has no setter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    value, error, message = REFUSED[name]
    p = LowRankMultivariateNormal(*(t.detach() for t in dense()[0].values()))
    before = p.log_prob(p.loc)
    with pytest.raises(error, match=message):
        setattr(p, name, value(p))
    torch.testing.assert_close(p.log_prob(p.loc), before)


def test_every_attribute_of_torchs_class_is_accounted_for():
    """What an instance of torch's class holds is followed, refused, or a shape or flag that all methods read."""
    theirs = td.LowRankMultivariateNormal(torch.zeros(N), torch.ones(N, R), torch.ones(N), validate_args=True)
    read = {"_batch_shape", "_event_shape", "_validate_args"}
    assert set(vars(theirs)) - read <= set(ATTRIBUTES)
    p = LowRankMultivariateNormal(torch.zeros(N), torch.ones(N, R), torch.ones(N), validate_args=True)
    p._validate_args = False
    assert p.log_prob(torch.full((N,), torch.nan)).isnan()
    p._batch_shape = torch.Size((3,))
    found = p.loc, p.cov_factor, p.cov_diag, p.variance, p.entropy(), p.log_prob(torch.zeros(N)), p.sample(), p.mode
    assert all(t.shape[0] == 3 for t in found)


# --- Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_after_changes(kind):
    """A copy is of what is now, and goes its own way."""
    x = torch.randn(B, N, dtype=torch.float64)
    leaves, arguments = KINDS[kind]()
    for t in leaves.values():
        t.requires_grad_(False)
    for copied in (
        copy.copy,
        copy.deepcopy,
        lambda p: pickle.loads(pickle.dumps(p)),
        lambda p: p.expand(p.batch_shape),
    ):
        p = LowRankMultivariateNormal(*arguments())
        CALLS["both"](p, x)
        for t in leaves.values():
            t.mul_(1.1)
        q = copied(p)
        expected = CALLS["both"](LowRankMultivariateNormal(*arguments()), x)
        torch.testing.assert_close(CALLS["both"](q, x), expected)
        q.loc = q.loc + 1
        q.cov_diag = 2 * q.cov_diag
        torch.testing.assert_close(CALLS["both"](p, x), expected)
        assert not torch.allclose(q.log_prob(x), expected[0])
