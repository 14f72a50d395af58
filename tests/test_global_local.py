"""`GlobalLocalNormal`, a low-rank factor over a stencil, against dense algebra in float64.

`test_triton_session.py` runs it a second time with the kernels in Triton's interpreter; with a device they are compiled
(marker `gpu`).
"""

import copy
import pickle

import pytest
import torch
import torch.distributions as td
from lowrank_cases import gradients, relative
from stencil_cases import COLOUR, F64, GREY, IDS, SHAPES, Dense, make, of_parts, parts, textbook_condition

from lowrank_mvn import GlobalLocalNormal, LinearFactor, LinearMean, LowRankMultivariateNormal, Stencil
from sosvae.tools.observation import interpolate, scale_components

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]
ONE_STENCIL, ONE_OF_EACH = SHAPES[7], SHAPES[8]
R = 3


@pytest.fixture(params=SHAPES, ids=IDS)
def shape(request):
    return request.param


def factor(loc):
    return 0.5 * torch.randn(*loc.shape, R, dtype=F64)


def distribution(shape, **options):
    stencil, loc = make(shape, **options)
    return GlobalLocalNormal(loc, factor(loc), stencil, validate_args=True)


def oracle(D):
    return Dense(D.loc, D.stencil, D.cov_factor)


def linear(stencil, channels, bias=True):
    """A factor of features [2, 4, *spatial], as one that is linear and as a tensor."""
    F = torch.randn(2, 4, *stencil.spatial, dtype=F64)
    W = 0.3 * torch.randn(R, channels, 4, dtype=F64)
    b = 0.3 * torch.randn(R, channels, dtype=F64) if bias else None
    return F, W, b


def test_densities(shape):
    D = distribution(shape)
    x = D.loc + torch.randn(3, *D.loc.shape, dtype=F64)
    torch.testing.assert_close(D.log_prob(x), oracle(D).log_prob(x))
    torch.testing.assert_close(D.entropy(), oracle(D).entropy())
    torch.testing.assert_close(D.log_prob_and_entropy(x[0]), (oracle(D).log_prob(x[0]), oracle(D).entropy()))


def test_gradients(shape):
    stencil, loc = make(shape)
    P, x = factor(loc), torch.randn(2, *loc.shape, dtype=F64)
    seeds = torch.randn((2, *loc.shape[:-1]), dtype=F64)

    def loss(build):
        def function(x, loc, P, *tensors):
            stencil_ = of_parts(stencil, tensors)
            D = build(loc, P, stencil_)
            return (D.log_prob(x) * seeds).sum() + 0.7 * D.entropy().sum()

        return function

    given = x, loc, P, *parts(stencil)
    theirs = gradients(loss(lambda loc, P, stencil: Dense(loc, stencil, P)), *given)
    for a, b in zip(gradients(loss(GlobalLocalNormal), *given), theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_samples(shape):
    D = distribution(shape)
    noise = torch.randn(4, *D.batch_shape, R, dtype=F64), torch.randn(4, *D.loc.shape, dtype=F64)
    common = (D.cov_factor @ noise[0].unsqueeze(-1)).squeeze(-1)
    local = D.stencil.colour(noise[1], "reference")
    torch.testing.assert_close(D.rsample((4,), noise=noise), D.loc + common + local)
    for t_P, t_L in ((1.0, 0.0), (0.3, 0.5)):
        expected = D.loc + t_P * common + t_L * local
        torch.testing.assert_close(D.rsample((4,), noise=noise, temperature=(t_P, t_L)), expected)


def test_variances_and_rows(shape):
    D = distribution(shape)
    Sigma = oracle(D).covariance
    torch.testing.assert_close(D.variance, Sigma.diagonal(dim1=-2, dim2=-1))
    for n in (0, -1):
        torch.testing.assert_close(D.covariance_row(n), Sigma[..., n, :])


def test_estimated_variance():
    D = distribution(GREY)
    assert (D.estimated_variance(400) / D.variance - 1).abs().max() < 5 * (2 / 400) ** 0.5


@pytest.mark.parametrize("tau", [None, 0.3, "some"])
def test_condition(shape, tau):
    D = distribution(shape, scale=0.2)  # whose covariance the textbook can invert
    N = D.event_shape[0]
    observed = (torch.arange(N) % 3 == 0).expand(*D.batch_shape, N)
    value = torch.where(observed, torch.randn(*D.batch_shape, N, dtype=F64), torch.nan)
    variance = 0.3 * (torch.ones(N, dtype=F64) if tau == 0.3 else torch.arange(N).to(F64) % 2)
    variance = None if tau is None else variance
    conditional = D.condition(value, observed, variance)
    mean, cov = textbook_condition(D.loc, oracle(D).covariance, value, observed, variance)
    close = {"atol": 1e-9, "rtol": 1e-7}
    torch.testing.assert_close(conditional.loc, mean, **close)
    torch.testing.assert_close(conditional.variance, cov.diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(conditional.covariance_row(1), cov[..., 1, :], **close)
    if tau != 0.3:
        pinned = _pinned(N, tau)
        assert torch.equal(
            conditional.sample((2,))[..., pinned], value[..., pinned].expand(2, *value[..., pinned].shape)
        )
    # Density and entropy of what is not known exactly.
    y = conditional.sample()
    for b in range(D.batch_shape.numel()):
        c, point = cov.reshape(-1, N, N)[b], y.reshape(-1, N)[b]
        free = c.diagonal() > 1e-12
        rest = td.MultivariateNormal(
            mean.reshape(-1, N)[b][free], covariance_matrix=c[free][:, free], validate_args=False
        )
        torch.testing.assert_close(conditional.log_prob(y).reshape(-1)[b], rest.log_prob(point[free]))
        torch.testing.assert_close(conditional.entropy().reshape(-1)[b], rest.entropy())


def _pinned(N, tau):
    seen = torch.arange(N) % 3 == 0
    return seen if tau is None else seen & (torch.arange(N) % 2 == 0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(
    "shape", [GREY, ONE_STENCIL, ONE_OF_EACH, COLOUR], ids=["grey", "one-stencil", "one-of-each", "made"]
)
def test_a_factor_of_features(shape, bias):
    """It stays linear where the stencil is one for all channels; P is made where it is not."""
    stencil, loc = make(shape)
    F, W, b = linear(stencil, stencil.channels, bias)
    assert isinstance(LinearFactor(F, W, b).whitened(stencil, "aten"), LinearFactor) == (shape is not COLOUR)
    x = torch.randn(2, *loc.shape[-1:], dtype=F64)

    def value(build):
        def function(F, loc, W, *tensors):
            P = LinearFactor(F, W, b)
            D = build(loc, P, of_parts(stencil, tensors))
            return D.log_prob(x).sum() + D.entropy().sum()

        return function

    given = F, loc, W, *parts(stencil)
    dense = value(lambda loc, P, stencil: Dense(loc, stencil, P.materialise()))
    torch.testing.assert_close(value(GlobalLocalNormal)(*given), dense(*given))
    for ours, theirs in zip(*(gradients(f, *given) for f in (value(GlobalLocalNormal), dense)), strict=True):
        torch.testing.assert_close(ours, theirs)
    D = GlobalLocalNormal(LinearMean(F, W[0], None), LinearFactor(F, W, b), stencil)
    made = GlobalLocalNormal(D.loc, D.cov_factor, stencil)
    torch.testing.assert_close(D.log_prob(x), made.log_prob(x))
    noise = torch.randn(2, R, dtype=F64), x
    torch.testing.assert_close(D.rsample(noise=noise), made.rsample(noise=noise))
    torch.testing.assert_close(D.variance, made.variance)


def test_scaled_components():
    stencil, loc = make(GREY)
    F, W, b = linear(stencil, 1)
    D, A = GlobalLocalNormal(loc, LinearFactor(F, W, b), stencil), torch.randn(R, 2, dtype=F64)
    mixed = D.mix(A)
    assert isinstance(mixed._parameters.factor, LinearFactor)
    torch.testing.assert_close(mixed.cov_factor, D.cov_factor @ A)
    torch.testing.assert_close(D.factor_gram(), D.cov_factor.mT @ D.cov_factor)
    assert (D.rank(), mixed.rank()) == (R, 2)


@pytest.mark.parametrize("features", [True, False], ids=["features", "dense"])
def test_components_are_scaled_and_samples_interpolated(features):
    """The tools of the observation space: USAVᵀ in place of USVᵀ; ω_p turns while ω_d is held."""
    stencil, loc = make(GREY)
    F, W, b = linear(stencil, 1)
    D = GlobalLocalNormal(loc, LinearFactor(F, W, b) if features else factor(loc), stencil)
    A = torch.tensor([1.5, 0.0, 0.3], dtype=F64)
    U, S, Vh = torch.linalg.svd(D.cov_factor, full_matrices=False)
    scaled = scale_components(D, A)
    expected = Dense(loc, stencil, U @ torch.diag_embed(S * A) @ Vh)
    x = loc + torch.randn(3, 2, 20, dtype=F64)
    torch.testing.assert_close(scaled.log_prob(x), expected.log_prob(x))
    torch.testing.assert_close(scaled.covariance_row(7), expected.covariance[..., 7, :])
    start, end, omega_d = (torch.randn(2, size, dtype=F64) for size in (R, R, 20))
    local = D.stencil.colour(omega_d, "reference")
    path = interpolate(D, start, end, omega_d, 3, temperature=(1.0, 0.5))
    middle = (start + end) / (2 * torch.cos(torch.acos(torch.cosine_similarity(start, end, dim=-1)) / 2))[..., None]
    for image, omega_p in zip(path, (start, middle, end), strict=True):
        torch.testing.assert_close(image, loc + (D.cov_factor @ omega_p.unsqueeze(-1)).squeeze(-1) + 0.5 * local)


def test_a_diagonal_is_a_stencil_without_neighbours():
    loc, P = torch.randn(2, 20, dtype=F64), torch.randn(2, 20, R, dtype=F64)
    log_t = 0.3 * torch.randn(2, 1, 4, 5, dtype=F64)
    D = GlobalLocalNormal(loc, P, Stencil(log_t, torch.zeros(2, 1, 4, 4, 5, dtype=F64)))
    plain = LowRankMultivariateNormal(loc, P, (-2 * log_t).exp().flatten(1))
    x, observed = torch.randn(2, 20, dtype=F64), torch.arange(20) % 3 == 1
    torch.testing.assert_close(D.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(D.entropy(), plain.entropy())
    torch.testing.assert_close(D.covariance_row(3), plain.covariance_row(3))
    ours, theirs = D.condition(x, observed), plain.condition(x, observed)
    torch.testing.assert_close(ours.loc, theirs.loc)
    torch.testing.assert_close(ours.variance, theirs.variance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    stencil, loc = make(COLOUR, dtype=dtype)
    P, x = factor(loc).to(dtype), torch.randn(2, 36, dtype=F64).to(dtype)
    given = loc, P, *parts(stencil)

    def both(x, loc, P, *tensors):
        return GlobalLocalNormal(loc, P, of_parts(stencil, tensors)).log_prob_and_entropy(x)

    found, exact = both(x, *given), both(x.double(), *(t.double() for t in given))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 3e-6
    y = GlobalLocalNormal(loc, P, stencil).rsample((2,))
    assert (y.dtype, y.shape) == (dtype, (2, 2, 36))


def test_contract():
    D = distribution(SHAPES[9])
    N = D.event_shape[0]
    assert (D.batch_shape, D.event_shape, D.has_rsample) == ((2, 3), (18,), True)
    assert D.mean.shape == D.mode.shape == D.variance.shape == D.stddev.shape == (2, 3, N)
    assert D.rsample((2, 1)).shape == (2, 1, 2, 3, N)
    assert D.log_prob(torch.zeros(4, 1, 1, N, dtype=F64)).shape == (4, 2, 3)
    assert repr(D).startswith("GlobalLocalNormal(loc: torch.Size([2, 3, 18]), ")
    x = torch.randn(2, 3, N, dtype=F64)
    E = D.expand((4, 2, 3))
    torch.testing.assert_close(E.log_prob(x), D.log_prob(x).expand(4, 2, 3))
    assert E.sample((2,)).shape == (2, 4, 2, 3, N)
    assert E.cov_factor.shape == (4, 2, 3, N, R)
    for copied in (copy.deepcopy(D), pickle.loads(pickle.dumps(D)), copy.copy(D)):
        torch.testing.assert_close(copied.log_prob(x), D.log_prob(x))


def test_parameters_broadcast():
    stencil, _ = make(GREY)
    loc, P = torch.randn(2, 20, dtype=F64), torch.randn(3, 1, 20, R, dtype=F64)
    D = GlobalLocalNormal(loc, P, stencil)
    assert D.batch_shape == (3, 2)
    x = torch.randn(3, 2, 20, dtype=F64)
    torch.testing.assert_close(D.log_prob(x), oracle(D).log_prob(x))
    assert D.sample((4,)).shape == (4, 3, 2, 20)
    assert D.condition(x, torch.arange(20) < 3, 0.1).batch_shape == (3, 2)


BAD = [
    ("factor", ValueError, r"cov_factor has shape \[2, 19, 3\], expected \[..., 20, R\] because the stencil has",
     lambda loc, P, s: GlobalLocalNormal(loc, P[:, 1:], s)),
    ("rank", ValueError, "rank R of at least 1", lambda loc, P, s: GlobalLocalNormal(loc, P[..., :0], s)),
    ("no-stencil", TypeError, "stencil must be a Stencil, got a tensor",
     lambda loc, P, s: GlobalLocalNormal(loc, P, loc)),
    ("batch", ValueError, "Incompatible batch shapes of loc, cov_factor and stencil",
     lambda loc, P, s: GlobalLocalNormal(loc, P[[0, 0, 0]], s)),
    ("dtype", TypeError, "cov_factor has dtype", lambda loc, P, s: GlobalLocalNormal(loc, P.float(), s)),
    ("noise", ValueError, r"noise\[0\] has shape",
     lambda loc, P, s: GlobalLocalNormal(loc, P, s).rsample(noise=(loc, loc))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, message, call):
    stencil, loc = make(GREY)
    with pytest.raises(error, match=message):
        call(loc, factor(loc), stencil)
