"""What holds for torch's class holds for ours: one suite over both, then what only ours can do.

`test_triton_session.py` runs it again with the kernels in Triton's interpreter; on a device they are compiled (`gpu`).
"""

import copy
import functools
import inspect
import itertools
import pickle
from typing import get_args

import pytest
import torch
import torch.distributions as td
from lowrank_cases import draw, gradients, oracle, parameters
from triton_cases import INTERPRET

import lowrank_mvn
from lowrank_mvn import LinearFactor, LowRankMultivariateNormal

pytestmark = pytest.mark.usefixtures("everywhere")


def from_features(loc, P, d, **options):
    """Ours with P as a linear map of features, where it has one batch dimension."""
    if P.dim() == 3:
        P = LinearFactor(P.mT, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).unsqueeze(1))
    return LowRankMultivariateNormal(loc, P, d, **options)


CLASSES = [td.LowRankMultivariateNormal, LowRankMultivariateNormal]


@pytest.fixture(params=[*CLASSES, from_features], ids=["torch", "ours", "features"])
def cls(request):
    return request.param


@pytest.fixture(params=CLASSES, ids=["torch", "ours"])
def kind(request):
    return request.param


def make(cls, batch=(3,), N=7, R=2, **options):
    return cls(*parameters(batch, N, R), **options)


def test_shapes_and_attributes(cls):
    loc, P, d = parameters((2, 3), 7, 2)
    D = cls(loc, P[0], d[1])
    assert (D.batch_shape, D.event_shape) == ((2, 3), (7,))
    assert D.loc.shape == D.cov_diag.shape == D.mean.shape == D.mode.shape == D.variance.shape == (2, 3, 7)
    assert D.cov_factor.shape == (2, 3, 7, 2)
    assert D._unbroadcasted_cov_factor.shape == (3, 7, 2)
    assert D._unbroadcasted_cov_diag.shape == (3, 7)
    assert D._capacitance_tril.shape == (3, 2, 2)
    for name in ("covariance_matrix", "precision_matrix", "scale_tril"):
        assert getattr(D, name).shape == (2, 3, 7, 7)
    assert D.sample().shape == (2, 3, 7)
    assert D.rsample((2, 1)).shape == (2, 1, 2, 3, 7)
    assert D.log_prob(torch.zeros(4, 1, 1, 7, dtype=torch.float64)).shape == (4, 2, 3)
    assert D.entropy().shape == D.perplexity().shape == (2, 3)
    assert D.has_rsample
    assert D.support is not None
    assert set(D.arg_constraints) == {"loc", "cov_factor", "cov_diag"}


def test_matrices(cls):
    D = make(cls)
    Sigma = D.cov_factor @ D.cov_factor.mT + torch.diag_embed(D.cov_diag)
    torch.testing.assert_close(D.covariance_matrix, Sigma)
    torch.testing.assert_close(D.precision_matrix, torch.linalg.inv(Sigma))
    torch.testing.assert_close(D.scale_tril, torch.linalg.cholesky(Sigma))
    torch.testing.assert_close(D.variance, Sigma.diagonal(dim1=-2, dim2=-1))
    C = torch.eye(2, dtype=torch.float64) + D.cov_factor.mT @ (D.cov_factor / D.cov_diag.unsqueeze(-1))
    torch.testing.assert_close(D._capacitance_tril, torch.linalg.cholesky(C))


def test_repr(cls):
    assert repr(make(cls)) == (
        "LowRankMultivariateNormal(loc: torch.Size([3, 7]), cov_factor: torch.Size([3, 7, 2]),"
        " cov_diag: torch.Size([3, 7]))"
    )


def test_signature_and_doc(kind):
    expected = inspect.signature(td.LowRankMultivariateNormal.__init__).parameters.values()
    found = inspect.signature(kind.__init__).parameters.values()
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected]
    for ours, theirs in zip(found, expected, strict=True):  # what torch's takes; ours says what else it does
        assert theirs.annotation in (ours.annotation, *get_args(ours.annotation))
    assert "cov_factor" in kind.__doc__


def test_expand(cls):
    D = make(cls)
    E = D.expand((4, 3))
    assert type(E) is type(D)
    assert E.batch_shape == (4, 3)
    x = draw(*parameters((3,), 7, 2))
    torch.testing.assert_close(E.log_prob(x), D.log_prob(x).expand(4, 3))
    torch.testing.assert_close(E.entropy(), D.entropy().expand(4, 3))
    assert E.sample((2,)).shape == (2, 4, 3, 7)
    assert E.loc.data_ptr() == D.loc.data_ptr()


def test_subclasses_expand_as_torchs_do(kind):
    class Named(kind):
        def hello(self):
            return "hello"

    D = make(Named)
    assert D.expand((4, 3)).hello() == "hello"

    class Other(kind):
        def __init__(self, only):
            super().__init__(only, only.unsqueeze(-1), torch.ones_like(only))

    with pytest.raises(NotImplementedError):
        Other(torch.ones(3)).expand((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_seeds_give_equal_samples(dtype, everywhere):
    loc, P, d = parameters((3,), 7, 2, dtype=dtype)
    samples = []
    # The noise of the kernels is another stream than torch's, and the same from one call to the next.
    for cls in CLASSES if everywhere != "triton" else CLASSES[1:] * 2:
        torch.manual_seed(5)
        samples.append(cls(loc, P, d).rsample((2, 2)))
    torch.testing.assert_close(*samples)


def test_statistics_of_samples(cls, everywhere):
    """Mean and covariance within 5 standard errors."""
    D, n = make(cls, batch=(), N=4), 200_000 if everywhere != "triton" or not INTERPRET else 100
    y = D.sample((n,))
    variance, Sigma = D.variance, D.covariance_matrix
    assert ((y.mean(0) - D.mean).abs() < 5 * (variance / n).sqrt()).all()
    spread = ((torch.outer(variance, variance) + Sigma.square()) / n).sqrt()
    assert ((torch.cov(y.T) - Sigma).abs() < 5 * spread).all()


def test_copies(cls):
    D = make(cls)
    x = draw(D.loc, D.cov_factor, D.cov_diag)
    expected = D.log_prob(x), D.entropy()
    for copied in (copy.deepcopy(D), pickle.loads(pickle.dumps(D)), copy.copy(D)):
        torch.testing.assert_close((copied.log_prob(x), copied.entropy()), expected)


def test_kl_divergence_both_ways(cls):
    a, b = make(cls), make(cls)
    for other in (*CLASSES, None):
        q = (
            td.MultivariateNormal(b.loc, covariance_matrix=b.covariance_matrix)
            if other is None
            else other(b.loc, b.cov_factor, b.cov_diag)
        )
        dense = [td.MultivariateNormal(D.loc, covariance_matrix=D.covariance_matrix) for D in (a, b)]
        torch.testing.assert_close(td.kl_divergence(a, q), td.kl_divergence(*dense))
        torch.testing.assert_close(td.kl_divergence(q, a), td.kl_divergence(*dense[::-1]))
    with pytest.raises(ValueError, match="different event shapes"):
        td.kl_divergence(a, make(cls, N=6))


def test_values_of_other_dtypes_and_shapes(cls):
    D = make(cls)
    zeros = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close(D.log_prob(torch.zeros(7, dtype=torch.int64)), D.log_prob(zeros))
    torch.testing.assert_close(D.log_prob(torch.zeros(7)), D.log_prob(zeros))


def test_wrapped_by_other_distributions(cls):
    D = make(cls)
    x = draw(D.loc, D.cov_factor, D.cov_diag)
    torch.testing.assert_close(td.Independent(D, 1).log_prob(x), D.log_prob(x).sum(-1))
    exp = td.TransformedDistribution(D, [td.ExpTransform()])
    torch.testing.assert_close(exp.log_prob(x.exp()), D.log_prob(x) - x.sum(-1))
    mixture = td.MixtureSameFamily(td.Categorical(torch.ones(3)), D)
    assert mixture.log_prob(x[0]).shape == ()
    assert mixture.sample((5,)).shape == (5, 7)


def test_tensors_without_values(cls):
    loc, P, d = (t.to("meta") for t in parameters((3,), 7, 2))
    D = cls(loc, P, d, validate_args=False)
    found = D.log_prob(loc), D.entropy(), D.rsample((2,)), D.variance
    assert all(t.is_meta for t in found)
    assert [t.shape for t in found] == [(3,), (3,), (2, 3, 7), (3, 7)]


ERRORS = [
    ("loc-0d", lambda: (torch.tensor(1.0), torch.ones(3, 2), torch.ones(3)), "loc"),
    (
        "factor-1d",
        lambda: (torch.ones(3), torch.ones(3), torch.ones(3)),
        "cov_factor must be at least two-dim",
    ),
    ("factor-N", lambda: (torch.ones(3), torch.ones(4, 2), torch.ones(3)), "cov_factor"),
    ("diag-N", lambda: (torch.ones(3), torch.ones(3, 2), torch.ones(4)), "cov_diag"),
    ("batch", lambda: (torch.ones(2, 3), torch.ones(4, 3, 2), torch.ones(3)), "Incompatible batch shapes"),
    ("negative-d", lambda: (torch.ones(3), torch.ones(3, 2), -torch.ones(3)), "cov_diag"),
    ("zero-d", lambda: (torch.ones(3), torch.ones(3, 2), torch.zeros(3)), "cov_diag"),
    ("nan-loc", lambda: (torch.full((3,), float("nan")), torch.ones(3, 2), torch.ones(3)), "loc"),
    ("nan-factor", lambda: (torch.ones(3), torch.full((3, 2), float("nan")), torch.ones(3)), "cov_factor"),
]


@pytest.mark.parametrize(("id", "arguments", "message"), ERRORS, ids=[case[0] for case in ERRORS])
def test_errors_of_the_constructor(cls, id, arguments, message):
    expected = (ValueError, RuntimeError) if cls is td.LowRankMultivariateNormal else ValueError
    with pytest.raises(expected) as caught:  # torch's class factorises first, and fails there
        cls(*arguments(), validate_args=True)
    if cls is LowRankMultivariateNormal:
        assert message in str(caught.value)


def test_errors_of_values(cls):
    D = make(cls, validate_args=True)
    with pytest.raises(ValueError):  # noqa: PT011  (each class has words of its own)
        D.log_prob(torch.zeros(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="support"):
        D.log_prob(torch.full((7,), float("nan"), dtype=torch.float64))


# --- Only ours ----------------------------------------------------------------------------------------------------


def test_every_error_names_argument_shape_and_expectation():
    loc, P, d = torch.zeros(2, 5), torch.ones(2, 5, 3), torch.ones(2, 5)
    cls = LowRankMultivariateNormal
    p, checked = cls(loc, P, d), functools.partial(cls, validate_args=True)
    infinite = float("inf")
    values = [
        (lambda: cls(loc[:, :4], P, d), r"loc has shape \[2, 4\], expected \[\.\.\., 5\]"),
        (lambda: cls(loc, P, d[:, :4]), r"cov_diag has shape \[2, 4\], expected \[\.\.\., 5\]"),
        (lambda: cls(loc, P[..., :0], d), r"cov_factor has shape \[2, 5, 0\].*rank R of at least 1"),
        (lambda: checked(loc, P, d[:, :1] * infinite), "cov_diag of shape"),
        (lambda: checked(loc, P * infinite, d), "cov_factor of shape"),
        (lambda: cls(loc, P.to("meta"), d), "cov_factor is on meta, loc on c"),
        (lambda: lowrank_mvn.log_prob(loc[:, :3], loc, P, d), r"value has shape \[2, 3\]"),
        (lambda: lowrank_mvn.log_prob(loc.repeat(2, 1), loc, P, d), "Incompatible batch shapes of value"),
        (lambda: lowrank_mvn.entropy(P, d, impl="cuda"), r"expected one of \["),
        (lambda: p.rsample(noise=(torch.zeros(2), loc)), r"noise\[0\] has shape \[2\]"),
        (lambda: p.rsample(noise=(P[:, 0], loc.repeat(3, 1))), r"noise\[1\] has shape"),
        (lambda: p.condition(loc, torch.ones(4) > 0), r"observed has shape \[4\]"),
        (lambda: p.covariance_row(5), r"index 5 is out of range for event shape \[5\]"),
    ]
    types = [
        (lambda: cls(loc, P.double(), d), "cov_factor has dtype torch.float64, loc has torch.float32"),
        (lambda: cls(loc, P, d.half()), "cov_diag has dtype torch.float16"),
        (lambda: cls(loc, P.int(), d), "cov_factor must be a floating-point tensor, got"),
        (lambda: cls([0.0], P, d), "loc must be a floating-point tensor, got list"),
        (lambda: p.log_prob(loc.double()), "value has dtype torch.float64"),
        (lambda: p.condition(loc, torch.ones(5)), "observed must be a tensor of dtype bool"),
    ]
    for error, cases in ((ValueError, values), (TypeError, types)):
        for call, message in cases:
            with pytest.raises(error, match=message):
                call()


def test_scalar_diagonal_is_not_expanded():
    loc, P, _ = parameters((3,), 50, 2)
    for diag in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((3, 1), 0.3, dtype=torch.float64)):
        D = LowRankMultivariateNormal(loc, P, diag, validate_args=True)
        full = LowRankMultivariateNormal(loc, P, torch.full((3, 50), 0.3, dtype=torch.float64))
        x = draw(loc, P, full.cov_diag)
        torch.testing.assert_close(D.log_prob(x), full.log_prob(x), rtol=1e-12, atol=0)
        assert D.cov_diag.shape == (3, 50)
        assert D.cov_diag.untyped_storage().nbytes() <= 3 * 8
        torch.testing.assert_close(D.variance, full.variance)


def test_joint_call_and_reexport():
    D = make(LowRankMultivariateNormal)
    x = draw(D.loc, D.cov_factor, D.cov_diag)
    log_prob, entropy = D.log_prob_and_entropy(x)
    torch.testing.assert_close(log_prob, oracle(D.loc, D.cov_factor, D.cov_diag).log_prob(x))
    torch.testing.assert_close(entropy, D.entropy(), rtol=0, atol=0)


def test_no_values():
    assert make(LowRankMultivariateNormal).log_prob(torch.zeros(0, 3, 7, dtype=torch.float64)).shape == (0, 3)


def test_empty_batch():
    loc, P, d = (t.requires_grad_() for t in parameters((0,), 7, 2))
    D = LowRankMultivariateNormal(loc, P, d)
    assert D.log_prob(loc.detach()).shape == D.entropy().shape == (0,)
    assert D.sample((3,)).shape == (3, 0, 7)
    grads = gradients(lambda *a: LowRankMultivariateNormal(*a).log_prob(loc.detach()).sum(), loc, P, d)
    assert [g.shape for g in grads] == [(0, 7), (0, 7, 2), (0, 7)]


def test_zero_diagonal_gives_samples():
    loc, P, d = parameters((3,), 7, 2)
    y = LowRankMultivariateNormal(loc, P, 0 * d, validate_args=False).sample((5,))
    residual = y - loc
    span = P @ torch.linalg.pinv(P)
    torch.testing.assert_close((span @ residual.unsqueeze(-1))[..., 0], residual)


def test_given_noise():
    D = make(LowRankMultivariateNormal)
    omega_p, omega_d = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    y = D.rsample((4,), noise=(omega_p, omega_d))
    expected = D.loc + (D.cov_factor @ omega_p.unsqueeze(-1))[..., 0] + D.cov_diag.sqrt() * omega_d
    torch.testing.assert_close(y, expected)
    # All samples share P: no copy of it per sample in the gradient's graph either.
    P = D.cov_factor.clone().requires_grad_()
    noise = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    (grad,) = gradients(lambda P: LowRankMultivariateNormal(D.loc, P, D.cov_diag).rsample((4,), noise=noise).sum(), P)
    torch.testing.assert_close(grad, noise[0].sum(0).unsqueeze(1).expand(3, 7, 2))


def test_covariance_row():
    D = make(LowRankMultivariateNormal)
    for n in (0, 3, -1):
        torch.testing.assert_close(D.covariance_row(n), D.covariance_matrix[..., n, :])


@pytest.mark.parametrize("impl", [None, "reference"], ids=["default", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_condition_agrees_with_dense_algebra(impl, dtype):
    loc, P, d = parameters((3,), 12, 4, dtype=dtype)
    observed = torch.zeros(3, 12, dtype=torch.bool)
    observed[0, :5], observed[1, ::2] = True, True  # item 2 observes nothing
    value = torch.where(observed, torch.randn(3, 12, dtype=dtype), torch.nan)
    conditional = lowrank_mvn.condition(value, observed, loc, P, d, impl=impl)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for i in range(3):
        o, u = observed[i], ~observed[i]
        Sigma = (P[i].double() @ P[i].double().T) + d[i].double().diag()
        gain = Sigma[u][:, o] @ torch.linalg.inv(Sigma[o][:, o])
        mean = loc[i, u].double() + gain @ (value[i, o].double() - loc[i, o].double())
        cov = Sigma[u][:, u] - gain @ Sigma[o][:, u]
        factor, diag = conditional.cov_factor[i, u].double(), conditional.cov_diag[i, u].double()
        torch.testing.assert_close(conditional.loc[i, u].double(), mean, **tolerance)
        torch.testing.assert_close(factor @ factor.T + diag.diag(), cov, **tolerance)
        assert (conditional.loc[i, o] == value[i, o]).all()
        assert (conditional.cov_factor[i, o] == 0).all()
        assert (conditional.cov_diag[i, o] == 0).all()


@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_values_of_one_item_share_its_conditional(layout):
    """[values, edits, items]: each as if alone, and the factor made once for all values."""
    loc, P, d = parameters((3,), 12, 4)
    P = P if layout == "BNR" else P.mT.contiguous().mT
    value, observed = torch.randn(5, 1, 3, 12, dtype=P.dtype), torch.rand(2, 1, 12) < 0.5
    shared = lowrank_mvn.condition(value, observed, loc, P, d)
    assert shared.loc.shape == shared.cov_diag.shape == (5, 2, 3, 12)
    assert shared.cov_factor.shape == (5, 2, 3, 12, 4)
    assert shared.cov_factor.stride(0) == 0
    assert shared.cov_factor[0, 0].stride() == P.stride()
    for s, e, i in itertools.product(range(5), range(2), range(3)):
        alone = lowrank_mvn.condition(value[s, 0, i], observed[e, 0], loc[i], P[i], d[i], impl="reference")
        torch.testing.assert_close(shared.loc[s, e, i], alone.loc)
        torch.testing.assert_close(shared.cov_factor[s, e, i], alone.cov_factor)
        torch.testing.assert_close(shared.cov_diag[s, e, i], alone.cov_diag)


def test_conditional_distribution_samples_whole_images():
    D = make(LowRankMultivariateNormal, validate_args=True)
    observed = torch.arange(7) < 3
    value = torch.where(observed, torch.ones(7, dtype=torch.float64), torch.nan)
    conditional = D.condition(value, observed)
    y = conditional.sample((20,))
    assert (y[..., :3] == 1).all()
    assert y[..., 3:].std(0).gt(0.1).all()
    rest = LowRankMultivariateNormal(conditional.loc[:, 3:], conditional.cov_factor[:, 3:], conditional.cov_diag[:, 3:])
    # p(rest | observed) p(observed) = p(everything)
    x = torch.cat([torch.ones(3, 3, dtype=torch.float64), y[0, :, 3:]], -1)
    marginal = LowRankMultivariateNormal(D.loc[:, :3], D.cov_factor[:, :3], D.cov_diag[:, :3])
    torch.testing.assert_close(rest.log_prob(x[:, 3:]) + marginal.log_prob(x[:, :3]), D.log_prob(x))
