"""`StencilMultivariateNormal` and its operators against dense algebra in float64, and against bad input.

`test_triton_session.py` runs it a second time with the kernels in Triton's interpreter; with a device they are compiled
(marker `gpu`).
"""

import math
import os

import pytest
import torch
import torch.distributions as td
from lowrank_cases import gradients, relative
from stencil_cases import F64, IDS, SHAPES, Dense, make, matrix

from lowrank_mvn import Stencil, StencilMultivariateNormal

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
OPERATORS = torch.ops.lowrank_mvn
GREY, COLOUR = SHAPES[2], SHAPES[5]


@pytest.fixture(params=SHAPES, ids=IDS)
def shape(request):
    return request.param


@pytest.fixture
def impl(everywhere):
    return everywhere


def distribution(shape, **options):
    stencil, loc = make(shape, **options)
    return StencilMultivariateNormal(loc, stencil, validate_args=True)


def parts(stencil):
    return [t for t in (stencil.log_diagonal, stencil.neighbours, stencil.ties) if t is not None]


def of_parts(stencil, tensors):
    log_diagonal, neighbours, *ties = tensors
    return Stencil(log_diagonal, neighbours, *(ties or [None]), stencil.neighbourhood, stencil.channels)


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


def textbook_condition(loc, Sigma, value, observed, variance):
    """Mean and covariance by the gain Σ₂ᵀ(Σ₂₂ + τ²)⁻¹, item by item."""
    N = loc.shape[-1]
    means, covs = [], []
    flat = zip(loc.reshape(-1, N), Sigma.reshape(-1, N, N), value.reshape(-1, N), observed.reshape(-1, N), strict=True)
    for m, S, b, o in flat:
        noise = (torch.zeros(N, dtype=F64) if variance is None else variance.expand(N))[o]
        gain = S[:, o] @ torch.linalg.inv(S[o][:, o] + noise.diag())
        means.append(m + gain @ (b[o] - m[o]))
        covs.append(S - gain @ S[o])
    if not means:
        return loc, Sigma
    return torch.stack(means).reshape(loc.shape), torch.stack(covs).reshape(Sigma.shape)


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


# --- Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_precisions(dtype, impl):
    """Against float64 on the same, rounded numbers."""
    stencil, loc = make(COLOUR, dtype=dtype)
    x, wide = torch.randn(3, 2, 36, dtype=F64).to(dtype), of_parts(stencil, [t.double() for t in parts(stencil)])
    given = x, loc, *parts(stencil)

    def both(x, loc, *tensors):
        return StencilMultivariateNormal(loc, of_parts(stencil, tensors)).log_prob_and_entropy(x)

    found, exact = both(*given), both(*(t.double() for t in given))
    assert {t.dtype for t in found} == {torch.float32}
    for a, b in zip(found, exact, strict=True):
        assert relative(a, b) < 2e-6
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    grads = [gradients(lambda *t: sum(o.sum() for o in both(*t)), *g) for g in (given, [t.double() for t in given])]
    for a, b, t in zip(*grads, given, strict=True):
        assert a.dtype == t.dtype
        assert relative(a, b) < tolerance
    omega = torch.randn(2, 36, dtype=F64).to(dtype)
    y = StencilMultivariateNormal(loc, stencil).rsample(noise=(None, omega))
    assert y.dtype == dtype
    exact = StencilMultivariateNormal(loc.double(), wide).rsample(noise=(None, omega.double()))
    assert relative(y, exact) < max(tolerance, 2e-5)


def test_autocast_leaves_the_precision_alone():
    D, x = distribution(GREY, dtype=torch.float32), torch.randn(2, 20)
    expected = D.log_prob(x), D.rsample(noise=(None, x))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(D.log_prob(x), expected[0])
        assert torch.equal(D.rsample(noise=(None, x)), expected[1])


def test_weights_towards_outside_count_for_nothing():
    """Not even NaN: a network predicts them too, and their gradient is 0."""
    stencil, loc = make(GREY)
    s = stencil.neighbours.clone()
    for k, edge in enumerate([(..., -1), (..., 0), (..., -1, slice(None)), (..., -1)]):
        s[..., k, :, :][edge] = torch.nan
    s[..., 1, -1, :] = s[..., 3, -1, :] = torch.nan
    s.requires_grad_()
    D = StencilMultivariateNormal(loc, Stencil(stencil.log_diagonal, s), validate_args=False)
    x = torch.randn(2, 20, dtype=F64)
    assert D.log_prob(x).isfinite().all()
    assert D.rsample().isfinite().all()
    (grad,) = torch.autograd.grad(D.log_prob(x).sum() + D.rsample().sum(), s)
    assert (grad[s.isnan()] == 0).all()


# --- The operators --------------------------------------------------------------------------------------------------


def operands(dtype=F64):
    stencil, loc = make(COLOUR, dtype=dtype)
    x = torch.randn(2, 2, 3, 12, dtype=dtype, requires_grad=True)
    loc = loc.view(1, 2, 3, 12).requires_grad_()
    return x, loc, [t.flatten(-2).clone().requires_grad_() for t in parts(stencil)]


WHERE = [3, 4], [3, 3]


def test_opcheck(impl):
    x, loc, given = operands(torch.float32)
    torch.library.opcheck(OPERATORS.stencil.default, (x, loc, *given, *WHERE, impl))
    torch.library.opcheck(OPERATORS.stencil_transpose.default, (x, *given, *WHERE, impl))
    for transposed in (False, True):
        torch.library.opcheck(OPERATORS.stencil_solve.default, (x, *given, *WHERE, transposed, impl))
    y, *rest = OPERATORS.stencil(x, loc, *given, *WHERE, impl)
    rest = [t.detach().requires_grad_() for t in rest]
    grads = [torch.randn_like(y).requires_grad_(), *rest]
    for needs in ([True] * 5, [True, False, False, True, False]):
        arguments = (x, loc, *given, y.detach(), *grads, *WHERE, needs, impl)
        torch.library.opcheck(OPERATORS.stencil_backward.default, arguments)


def test_derivatives_up_to_the_second(impl):
    x, loc, given = operands()
    functions = [
        lambda x, loc, *w: OPERATORS.stencil(x, loc, *w, *WHERE, impl),
        lambda x, loc, *w: OPERATORS.stencil_transpose(x - loc, *w, *WHERE, impl),
        lambda x, loc, *w: OPERATORS.stencil_solve(x - loc, *w, *WHERE, False, impl),
        lambda x, loc, *w: OPERATORS.stencil_solve(x - loc, *w, *WHERE, True, impl),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (x, loc, *given), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, loc, *given), fast_mode=True)


def log_prob_of(stencil):
    return lambda x, loc, *w: StencilMultivariateNormal(loc, of_parts(stencil, w), validate_args=False).log_prob(x)


def test_transforms():
    stencil, loc = make(COLOUR)
    x = torch.randn(2, 36, dtype=F64)
    given = x, loc, *parts(stencil)
    function = log_prob_of(stencil)
    torch.testing.assert_close(torch.func.vmap(function)(*given), function(*given))
    shared = torch.func.vmap(function, (0, *[None] * (len(given) - 1)))(torch.stack([x, 2 * x]), *given[1:])
    torch.testing.assert_close(shared, torch.stack([function(*given), function(2 * x, *given[1:])]))
    grad = torch.func.grad(lambda *t: function(*t).sum(), argnums=tuple(range(len(given))))
    for ours, each in zip(torch.func.vmap(grad)(*given), zip(*map(grad, *given), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(each))
    tangents = tuple(torch.randn_like(t) for t in given)
    value, tangent = torch.func.jvp(function, given, tangents)
    torch.testing.assert_close(value, function(*given))
    grads = gradients(lambda *t: function(*t).sum(), *given)
    torch.testing.assert_close(tangent.sum(), sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))
    _, tangent = torch.func.jvp(
        lambda *t: StencilMultivariateNormal(t[1], of_parts(stencil, t[2:])).rsample(noise=(None, t[0])),
        given,
        tangents,
    )
    assert tangent.isfinite().all()


@pytest.mark.slow
def test_compiled():
    stencil, loc = make(GREY)
    given = torch.randn(2, 20, dtype=F64), loc, *parts(stencil)
    function = torch.compile(log_prob_of(stencil), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(*given), log_prob_of(stencil)(*given))
    grads = [gradients(lambda *t, f=f: f(*t).sum(), *given) for f in (function, log_prob_of(stencil))]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reference_is_an_implementation():
    stencil, loc = make(COLOUR)
    x = torch.randn(2, 36, dtype=F64)
    torch.testing.assert_close(stencil.own(x, loc, "reference"), stencil.own(x, loc, stencil.implementation(None)))
    torch.testing.assert_close(stencil.colour(x, "reference"), stencil.colour(x, stencil.implementation(None)))
    with pytest.raises(ValueError, match=r"impl='numpy' is not available for a Stencil .*'aten'"):
        stencil.implementation("numpy")
