"""Ours in the place of torch's class: by `patch_torch`, or by hand as programs do that cannot be edited."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributions as td
from lowrank_cases import parameters
from torch.distributions import lowrank_multivariate_normal as module

import lowrank_mvn
from lowrank_mvn import LowRankMultivariateNormal

Torchs = td.LowRankMultivariateNormal


def by_hand(*holders):
    def swap(monkeypatch):
        for holder in holders:
            monkeypatch.setattr(holder, "LowRankMultivariateNormal", LowRankMultivariateNormal)

    return swap


def patched(monkeypatch):
    monkeypatch.setattr(module, "LowRankMultivariateNormal", Torchs)  # back, whatever the test does
    monkeypatch.setattr(td, "LowRankMultivariateNormal", Torchs)
    return lowrank_mvn.patch_torch()


WAYS = {"patch_torch": patched, "by-hand": by_hand(td), "by-hand-in-both": by_hand(td, module)}


@pytest.fixture(params=WAYS)
def swapped(request, monkeypatch):
    patch = WAYS[request.param](monkeypatch)
    yield request.param
    if patch:
        patch.undo()


def everything(p, q):
    """What is asked of torch's class, of two distributions."""
    x = p.loc + 1
    dense = td.MultivariateNormal(q.loc, covariance_matrix=q.covariance_matrix)
    return [
        p.log_prob(x),
        p.entropy(),
        p.variance,
        p.covariance_matrix,
        p.precision_matrix,
        p.scale_tril,
        p._capacitance_tril,
        td.kl_divergence(p, q),
        td.kl_divergence(q, p),
        td.kl_divergence(p, dense),
        td.kl_divergence(dense, p),
        p.expand((2, *p.batch_shape)).log_prob(x),
        td.Independent(p, 1).log_prob(x),
        *(c.log_prob(x) for c in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p)))),
    ]


@pytest.fixture
def before():
    """Parameters of two distributions, and what torch's class says of them."""
    both = parameters((3,), 5, 2), parameters((3,), 5, 2)
    return *both, everything(*(Torchs(*a) for a in both))


def test_everything_goes_on_as_before(before, swapped):
    first, second, expected = before
    p, q = (td.LowRankMultivariateNormal(*a) for a in (first, second))
    assert type(p) is LowRankMultivariateNormal
    torch.testing.assert_close(everything(p, q), expected)
    # Beside an instance of torch's own class.
    torch.testing.assert_close(td.kl_divergence(p, Torchs(*second)), td.kl_divergence(p, q))
    torch.testing.assert_close(td.kl_divergence(Torchs(*first), q), td.kl_divergence(p, q))
    assert isinstance(p, td.LowRankMultivariateNormal)
    assert isinstance(p, Torchs)
    assert repr(p) == repr(Torchs(*first))


@pytest.mark.parametrize("swapped", ["patch_torch", "by-hand"], indirect=True)
def test_what_was_torchs_before_stays_in_use(swapped):
    """Instances, and a subclass, of torch's own class (by hand in its module too, its methods would not find it)."""

    class Named(Torchs):
        pass

    a = parameters((3,), 5, 2)
    for p in (Torchs(*a), Named(*a)):
        torch.testing.assert_close(p.expand((2, 3)).log_prob(a[0]), p.log_prob(a[0]).expand(2, 3))
        assert type(p.expand((2, 3))) is type(p)
    p = Torchs(*a)
    for copied in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(copied) is Torchs
        torch.testing.assert_close(copied.log_prob(a[0]), p.log_prob(a[0]))
    with pytest.raises(NotImplementedError):
        type("Other", (Torchs,), {"__init__": lambda self, *a: Torchs.__init__(self, *a)})(*a).expand((2, 3))


def test_pickles_of_torchs_class_open_as_ours(monkeypatch):
    loc, P, d = parameters((3,), 5, 2)
    p = Torchs(loc[:1], P[0], d[0]).expand((2, 3))
    p.variance, p.covariance_matrix, p.extra = p.variance, p.covariance_matrix, 7
    text = pickle.dumps(p)
    with lowrank_mvn.patch_torch():
        ours = pickle.loads(text)
    assert type(ours) is LowRankMultivariateNormal
    assert ours.extra == 7
    for name in ("loc", "cov_factor", "cov_diag", "variance", "covariance_matrix", "_capacitance_tril"):
        torch.testing.assert_close(getattr(ours, name), getattr(p, name))
    torch.testing.assert_close(ours.log_prob(loc), p.log_prob(loc))
    ours.cov_diag = 2 * ours.cov_diag
    torch.testing.assert_close(ours.variance, p.variance + p.cov_diag)


def test_pickles_of_ours_need_no_patch():
    a = parameters((3,), 5, 2)
    with lowrank_mvn.patch_torch():
        text = pickle.dumps(td.LowRankMultivariateNormal(*a))
    torch.testing.assert_close(pickle.loads(text).log_prob(a[0]), Torchs(*a).log_prob(a[0]))


def names():
    return td.LowRankMultivariateNormal, module.LowRankMultivariateNormal


def test_undo():
    """Each call once, in any order; nested; also where it ends in an error."""
    before = dict(vars(Torchs))
    first, second = lowrank_mvn.patch_torch(), lowrank_mvn.patch_torch()
    assert names() == (LowRankMultivariateNormal,) * 2
    first.undo()
    first.undo()
    assert names() == (LowRankMultivariateNormal,) * 2
    with pytest.raises(KeyError), second:
        raise KeyError
    assert names() == (Torchs, Torchs)
    assert dict(vars(Torchs)) == before
    second.undo()
    with lowrank_mvn.patch_torch():
        pass
    assert names() == (Torchs, Torchs)
    lowrank_mvn.patch_torch()  # thrown away: it holds
    gc.collect()
    assert names() == (LowRankMultivariateNormal,) * 2
    for patch in list(lowrank_mvn.distributions.patch._patches):
        patch.undo()
    assert names() == (Torchs, Torchs)


def test_another_class_in_the_same_place_is_left_there(monkeypatch):
    class Other(Torchs):
        pass

    monkeypatch.setattr(td, "LowRankMultivariateNormal", Torchs)
    with lowrank_mvn.patch_torch():
        td.LowRankMultivariateNormal = Other
    assert names() == (Other, Torchs)


def test_from_many_threads():
    def work():
        for _ in range(50):
            with lowrank_mvn.patch_torch():
                seen.append(names())

    seen = []
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {(LowRankMultivariateNormal,) * 2}
    assert names() == (Torchs, Torchs)


def test_a_program_that_one_cannot_edit():
    """In the order of its documentation: the patch, then the import of what binds the name."""
    code = """
import lowrank_mvn
with lowrank_mvn.patch_torch():
    from torch.distributions import LowRankMultivariateNormal
    from torch.distributions.lowrank_multivariate_normal import LowRankMultivariateNormal as same
import torch
p = LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3))
assert same is LowRankMultivariateNormal is lowrank_mvn.LowRankMultivariateNormal
print(p.precision_matrix.diagonal().tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0.75, 0.75, 0.75]\n"


# --- The surface ----------------------------------------------------------------------------------------------------


def public(kind, what):
    return {name: value for name, value in inspect.getmembers(kind, what) if not name.startswith("_")}


def test_public_properties_are_exactly_torchs():
    """Wrappers that mirror torch's class compare them; additions are methods."""
    theirs, ours = (public(c, lambda o: isinstance(o, property)) for c in (Torchs, LowRankMultivariateNormal))
    assert set(ours) == set(theirs)
    for name, prop in theirs.items():
        assert [p.name for p in inspect.signature(ours[name].fget).parameters.values()] == ["self"], name
        assert (ours[name].fset is None) == (prop.fset is None), name


def test_public_methods_take_what_torchs_take():
    theirs = public(Torchs, inspect.isroutine)
    ours = public(LowRankMultivariateNormal, inspect.isroutine)
    assert set(ours) - set(theirs) == {
        "condition",
        "covariance_row",
        "factor_gram",
        "log_prob_and_entropy",
        "mix",
        "rank",
    }
    for name, method in theirs.items():
        expected, found = (list(inspect.signature(m).parameters.values()) for m in (method, ours[name]))
        shape = [[(p.name, p.kind, p.default) for p in ps] for ps in (found, expected)]
        assert shape[0][: len(expected)] == shape[1], name
        extra = found[len(expected) :]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra), name


def test_public_data_of_the_class_is_torchs():
    def data(o):
        return not inspect.isroutine(o) and not isinstance(o, property)

    theirs, ours = (public(c, data) for c in (Torchs, LowRankMultivariateNormal))
    assert set(theirs) | {"loc", "cov_factor", "cov_diag"} == set(ours)
    assert ours["arg_constraints"].keys() == theirs["arg_constraints"].keys()
    assert all(type(ours["arg_constraints"][n]) is type(c) for n, c in theirs["arg_constraints"].items())
    assert (ours["support"], ours["has_rsample"]) == (theirs["support"], theirs["has_rsample"])
