"""`StencilMultivariateNormal` against dense algebra in float64.

`test_triton_session.py` runs it a second time with the kernels in Triton's interpreter; with a device they are compiled
(marker `gpu`).
"""

import math

import pytest
import torch
import torch.distributions as td
from lowrank_cases import gradients
from stencil_cases import (
    COLOUR,
    F64,
    GREY,
    IDS,
    SHAPES,
    Dense,
    distribution,
    make,
    matrix,
    of_parts,
    parts,
    textbook_condition,
)
from triton_cases import INTERPRET

from lowrank_mvn import Stencil, StencilMultivariateNormal

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(params=SHAPES, ids=IDS)
def shape(request):
    return request.param


# --- Against dense algebra ------------------------------------------------------------------------------------------


def test_densities(shape):
    D = distribution(shape)
    oracle = Dense(D.loc, D.stencil)
    x = D.loc + torch.randn(3, *D.loc.shape, dtype=F64)
    torch.testing.assert_close(D.log_prob(x), oracle.log_prob(x))
    torch.testing.assert_close(D.entropy(), oracle.entropy())
    both = D.log_prob_and_entropy(x[0])
    torch.testing.assert_close(both, (oracle.log_prob(x[0]), oracle.entropy()))


def test_every_value_has_its_constant():
    """Independent standard normals: −½ log 2π for every channel of every pixel."""
    D = StencilMultivariateNormal(torch.zeros(48), Stencil(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, 4)))
    assert D.log_prob(torch.zeros(48)).item() == pytest.approx(-24 * math.log(2 * math.pi), rel=1e-6)
    assert D.entropy().item() == pytest.approx(24 * (1 + math.log(2 * math.pi)), rel=1e-6)


@pytest.mark.parametrize("samples", [(), (3,)], ids=["", "samples"])
def test_gradients(shape, samples):
    stencil, loc = make(shape)
    x, seeds = torch.randn(*samples, *loc.shape, dtype=F64), torch.randn((*samples, *loc.shape[:-1]), dtype=F64)

    def loss(build):
        def function(x, loc, *tensors):
            D = build(loc, of_parts(stencil, tensors))
            return (D.log_prob(x) * seeds).sum() + 0.7 * D.entropy().sum()

        return function

    given = x, loc, *parts(stencil)
    ours, theirs = (gradients(loss(b), *given) for b in (StencilMultivariateNormal, Dense))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sample_solves(shape):
    D = distribution(shape)
    omega = torch.randn(5, *D.loc.shape, dtype=F64)
    y = D.rsample((5,), noise=(None, omega))
    torch.testing.assert_close((matrix(D.stencil).mT @ (y - D.loc).unsqueeze(-1)).squeeze(-1), omega)
    cold = D.rsample((5,), noise=(None, omega), temperature=(1.0, 0.5))
    torch.testing.assert_close(cold - D.loc, 0.5 * (y - D.loc))


def test_gradients_of_samples(shape):
    stencil, loc = make(shape)
    omega, seeds = torch.randn(2, *loc.shape, dtype=F64), torch.randn(2, *loc.shape, dtype=F64)

    def ours(omega, loc, *tensors):
        D = StencilMultivariateNormal(loc, of_parts(stencil, tensors))
        return (D.rsample((2,), noise=(None, omega)) * seeds).sum()

    def theirs(omega, loc, *tensors):
        T = matrix(of_parts(stencil, tensors))
        return ((loc + torch.linalg.solve(T.mT, omega.unsqueeze(-1)).squeeze(-1)) * seeds).sum()

    given = omega, loc, *parts(stencil)
    for a, b in zip(gradients(ours, *given), gradients(theirs, *given), strict=True):
        torch.testing.assert_close(a, b)


def test_variances_and_rows(shape):
    D = distribution(shape)
    T = matrix(D.stencil)
    Sigma = torch.linalg.inv(T @ T.mT)
    torch.testing.assert_close(D.variance, Sigma.diagonal(dim1=-2, dim2=-1))
    for n in (0, 2, -1):
        torch.testing.assert_close(D.covariance_row(n), Sigma[..., n, :])
    with pytest.raises(ValueError, match="out of range for event shape"):
        D.covariance_row(len(Sigma.mT) + 10_000)


def test_variances_are_differentiable():
    stencil, _ = make(COLOUR)

    def ours(*tensors):
        return of_parts(stencil, tensors).variance()

    def theirs(*tensors):
        T = matrix(of_parts(stencil, tensors))
        return torch.linalg.inv(T @ T.mT).diagonal(dim1=-2, dim2=-1)

    seeds = torch.randn(2, 36, dtype=F64)
    found = [gradients(lambda *t, f=f: (f(*t) * seeds).sum(), *parts(stencil)) for f in (ours, theirs)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_estimated_variance():
    D = distribution(GREY)
    found = D.estimated_variance(400 if INTERPRET else 4000) / D.variance
    assert (found - 1).abs().max() < 5 * (2 / (400 if INTERPRET else 4000)) ** 0.5


@pytest.mark.parametrize("tau", [None, 0.3, "some"])
def test_condition(shape, tau):
    D = distribution(shape, scale=0.2)  # whose covariance the textbook can invert
    N = D.event_shape[0]
    observed = (torch.arange(N) % 3 == 0).expand(*D.batch_shape, N)
    value = torch.where(observed, torch.randn(*D.batch_shape, N, dtype=F64), torch.nan)
    variance = None if tau is None else torch.full((N,), 0.3, dtype=F64) if tau == 0.3 else (torch.arange(N) % 2) * 0.3
    variance = variance.to(F64) if isinstance(variance, torch.Tensor) else variance
    conditional = D.condition(value, observed, variance)
    mean, cov = textbook_condition(
        D.loc, torch.linalg.inv(matrix(D.stencil) @ matrix(D.stencil).mT), value, observed, variance
    )
    torch.testing.assert_close(conditional.loc, mean)
    torch.testing.assert_close(conditional.variance, cov.diagonal(dim1=-2, dim2=-1), atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(conditional.covariance_row(1), cov[..., 1, :], atol=1e-10, rtol=1e-7)
    omega = torch.eye(N, dtype=F64).reshape(N, *[1] * len(D.batch_shape), N).expand(N, *D.batch_shape, N)
    root = (conditional.rsample((N,), noise=(None, omega)) - conditional.loc).movedim(0, -1)
    torch.testing.assert_close(root @ root.mT, cov, atol=1e-10, rtol=1e-7)
    # Density and entropy of what is not known exactly.
    y = conditional.sample()
    for b in range(math.prod(D.batch_shape)):
        m, c, point = mean.reshape(-1, N)[b], cov.reshape(-1, N, N)[b], y.reshape(-1, N)[b]
        free = c.diagonal() > 1e-12
        rest = td.MultivariateNormal(m[free], covariance_matrix=c[free][:, free], validate_args=False)
        torch.testing.assert_close(conditional.log_prob(y).reshape(-1)[b], rest.log_prob(point[free]))
        torch.testing.assert_close(conditional.entropy().reshape(-1)[b], rest.entropy())


def test_conditions_one_after_the_other():
    D = distribution(COLOUR)
    first, second = torch.arange(36) < 5, torch.arange(36) % 7 == 3
    value = torch.randn(2, 36, dtype=F64)
    at_once = D.condition(value, first | second, torch.where(first, 0.0, 0.2).to(F64))
    in_turn = D.condition(value, first).condition(value, second & ~first, 0.2)
    torch.testing.assert_close(in_turn.loc, at_once.loc)
    torch.testing.assert_close(in_turn.variance, at_once.variance)


def test_condition_is_differentiable():
    stencil, loc = make(GREY)
    observed, value = torch.arange(20) % 3 == 0, torch.randn(2, 20, dtype=F64)

    def ours(value, loc, *tensors):
        D = StencilMultivariateNormal(loc, of_parts(stencil, tensors)).condition(value, observed, 0.1)
        return D.loc.sin().sum() + D.entropy().sum()

    def theirs(value, loc, *tensors):
        T = matrix(of_parts(stencil, tensors))
        variance = torch.full((20,), 0.1, dtype=F64)
        mean, cov = textbook_condition(loc, torch.linalg.inv(T @ T.mT), value, observed.expand(2, 20), variance)
        return mean.sin().sum() + 0.5 * torch.logdet(cov).sum()

    given = value, loc, *parts(stencil)
    for a, b in zip(gradients(ours, *given), gradients(theirs, *given), strict=True):
        torch.testing.assert_close(a, b)
