"""`LinearFactor`: the same numbers and gradients as the factor it stands for, without the factor."""

import linear_cases
import pytest
import torch
import torch.distributions as td
from lowrank_cases import gradients, loss, relative, through, tolerances, unmoved

import lowrank_mvn
from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal
from lowrank_mvn.capacitance import LOG_DET_TOLERANCE
from lowrank_mvn.device import pages
from lowrank_mvn.device.pages import Scratch
from lowrank_mvn.factors.linear import aten

# (id, B, K, R, C, spatial, diagonal, bias, channels last)
CASES = [
    ("one-of-each", 1, 1, 1, 1, (1,), "pixel", True, False),
    ("scalar-d", 3, 5, 4, 3, (7, 6), "scalar", True, False),
    ("item-d", 2, 6, 2, 1, (5, 3), "item", False, False),
    ("pixel-d", 3, 5, 4, 3, (7, 6), "pixel", True, False),
    ("channels-last", 2, 8, 3, 2, (6, 5), "pixel", True, True),
    ("wide-features", 2, 30, 2, 1, (11,), "scalar", True, False),
    ("tiles", 2, 30, 3, 2, (7, 3), "pixel", True, True),
    ("one-pixel-of-three-channels", 2, 5, 2, 3, (1,), "pixel", True, False),
    ("rank-above-features", 2, 2, 9, 1, (4, 5), "pixel", False, False),
]
IDS = [case[0] for case in CASES]
NAMES = ("features", "weight", "bias", "mean weight", "mean bias", "cov_diag", "value", "shift")


def tensors(B, K, R, C, spatial, diagonal, last, dtype=torch.float64, d=1.0):
    """Those of `linear_cases`, and a mean to be added."""
    sizes = B, K, R, C, spatial
    given = linear_cases.tensors(dtype, last=last, d=d, diagonal=diagonal, samples=(2,), sizes=sizes)
    return *given, torch.randn_like(given[-1][0])


def linear(bias, mean):
    """The loss of a linear factor with a linear mean, or with a mean from elsewhere."""

    def function(F, W, b, Wm, bm, d, x, shift):
        loc = LinearMean(F, Wm, bm) if mean else LinearMean(F, Wm, bm).materialise() + shift
        factor = LinearFactor(F, W, b if bias else None)
        return loss(LowRankMultivariateNormal(loc, factor, d), x) + 0 * (b.sum() + shift.sum())

    return function


def textbook(bias, mean, move=unmoved):
    """The same of torch's class, from convolutions written as sums, whose results `move` goes over."""

    def function(F, W, b, Wm, bm, d, x, shift):
        F = F.flatten(2)
        P = torch.einsum("rck,bkn->bcnr", W, F)
        P = (P + b.T[:, None] if bias else P).flatten(1, 2)
        loc = (torch.einsum("ck,bkn->bcn", Wm, F) + bm[:, None]).flatten(1)
        loc = loc if mean else loc + shift
        P, loc = through(P, move), through(loc, move)
        diag = d.expand(P.shape[:2])
        value = loss(td.LowRankMultivariateNormal(loc, P, diag), x)
        return value + 0 * (b.sum() + shift.sum())

    return function


@pytest.mark.parametrize("mean", [True, False], ids=["linear-mean", "other-mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("id", "B", "K", "R", "C", "spatial", "diagonal", "bias", "last"), CASES, ids=IDS)
def test_every_gradient_by_name(id, B, K, R, C, spatial, diagonal, bias, last, dtype, mean):
    inputs = tensors(B, K, R, C, spatial, diagonal, last, dtype)
    exact = [t.double() for t in inputs]

    def both(function, tensors):
        return [function(*tensors).detach(), *gradients(function, *tensors)]

    expected = both(textbook(bias, mean), exact)
    if dtype == torch.float64:
        allowed = [1e-10] * len(expected)
    else:

        def values(move):
            return both(textbook(bias, mean, move), [move(t) for t in exact])

        allowed = tolerances(values, terms=exact[6][0].numel(), most=2e-5)
    for name, ours, theirs, tolerance in zip(
        ("loss", *NAMES), both(linear(bias, mean), inputs), expected, allowed, strict=True
    ):
        assert ours.shape == theirs.shape, name
        assert ours.dtype == (torch.float64 if name == "loss" else dtype), name
        assert relative(ours, theirs) <= tolerance, name  # of a bias that is not used both are zero


def test_nothing_of_the_size_of_the_factor_is_kept_or_made():
    """The largest tensor kept for the backward pass is the features themselves."""
    B, K, R, C, side = 2, 8, 40, 3, 30
    F = torch.randn(B, K, side, side, requires_grad=True)
    W = torch.randn(R, C, K, requires_grad=True)
    D = LowRankMultivariateNormal(torch.zeros(B, C * side * side), LinearFactor(F, W), 0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        log_prob, entropy = D.log_prob_and_entropy(torch.zeros(C * side * side))
    assert max(shape.numel() for shape in kept) <= F.numel()
    (log_prob.sum() + entropy.sum()).backward()
    assert D.cov_factor.shape == (B, C * side * side, R)


@pytest.mark.usefixtures("in_torch")  # the compiled residual takes no copies
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "channels-last"])
def test_features_of_the_products_dtype_are_used_where_they_lie(monkeypatch, last):
    """With one d; float64, because the residual of float32 features is made in float64."""
    F, weight, bias, mean_weight, mean_bias, d, x, _ = tensors(2, 6, 4, 2, (5, 3), "item", last, torch.float64)
    copies = []
    like = Scratch.like
    monkeypatch.setattr(Scratch, "like", lambda scratch, f: copies.append(f.shape) or like(scratch, f))

    def function(F):
        return loss(
            LowRankMultivariateNormal(LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias), d), x
        )

    gradients(function, F)
    assert not copies
    gradients(lambda F: LinearFactor(F, weight, bias).row_norms().sin().sum(), F)
    assert not copies
    LowRankMultivariateNormal(
        torch.zeros(30), LinearFactor(F.float(), weight.float(), bias.float()), d.float()
    ).log_prob(x.float())
    assert copies  # in blocks, for the residual


@pytest.mark.parametrize("diagonal", ["item", "pixel"])
@pytest.mark.parametrize("K", [3, 30], ids=["features", "tiles"])
def test_a_gradient_alone_is_what_it_is_among_all(K, diagonal):
    """What no one asks for is not made; the rest is as before."""
    inputs = tensors(2, K, 4, 2, (5,), diagonal, False, torch.float64)
    every = gradients(linear(True, True), *inputs)
    for i, expected in enumerate(every):
        if NAMES[i] != "shift":  # of no use beside a linear mean
            alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
            (g,) = torch.autograd.grad(linear(True, True)(*alone), alone[i])
            assert relative(g, expected) < 1e-12, NAMES[i]


def test_saved_tensors_may_have_pages_of_their_own(monkeypatch):
    inputs = tensors(2, 3, 4, 2, (5,), "pixel", False, torch.float32)
    expected = gradients(linear(True, True), *inputs)
    monkeypatch.setattr(pages, "MAPPED_BYTES", 0)
    # A second one, made and gone between the two passes of the first, has pages of its own too.
    first = linear(True, True)(*(t.requires_grad_() for t in inputs))
    gradients(linear(True, True), *(2 * t.detach() for t in inputs))
    for g, e in zip(torch.autograd.grad(first, inputs, allow_unused=True), expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_linear_mean_of_the_same_features_joins(monkeypatch, with_gradients):
    """With gradients or without (each then holds the features detached): μ is not made."""
    inputs = tensors(2, 3, 4, 2, (5,), "pixel", False, torch.float64)
    F, weight, bias, mean_weight, mean_bias, d, x, _ = (t.requires_grad_() for t in inputs)
    with torch.set_grad_enabled(with_gradients):
        mean, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        expected = LowRankMultivariateNormal(mean.materialise(), factor, d).log_prob(x)
        other = LinearMean(F.clone(), mean_weight, mean_bias)
        torch.testing.assert_close(LowRankMultivariateNormal(other, factor, d).log_prob(x), expected)
        monkeypatch.setattr(LinearMean, "materialise", lambda self: pytest.fail("the mean was made"))
        torch.testing.assert_close(LowRankMultivariateNormal(mean, factor, d).log_prob(x), expected)


def test_exact_where_the_textbook_is_not():
    """d = 1e-5 and correlated features: log p and gradients against float64."""
    inputs = list(tensors(2, 16, 10, 3, (40, 30), "scalar", False, torch.float32))
    inputs[0] = (inputs[0] + 3).relu() * 0.3
    inputs[5] = torch.tensor(1e-5)
    P = LinearFactor(inputs[0], inputs[1], inputs[2]).materialise().double()
    loc = LinearMean(inputs[0], inputs[3], inputs[4]).materialise().double()
    noise = torch.randn(2, 2, 10, 1, dtype=torch.float64), torch.randn(2, 2, 3600, dtype=torch.float64)
    inputs[6] = (loc + (P @ noise[0])[..., 0] + 1e-5**0.5 * noise[1]).float()
    exact = [t.double() for t in inputs]
    ours, expected = linear(True, True)(*inputs), textbook(True, True)(*exact)
    # A value near 10 in float32 has a rounding error of 1e-6, a thousandth of √d, in each of 3600 squares.
    assert (ours - expected).abs() < 1e-5 * expected.abs()
    for name, a, b in zip(
        NAMES[:7], gradients(linear(True, True), *inputs), gradients(textbook(True, True), *exact), strict=False
    ):
        assert relative(a, b) < 1e-4, name


def test_collinear_features_are_made_again_in_float64():
    inputs = list(tensors(1, 6, 4, 1, (50, 40), "scalar", False, torch.float32))
    inputs[0][:, 1:] = inputs[0][:, :1] + 1e-4 * inputs[0][:, 1:]
    inputs[5] = torch.tensor(1e-5)
    exact = [t.double() for t in inputs]
    factor, reference = LinearFactor(*inputs[:3]), LinearFactor(*exact[:3])
    ours = lowrank_mvn.entropy(factor, inputs[5]).double()
    torch.testing.assert_close(ours, lowrank_mvn.entropy(reference.materialise(), exact[5]), rtol=1e-6, atol=0.01)


def test_many_columns_are_no_reason_for_float64():
    """The bound on what rounding moves is not loose: random weights of a large rank stay with float32 products."""
    torch.manual_seed(1)
    B, K, R, C, M, d = 2, 64, 100, 1, 1500, 0.1
    F, W = torch.randn(B, K, M), torch.cat([torch.randn(1, C, R, K) / 8, torch.zeros(1, C, R, 1)], -1)
    x, diag = torch.randn(1, B, C, M), torch.full((B, 1, 1), d)
    arguments = x, None, F, W, None, diag
    out = aten.mahalanobis_and_logdet(*arguments)
    exact = aten.mahalanobis_and_logdet(*(None if t is None else t.double() for t in arguments))
    assert not out[-1].any()
    assert (out[1] - exact[1]).abs().max() < LOG_DET_TOLERANCE


def test_gradcheck():
    F, W, b, Wm, bm, d, x, _ = (t.requires_grad_() for t in tensors(2, 3, 2, 2, (3, 2), "pixel", False))

    def joint(F, W, b, Wm, bm, d, x):
        D = LowRankMultivariateNormal(LinearMean(F, Wm, bm), LinearFactor(F, W, b), d, validate_args=False)
        return D.log_prob_and_entropy(x)

    assert torch.autograd.gradcheck(joint, (F, W, b, Wm, bm, d, x))
    assert torch.autograd.gradgradcheck(joint, (F, W, b, Wm, bm, d, x))

    def shifted(F, W, d, x, loc):
        return LowRankMultivariateNormal(loc, LinearFactor(F, W), d, validate_args=False).log_prob(x)

    scalar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(shifted, (F, W, scalar, x, torch.zeros(2, 12, dtype=torch.float64)))


def test_answers_to_what_the_class_answers_to():
    F, W, b, Wm, bm, d, x, shift = tensors(3, 5, 4, 2, (4, 3), "pixel", False)
    factor, mean = LinearFactor(F, W, b), LinearMean(F, Wm, bm)
    full = LowRankMultivariateNormal(mean.materialise(), factor.materialise(), d)
    observed = torch.arange(24) < 9
    for loc in (mean, mean.materialise()):
        D = LowRankMultivariateNormal(loc, factor, d, validate_args=True)
        assert (D.batch_shape, D.event_shape) == (full.batch_shape, full.event_shape)
        for name in ("loc", "mean", "variance", "cov_factor", "covariance_matrix", "precision_matrix", "scale_tril"):
            torch.testing.assert_close(getattr(D, name), getattr(full, name), msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(D.log_prob(x), full.log_prob(x))
        torch.testing.assert_close(D.log_prob(shift[0]), full.log_prob(shift[0]))
        torch.testing.assert_close(D.entropy(), full.entropy())
        torch.testing.assert_close(D.expand((2, 3)).log_prob(x), full.expand((2, 3)).log_prob(x))
        torch.testing.assert_close(D.expand((2, 3)).sample((4,)).shape, full.expand((2, 3)).sample((4,)).shape)
        torch.testing.assert_close(D.covariance_row(5), full.covariance_row(5))
        torch.testing.assert_close(D.condition(x[0], observed).loc, full.condition(x[0], observed).loc)
        torch.testing.assert_close(td.kl_divergence(D, full), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
        samples = []
        for distribution in (D, full):
            torch.manual_seed(3)
            samples.append(distribution.rsample((5,)))
        torch.testing.assert_close(*samples)
        repr(D)
    mixed = LowRankMultivariateNormal(mean, factor.mix(torch.eye(4, dtype=torch.float64)[:, :2]), d)
    torch.testing.assert_close(mixed.cov_factor, full.cov_factor[..., :2])
    batched = LowRankMultivariateNormal(mean, factor, d.expand(2, 3, 24))  # more items than features
    torch.testing.assert_close(batched.log_prob(x), full.log_prob(x))
    torch.testing.assert_close(
        torch.func.grad(lambda F: LowRankMultivariateNormal(shift, LinearFactor(F, W), d).log_prob(x).sum())(F),
        gradients(lambda F: LowRankMultivariateNormal(shift, LinearFactor(F, W), d).log_prob(x).sum(), F)[0],
    )
    compiled = torch.compile(
        lambda F: LowRankMultivariateNormal(shift, LinearFactor(F, W), d).log_prob(x),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(F), LowRankMultivariateNormal(shift, LinearFactor(F, W), d).log_prob(x))


def test_samples_have_gradients():
    F, W, b, Wm, bm, d, _, _ = tensors(3, 5, 4, 2, (4, 3), "pixel", False)
    noise = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 24, dtype=torch.float64)

    def sampled(materialise):
        def function(F, W, b):
            factor = LinearFactor(F, W, b)
            loc = LinearMean(F, Wm, bm)
            if materialise:
                loc, factor = loc.materialise(), factor.materialise()
            return LowRankMultivariateNormal(loc, factor, d).rsample((6,), noise=noise).sin().sum()

        return function

    for a, b_ in zip(gradients(sampled(False), F, W, b), gradients(sampled(True), F, W, b), strict=True):
        torch.testing.assert_close(a, b_)


def test_the_convolutions_own_weights():
    conv = torch.nn.Conv2d(5, 4 * 3, 1)
    F = torch.randn(2, 5, 6, 7)
    factor = LinearFactor(F, conv.weight, conv.bias, channels=3)
    expected = conv(F).unflatten(1, (4, 3)).flatten(2).mT
    torch.testing.assert_close(factor.materialise(), expected)
    mean = torch.nn.Conv2d(5, 3, 1)
    torch.testing.assert_close(LinearMean(F, mean.weight, mean.bias).materialise(), mean(F).flatten(1))


def test_errors():
    F = torch.randn(2, 5, 6, 7)
    cases = [
        (lambda: LinearFactor(F[0, 0], torch.ones(3, 1, 5)), r"features has shape \[6, 7\], expected \[B, K"),
        (lambda: LinearFactor(F, torch.ones(3, 1, 4)), r"weight has shape \[3, 1, 4\], expected \[R, channels, 5\]"),
        (lambda: LinearFactor(F, torch.ones(0, 1, 5)), r"weight has shape \[0, 1, 5\]"),
        (lambda: LinearFactor(F, torch.ones(12, 5, 1, 1), channels=5), "expected `channels` to divide"),
        (lambda: LinearFactor(F, torch.ones(3, 1, 5), torch.ones(4)), r"bias has shape \[4\], expected \[3, 1\]"),
        (lambda: LinearMean(F, torch.ones(3, 4)), r"weight has shape \[3, 4\], expected \[channels, 5\]"),
        (lambda: LinearMean(F, torch.ones(3, 5), torch.ones(4)), r"bias has shape \[4\], expected \[3\]"),
        (
            lambda: LowRankMultivariateNormal(torch.ones(2, 41), LinearFactor(F, torch.ones(3, 1, 5)), 1.0),
            r"loc has shape \[2, 41\], expected \[\.\.\., 42\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"cov_factor\.weight has dtype torch.float64"):
        LowRankMultivariateNormal(torch.ones(2, 42), LinearFactor(F, torch.ones(3, 1, 5).double()), 1.0)


@pytest.mark.parametrize("mean", [True, False])
def test_opcheck(mean):
    F, W, b, Wm, bm, d, x, shift = tensors(2, 3, 2, 2, (3, 2), "pixel", False)
    Wt = torch.cat([W, b[..., None]], -1).transpose(0, 1)[None]
    m = torch.cat([Wm, bm[:, None]], -1)
    canonical = [x.unflatten(2, (2, -1)), None if mean else shift[None].unflatten(2, (2, -1))]
    canonical += [F.flatten(2), Wt, m if mean else None, d.unflatten(1, (2, -1))]
    arguments = [None if t is None else t.contiguous().requires_grad_() for t in canonical]
    op = torch.ops.lowrank_mvn.linear_mahalanobis_and_logdet.default
    torch.library.opcheck(op, (*arguments, "aten"))
    with torch.no_grad():
        q, logdet, *kept = op(*arguments, "aten")
    torch.library.opcheck(
        torch.ops.lowrank_mvn.linear_mahalanobis_and_logdet_backward.default,
        (torch.randn_like(q), torch.randn_like(logdet), *arguments, *kept, [True] * 3, "aten"),
    )


def test_an_implementation_without_linear_factors_is_an_error():
    factor = LinearFactor(torch.randn(2, 5, 6), torch.ones(3, 1, 5))
    with pytest.raises(
        ValueError, match=r"impl='triton' is not available for a LinearFactor.*'aten', 'cpu', 'reference'"
    ):
        lowrank_mvn.entropy(factor, 1.0, impl="triton")


def test_made_without_gradients_it_stays_without():
    features, weight = torch.randn(2, 5, 6), torch.randn(3, 1, 5, requires_grad=True)
    mean_weight = torch.randn(1, 5, requires_grad=True)
    with torch.no_grad():
        p = LowRankMultivariateNormal(LinearMean(features, mean_weight), LinearFactor(features, weight), 0.1)
    assert not p.loc.requires_grad
    assert not p.cov_factor.requires_grad
    assert not p.log_prob(torch.zeros(6)).requires_grad
    with torch.inference_mode():
        p = LowRankMultivariateNormal(LinearMean(features, mean_weight), LinearFactor(features, weight), 0.1)
    assert not p.variance.requires_grad
