"""`LowRankMultivariateStudentT` against SciPy and dense algebra; `test_triton_session.py` runs it with the kernels."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributions as td
from lowrank_cases import SHAPE_IDS, SHAPES, draw, gradients, parameters, relative
from lowrank_cases import student_t as make
from scipy import stats
from triton_cases import INTERPRET

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal, LowRankMultivariateStudentT
from lowrank_mvn.factors.base import Factor

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=["default", "reference"])
def way(request, everywhere, monkeypatch):
    """The implementation that the device decides on, or the textbook."""
    if request.param == "reference":
        monkeypatch.setattr(Factor, "implementation", lambda factor, impl: "reference")


def scale_matrix(D):
    return D.cov_factor @ D.cov_factor.mT + torch.diag_embed(D.cov_diag)


def each_item(D):
    """SciPy's distribution of each item."""
    Sigma = scale_matrix(D)
    for i in itertools.product(*map(range, D.batch_shape)):
        loc, matrix, df = (t.cpu().numpy() for t in (D.loc[i], Sigma[i], D.df[i]))
        yield i, stats.multivariate_t(loc, matrix, float(df))


def textbook(df, loc, P, d, x):
    """log p and H by a dense Cholesky factorisation."""
    N = loc.shape[-1]
    normal = td.MultivariateNormal(loc, P @ P.mT + torch.diag_embed(d.expand(*d.shape[:-1], N)))
    logdet = 2 * normal.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    q = -2 * normal.log_prob(x) - N * math.log(2 * math.pi) - logdet
    norm = torch.lgamma((df + N) / 2) - torch.lgamma(df / 2) - N / 2 * (df * math.pi).log() - logdet / 2
    spread = (df + N) / 2 * (torch.digamma((df + N) / 2) - torch.digamma(df / 2))
    return norm - (df + N) / 2 * torch.log1p(q / df), spread - norm


# --- Densities ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("id", "batch", "N", "R", "layout", "diagonal"), SHAPES, ids=SHAPE_IDS)
def test_density_and_entropy_are_scipys(id, batch, N, R, layout, diagonal):
    loc, P, d = parameters(batch, N, R, layout, diagonal)
    df = 0.3 + 10 * torch.rand(batch, dtype=F64)
    D, x = LowRankMultivariateStudentT(df, loc, P, d), draw(loc, P, 9 * d, samples=(2,))
    log_prob, entropy = D.log_prob_and_entropy(x)
    assert log_prob.shape == (2, *batch)
    for i, expected in each_item(D):
        for s in range(2):
            assert log_prob[(s, *i)].item() == pytest.approx(expected.logpdf(x[(s, *i)].cpu().numpy()), rel=1e-11)
        assert entropy[i].item() == pytest.approx(expected.entropy(), rel=1e-11)
    torch.testing.assert_close((D.log_prob(x), D.entropy()), (log_prob, entropy), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("df", [1e-2, 1.0, 2.0, 30.0, 199.0, 201.0, 1e4, 1e6])
def test_any_degrees_of_freedom(df):
    """On both sides of where the series takes over; beyond, SciPy's own logarithms cancel."""
    D = make(df, batch=(), N=5)
    x = 4 * torch.randn(6, 5, dtype=F64)
    (_, expected), *_ = each_item(D)
    np.testing.assert_allclose(D.log_prob(x).cpu(), expected.logpdf(x.cpu().numpy()), rtol=1e-9)
    assert D.entropy().item() == pytest.approx(expected.entropy(), rel=1e-9)


@pytest.mark.parametrize("df", [1e3, 1e6, 1e9, 1e12, 1e15, 1e20, math.inf])
def test_many_degrees_of_freedom_are_the_normal(df):
    """The distance falls as 1/ν, with nothing of its own left over: log p by (q − N)² − 2N over 4ν, to first order."""
    loc, P, d = parameters((3,), 20, 3)
    x = draw(loc, P, d)
    t, normal = LowRankMultivariateStudentT(df, loc, P, d), LowRankMultivariateNormal(loc, P, d)
    q = -2 * normal.log_prob(x) + 2 * normal.entropy() - 20
    bound = (q.square() + 20**2) / df + 1e-12 * normal.log_prob(x).abs()
    assert ((t.log_prob(x) - normal.log_prob(x)).abs() <= bound).all()
    assert ((t.entropy() - normal.entropy()).abs() <= 20**2 / df + 1e-12).all()
    torch.testing.assert_close(t.variance, normal.variance, rtol=3 / df + 1e-14, atol=0)
    assert t.rsample((2,)).isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_every_gradient_by_name(dtype, diagonal):
    args = *parameters((3,), 17, 4, "BRN", diagonal, dtype=dtype), torch.randn(3, 17, dtype=dtype)
    df = torch.tensor([0.7, 5.0, 300.0], dtype=dtype)

    def ours(df, loc, P, d, x):
        log_prob, entropy = LowRankMultivariateStudentT(df, loc, P, d).log_prob_and_entropy(x)
        return (log_prob.double() - 0.7 * entropy.double()) @ torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    def theirs(*tensors):
        log_prob, entropy = textbook(*tensors)
        return (log_prob - 0.7 * entropy) @ torch.tensor([1.0, 2.0, 3.0], dtype=F64)

    found = gradients(ours, df, *args)
    expected = gradients(theirs, *(t.double() for t in (df, *args)))
    for name, a, b in zip(("df", "loc", "cov_factor", "cov_diag", "value"), found, expected, strict=True):
        assert (a.dtype, a.shape) == (dtype, b.shape), name
        assert relative(a, b) < (1e-10 if dtype == F64 else 1e-5), name


def test_gradient_of_df_where_the_logarithms_cancel():
    """By central differences of the density; Δ alone is of order N²/ν."""
    loc, P, d = parameters((), 30, 3)
    x = draw(loc, P, 4 * d)
    for df in (3.0, 150.0, 250.0, 1e5):
        at = torch.tensor(df, dtype=F64, requires_grad=True)
        for name in ("log_prob", "entropy"):

            def value(df, name=name):
                D = LowRankMultivariateStudentT(df, loc, P, d)
                return D.log_prob(x) if name == "log_prob" else D.entropy()

            (found,) = torch.autograd.grad(value(at), at)
            h = 1e-3 * df
            difference = (value(at.detach() + h) - value(at.detach() - h)) / (2 * h)
            torch.testing.assert_close(found, difference, rtol=1e-4, atol=0)


def test_second_derivatives():
    args = [t.requires_grad_() for t in (torch.tensor([3.0], dtype=F64), *parameters((1,), 3, 2))]
    x = torch.randn(1, 3, dtype=F64, requires_grad=True)

    def both(df, loc, P, d, x):
        D = LowRankMultivariateStudentT(df, loc, P, d, validate_args=False)
        return D.log_prob(x), D.entropy()

    assert torch.autograd.gradcheck(both, [*args, x], fast_mode=True)
    assert torch.autograd.gradgradcheck(both, [*args, x], fast_mode=True)


@pytest.mark.parametrize("d", [1e-5, 1.0])
def test_float32_agrees_with_float64(d):
    """q and log|Σ| are the normal's, and the rest is float64: within what float32 resolves of log p."""
    loc, P, diag = parameters((2,), 2000 if not INTERPRET else 200, 10, dtype=F32, d=d, scale=0.2)
    x = draw(loc, P, diag)
    df = torch.tensor([2.5, 40.0])
    found = LowRankMultivariateStudentT(df, loc, P, diag).log_prob(x).double()
    expected, _ = textbook(*(t.double() for t in (df, loc, P, diag, x)))
    # The residual is what is left of values of size 1 (rounding 1e-7) at a scale of √d, in N squares.
    tolerance = 1e-6 * expected.abs() + 4e-7 * (loc.shape[-1] / d) ** 0.5
    assert ((found - expected).abs() <= tolerance).all()


def test_an_outlier_costs_logarithmically():
    """What it is for: δ ten times as large costs (ν + N)·log 10 nats, not a hundred times as many."""
    loc, P, d = parameters((), 50, 3)
    x = 1e4 * draw(torch.zeros(50, dtype=F64), P, d)
    D = LowRankMultivariateStudentT(3.0, loc, P, d)
    cost = D.log_prob(loc + x) - D.log_prob(loc + 10 * x)
    assert cost.item() == pytest.approx(53 * math.log(10), rel=1e-4)


# --- Linear factors -----------------------------------------------------------------------------------------------


def linear(items=(), dtype=F64):
    options = {"dtype": dtype}
    F = torch.randn(2, 4, 3, 3, **options)
    factor = LinearFactor(F, torch.randn(*items, 3, 2, 4, **options), torch.randn(*items, 3, 2, **options))
    mean = LinearMean(F, torch.randn(2, 4, **options), torch.randn(2, **options))
    return mean, factor, 0.5 + torch.rand(2, 18, **options)


def test_linear_factor_agrees_with_the_dense_one():
    mean, factor, d = linear()
    x, df = torch.randn(5, 2, 18, dtype=F64), torch.tensor([3.0, 8.0], dtype=F64)
    D = LowRankMultivariateStudentT(df, mean, factor, d)
    dense = LowRankMultivariateStudentT(df, mean.materialise(), factor.materialise(), d)
    observed = torch.arange(18) < 7
    noise = torch.randn(5, 2, 3, dtype=F64), torch.randn(5, 2, 18, dtype=F64)
    pairs = [
        (D.log_prob(x), dense.log_prob(x)),
        (D.entropy(), dense.entropy()),
        (D.variance, dense.variance),
        (D.covariance_row(4), dense.covariance_row(4)),
        (D.factor_gram(), dense.factor_gram()),
        (D.rsample((5,), noise=noise, u=torch.full((2,), 0.3, dtype=F64)),
         dense.rsample((5,), noise=noise, u=torch.full((2,), 0.3, dtype=F64))),
        (D.condition(x[0], observed).variance, dense.condition(x[0], observed).variance),
        (D.condition(x[0], observed).loc, dense.condition(x[0], observed).loc),
        (D.mix(torch.eye(3, dtype=F64)[:, :2]).variance, dense.mix(torch.eye(3, dtype=F64)[:, :2]).variance),
    ]  # fmt: skip
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    assert isinstance(D.condition(x[0], observed)._parameters.factor, LinearFactor)
    assert isinstance(D.mix(torch.eye(3, dtype=F64))._parameters.factor, LinearFactor)


def test_gradients_of_a_linear_factor():
    mean, factor, d = linear()
    leaves = [factor.features, factor.weight, factor.bias, mean.weight, mean.bias, d, torch.tensor([3.0, 8.0]).double()]
    x = torch.randn(2, 18, dtype=F64)

    def loss(F, weight, bias, m, b, d, df, made):
        loc, P = LinearMean(F, m, b), LinearFactor(F, weight, bias)
        loc, P = (loc.materialise(), P.materialise()) if made else (loc, P)
        log_prob, entropy = LowRankMultivariateStudentT(df, loc, P, d).log_prob_and_entropy(x)
        return log_prob.sum() - 0.7 * entropy.sum()

    found, expected = (gradients(lambda *a, made=made: loss(*a, made), *leaves) for made in (False, True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- Samples ------------------------------------------------------------------------------------------------------


def test_samples_have_the_right_distribution(everywhere):
    """Each value is a univariate t, and the whole event shares one u: q/N is F(N, ν). Kolmogorov–Smirnov at 1e-4."""
    D, n = make(2.5, batch=(), N=4), 20_000 if everywhere == "aten" or not INTERPRET else 200
    y = D.sample((n,))
    delta, Sigma = y - D.loc, scale_matrix(D)
    standard = delta / Sigma.diagonal().sqrt()
    for k in range(4):
        assert stats.kstest(standard[:, k].cpu().numpy(), stats.t(2.5).cdf).pvalue > 1e-4
    q = (delta @ torch.linalg.inv(Sigma) * delta).sum(-1) / 4
    assert stats.kstest(q.cpu().numpy(), stats.f(4, 2.5).cdf).pvalue > 1e-4


def test_statistics_of_samples(everywhere):
    """Mean, variance and its derivative by ν through the sample, within 5 standard errors."""
    n = 50_000 if everywhere == "aten" or not INTERPRET else 200
    loc, P, d = parameters((), 4, 2)
    df = torch.full((n,), 12.0, dtype=F64, requires_grad=True)
    D = LowRankMultivariateStudentT(df, loc, P, d)
    delta, variance = D.rsample() - loc, D.variance[0]
    assert (delta.mean(0).abs() < 5 * (variance / n).sqrt()).all()
    squares = delta.square()
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / n**0.5).all()
    (grad,) = torch.autograd.grad(squares.sum(), df)  # of each sample by its own ν
    expected = -2 / (12 - 2) ** 2 * scale_matrix(D)[0].trace()
    assert (grad.mean() - expected).abs() < 5 * grad.std() / n**0.5


def test_samples_are_a_function_of_noise_and_u():
    args = *parameters((3,), 7, 2), 0.2 + torch.rand(4, 1, dtype=F64)
    omega_p, omega_d = torch.randn(4, 3, 2, dtype=F64), torch.randn(4, 3, 7, dtype=F64)
    w = torch.randn(4, 3, 7, dtype=F64)

    def ours(loc, P, d, u):
        return (LowRankMultivariateStudentT(3.0, loc, P, d).rsample((4,), noise=(omega_p, omega_d), u=u) * w).sum()

    def formula(loc, P, d, u):
        deviation = (P @ omega_p.unsqueeze(-1))[..., 0] + d.sqrt() * omega_d
        return ((loc + deviation / u.sqrt().unsqueeze(-1)) * w).sum()

    torch.testing.assert_close(ours(*args), formula(*args))
    for a, b in zip(gradients(ours, *args), gradients(formula, *args), strict=True):
        torch.testing.assert_close(a, b)
    D = LowRankMultivariateStudentT(3.0, *args[:3])
    normal = LowRankMultivariateNormal(*args[:3])
    for t in ((1.0, 1.0), (0.5, 2.0)):
        y, expected = (p.rsample((4,), noise=(omega_p, omega_d), temperature=t) for p in (D, normal))
        torch.testing.assert_close(y, expected)
    assert (D.rsample((4,), temperature=(0, 0)) == D.loc).all()


def test_equal_seeds_give_equal_samples():
    D, samples = make(), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        samples.append(D.sample((2,)))
    assert torch.equal(samples[0], samples[1])
    assert not (samples[0] == samples[2]).any()


def test_few_degrees_of_freedom_give_numbers():
    """u underflows to 0 there; samples stay numbers, as torch's do."""
    D = make(0.01, batch=(), N=3, dtype=F32)
    assert not D.sample((1000 if not INTERPRET else 100,)).isnan().any()


# --- Moments and conditionals -------------------------------------------------------------------------------------


def test_moments_are_torchs():
    df = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 40.0], dtype=F64)
    D = make(df, batch=(6,))
    torchs = td.StudentT(df.unsqueeze(-1).expand(6, 7), D.loc, scale_matrix(D).diagonal(dim1=-2, dim2=-1).sqrt())
    torch.testing.assert_close(D.mean, torchs.mean, equal_nan=True)
    torch.testing.assert_close(D.variance, torchs.variance, equal_nan=True)
    torch.testing.assert_close(D.mode, torchs.mode)
    row = D.covariance_row(3)
    assert row[:4].isnan().all()
    torch.testing.assert_close(row[4:], (df / (df - 2))[4:, None] * scale_matrix(D)[4:, 3])


def test_condition_agrees_with_dense_algebra():
    D = make(torch.tensor([3.0, 7.0, 1.5], dtype=F64), N=9, R=3)
    observed = torch.zeros(3, 9, dtype=torch.bool)
    observed[0, :4], observed[1, ::2] = True, True  # item 2 observes nothing
    value = torch.where(observed, torch.randn(3, 9, dtype=F64), torch.nan)
    conditional, Sigma = D.condition(value, observed), scale_matrix(D)
    after = scale_matrix(conditional)
    for i in range(3):
        o, u = observed[i], ~observed[i]
        gain = Sigma[i][u][:, o] @ torch.linalg.inv(Sigma[i][o][:, o])
        delta = value[i, o] - D.loc[i, o]
        q = delta @ torch.linalg.solve(Sigma[i][o][:, o], delta)
        count = o.sum()
        scale = (D.df[i] + q) / (D.df[i] + count)
        torch.testing.assert_close(conditional.df[i], D.df[i] + count)
        torch.testing.assert_close(conditional.loc[i, u], D.loc[i, u] + gain @ delta)
        torch.testing.assert_close(after[i][u][:, u], scale * (Sigma[i][u][:, u] - gain @ Sigma[i][o][:, u]))
    y = conditional.sample((5,))
    assert (y[:, observed] == value[observed]).all()


def test_conditional_times_marginal_is_the_density():
    D = make(3.0)
    x = torch.randn(4, 3, 7, dtype=F64)
    given = D.condition(x, torch.arange(7) < 3)
    rest = LowRankMultivariateStudentT(
        given.df, given.loc[..., 3:], given.cov_factor[..., 3:, :], given.cov_diag[..., 3:]
    )
    marginal = LowRankMultivariateStudentT(3.0, D.loc[:, :3], D.cov_factor[:, :3], D.cov_diag[:, :3])
    torch.testing.assert_close(rest.log_prob(x[..., 3:]) + marginal.log_prob(x[..., :3]), D.log_prob(x))
