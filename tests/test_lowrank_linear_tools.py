"""What is made of a `LinearFactor` (conditionals, components, samples) is one again, and P is made nowhere."""

import pytest
import torch
from linear_cases import CHANNELS, DTYPES, B, K, N, NothingAsLargeAs, R, distribution, tensors, tolerance
from lowrank_cases import gradients, relative

from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal
from lowrank_mvn.factors.linear.aten import blocks
from lowrank_mvn.functional import condition
from sosvae.tools.observation import scale_components

# --- Weights for each item, and rows that are zero -------------------------------------------------------------------


@pytest.mark.parametrize("items", [(B,), (2, B), (2, 1)], ids=["items", "twice", "shared"])
def test_a_weight_for_each_item(items):
    F, weight, bias, mean_weight, mean_bias, d, x = tensors(items=items)

    def loss(materialise):
        def function(F, weight, bias, d, x):
            D = distribution(F, weight, bias, mean_weight, mean_bias, d, materialise)
            assert D.batch_shape == torch.broadcast_shapes(items, (B,))
            log_prob, entropy = D.log_prob_and_entropy(x)
            return (log_prob.sin() + entropy).sum()

        return function

    assert relative(loss(False)(F, weight, bias, d, x), loss(True)(F, weight, bias, d, x)) < 1e-10
    inputs = F, weight, bias, d, x
    for name, a, b in zip(
        ["F", "W", "b", "d", "x"], *(gradients(loss(m), *inputs) for m in (False, True)), strict=True
    ):
        assert relative(a, b) < 1e-10, name


@pytest.mark.parametrize("items", [(), (B,), (2, 1)], ids=["shared", "items", "twice"])
@pytest.mark.parametrize("masked", [False, True])
def test_methods_know_weights_and_masks(items, masked):
    F, weight, bias, *_ = tensors(items=items)
    mask = torch.rand(B, N) < 0.6 if masked else None
    factor = LinearFactor(F, weight, bias, mask=mask)
    P = factor.materialise()
    assert factor.shape == P.shape
    each = (weight.expand(*items[:-1], B, R, CHANNELS, K), bias.expand(*items[:-1], B, R, CHANNELS))
    expected = torch.einsum("...brck,bkn->...bcnr", each[0], F.flatten(2))
    expected = (expected + each[1].transpose(-1, -2).unsqueeze(-2)).flatten(-3, -2)
    torch.testing.assert_close(P, expected if mask is None else expected * mask.unsqueeze(-1))
    omega = torch.randn(4, *P.shape[:-2], R, dtype=F.dtype)
    torch.testing.assert_close(factor.times(omega), (P @ omega.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(factor.times(omega[0, ..., :1, :]), (P @ omega[0, ..., :1, :].unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(factor.row(N - 2), P[..., N - 2, :])
    torch.testing.assert_close(factor.row_norms(), P.square().sum(-1))
    torch.testing.assert_close(factor.gram(), P.mT @ P)
    A = torch.randn(*P.shape[:-2], R, 3, dtype=F.dtype)
    torch.testing.assert_close(factor.mix(A).materialise(), P @ A)
    torch.testing.assert_close(factor.mix(A[(0,) * len(P.shape[:-2])]).materialise(), P @ A[(0,) * len(P.shape[:-2])])
    pairs = [
        (lambda f: f.row_norms(), lambda P: P.square().sum(-1)),
        (lambda f: f.gram(), lambda P: P.mT @ P),
        (lambda f: f.times(omega), lambda P: (P @ omega.unsqueeze(-1)).squeeze(-1)),
    ]
    for ours, full in pairs:
        a = gradients(lambda *t, f=ours: f(LinearFactor(*t, mask=mask)).sin().sum(), F, weight, bias)
        b = gradients(lambda *t, f=full: f(LinearFactor(*t, mask=mask).materialise()).sin().sum(), F, weight, bias)
        assert all(relative(x, y) < 1e-9 for x, y in zip(a, b, strict=True))


def test_errors_of_weights_and_masks():
    F = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"Incompatible batch shapes of features, weight and mask: \[2\], \[3\], \[\]"):
        LinearFactor(F, torch.ones(3, 4, 1, 5))
    with pytest.raises(ValueError, match=r"mask has shape \[5\], expected \[\.\.\., 6\]"):
        LinearFactor(F, torch.ones(4, 1, 5), mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a tensor of dtype bool"):
        LinearFactor(F, torch.ones(4, 1, 5), mask=torch.ones(6))
    with pytest.raises(ValueError, match="mask is on meta, the parameters on cpu; expected one device"):
        LinearFactor(F, torch.ones(4, 1, 5), mask=torch.ones(6, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"bias has shape \[4, 1\], expected \[2, 4, 1\]"):
        LinearFactor(F, torch.ones(2, 4, 1, 5), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"bias has shape \[2, 4\], expected \[4, 2\] or \[8\]"):
        LinearFactor(F, torch.ones(4, 2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match="where `channels` says 2"):
        LinearFactor(F, torch.ones(4, 1, 5), channels=2)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor, got list"):
        LinearFactor(F, [1.0])
    with pytest.raises(TypeError, match="mask must be a tensor of dtype bool, got list"):
        LinearFactor(F, torch.ones(4, 1, 5), mask=[True] * 6)
    with pytest.raises(TypeError, match="features must be a floating-point tensor, got NoneType"):
        LinearMean(None, torch.ones(1, 5))
    with pytest.raises(IndexError, match="row 6 is out of range for 6 rows"):
        LinearFactor(F, torch.ones(4, 1, 5)).row(6)


def test_one_feature_with_a_weight_per_item_is_no_convolution():
    F = torch.randn(3, 1, 6)
    for channels in (None, 1):
        assert LinearFactor(F, torch.ones(3, 2, 1, 1), channels=channels).shape == (3, 6, 2)
    assert LinearFactor(F, torch.ones(6, 1, 1, 1), channels=3).shape == (3, 18, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, in jvp
@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_of_what_the_class_answers(masked):
    F, weight, bias, *_, d, _ = tensors()
    mask = torch.rand(B, N) < 0.7 if masked else None
    answers = {
        "variance": lambda D: D.variance,
        "stddev": lambda D: D.stddev,
        "factor_gram": lambda D: D.factor_gram(),
        "covariance_row": lambda D: D.covariance_row(3),
        "covariance_matrix": lambda D: D.covariance_matrix,
        "log_prob": lambda D: D.log_prob(torch.zeros(N, dtype=torch.float64)),
    }
    tangents = tuple(torch.randn_like(t) for t in (F, weight, bias))
    for name, answer in answers.items():

        def of(factor, answer=answer):
            loc = torch.zeros(B, N, dtype=torch.float64)
            return lambda *t: answer(LowRankMultivariateNormal(loc, factor(*t), d, validate_args=False))

        ours, theirs = (
            torch.func.jvp(of(factor), (F, weight, bias), tangents)
            for factor in (
                lambda *t: LinearFactor(*t, mask=mask),
                lambda *t: LinearFactor(*t, mask=mask).materialise(),
            )
        )
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_no_items():
    F, x = torch.randn(1, 5, 12), torch.randn(36)
    for factor, d in [
        (LinearFactor(F[:0], torch.randn(2, 3, 5)), torch.ones(1)),
        (LinearFactor(F, torch.randn(0, 2, 3, 5)), torch.ones(1)),
        (LinearFactor(F, torch.randn(2, 3, 5)), torch.ones(0, 1)),
        (LinearFactor(F.expand(2, -1, -1), torch.randn(2, 3, 5)), torch.ones(0, 2, 1)),
    ]:
        D = LowRankMultivariateNormal(torch.zeros(36), factor, d)
        assert D.log_prob(x).shape == D.entropy().shape == D.batch_shape
        assert D.rsample((2,)).shape == (2, *D.batch_shape, 36)
        assert D.variance.shape == (*D.batch_shape, 36)
        assert 0 in D.batch_shape


# --- Conditionals and components -------------------------------------------------------------------------------------


def edits(shape):
    return {
        "one": (torch.randn(N, dtype=torch.float64), torch.rand(N) < 0.3),
        "items": (torch.randn(B, N, dtype=torch.float64), torch.rand(B, N) < 0.3),
        "several": (torch.randn(4, 1, N, dtype=torch.float64), torch.rand(4, B, N) < 0.3),
        "values": (torch.randn(4, B, N, dtype=torch.float64), torch.rand(N) < 0.3),
    }[shape]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["one", "items", "several", "values"])
@pytest.mark.parametrize("mean", [True, False], ids=["linear-mean", "other-mean"])
def test_conditional(shape, dtype, mean):
    F, weight, bias, mean_weight, mean_bias, d, _ = tensors(dtype)
    value, observed = edits(shape)
    value = torch.where(observed, value.to(dtype), torch.nan)  # what is not observed is ignored

    def parts(F, weight, bias, mean_weight, d, value, materialise=False):
        loc, P = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        if materialise or not mean:
            loc = loc.materialise()
        return condition(value, observed, loc, P.materialise() if materialise else P, d)

    inputs = F, weight, bias, mean_weight, d, torch.where(observed, value, 0)
    exact = [t.double() for t in inputs]
    ours, expected = parts(*inputs), parts(*exact, materialise=True)
    assert isinstance(ours.cov_factor, LinearFactor)
    assert ours.cov_factor.features is F
    full = expected.cov_factor
    for a, b in ((ours.loc, expected.loc), (ours.cov_factor.materialise(), full), (ours.cov_diag, expected.cov_diag)):
        assert relative(a.expand(b.shape), b) < tolerance(dtype)
    torch.testing.assert_close(
        condition(value, observed, LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias), d).loc,
        ours.loc,
    )

    def loss(materialise):
        def function(*inputs):
            loc, P, diag = parts(*inputs, materialise=materialise)
            P = P if materialise else P.materialise()
            # PPᵀ times a vector: the same whatever the square root is that P holds.
            y = (P @ (P.mT @ torch.linspace(-1, 1, N, dtype=P.dtype).unsqueeze(-1))).squeeze(-1)
            return sum(t.double().expand(loc.shape).sin().sum() for t in (0.1 * loc, y, diag))

        return function

    ours, made, expected = (
        gradients(loss(False), *inputs),
        gradients(loss(True), *inputs),
        gradients(loss(True), *exact),
    )
    for name, a, eager, b in zip(["F", "W", "b", "m", "d", "value"], ours, made, expected, strict=True):
        assert a.dtype == dtype, name
        # In float32 twice the error that P made in the same precision has, and rounding.
        bound = 1e-9 if dtype == torch.float64 else 2 * relative(eager, b) + tolerance(dtype)
        assert relative(a, b) < bound, name


def test_a_conditional_answers():
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()
    D, full = (distribution(F, weight, bias, mean_weight, mean_bias, d, m) for m in (False, True))
    value, observed = edits("several")
    ours, expected = D.condition(value, observed), full.condition(value, observed)
    assert ours.batch_shape == expected.batch_shape == (4, B)
    torch.testing.assert_close(ours.variance, expected.variance)
    torch.testing.assert_close(ours.covariance_row(7), expected.covariance_row(7))
    noise = torch.randn(2, 4, B, R, dtype=F.dtype), torch.randn(2, 4, B, N, dtype=F.dtype)
    torch.testing.assert_close(ours.rsample((2,), noise=noise), expected.rsample((2,), noise=noise))
    samples = ours.sample((2,))
    assert samples.shape == (2, 4, B, N)
    torch.testing.assert_close(samples[:, observed], value.expand(4, B, N)[observed].expand(2, -1))
    # Edits of one after the other are an edit of both, where the first left pixels with a variance.
    second = torch.rand(N) < 0.2
    twice = D.condition(x, observed).condition(x, second & ~observed)
    both = D.condition(x, observed | second)
    rest = ~(observed | second)
    torch.testing.assert_close(twice.loc[rest], both.loc[rest])
    torch.testing.assert_close(twice.variance[rest], both.variance[rest])
    # A density over the rest, where a mask makes P.
    keep = LowRankMultivariateNormal(ours.loc, ours._parameters.factor.given, d)
    torch.testing.assert_close(
        keep.log_prob(x), LowRankMultivariateNormal(expected.loc, expected.cov_factor, d).log_prob(x)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalar", [True, False])
def test_scale_components(dtype, scalar):
    F, weight, bias, mean_weight, mean_bias, d, x = tensors(dtype)
    d = d[0, 0] if scalar else d
    factors = torch.linspace(1.5, 0, R, dtype=dtype)

    def scaled(materialise):
        def function(F, weight, bias):
            D = distribution(F, weight, bias, mean_weight.to(F), mean_bias.to(F), d.to(F), materialise)
            return scale_components(D, factors.to(F))

        return function

    ours = scaled(False)(F, weight, bias)
    exact = [t.double() for t in (F, weight, bias)]
    expected = scaled(True)(*exact)
    assert isinstance(ours._parameters.factor.given, LinearFactor)
    # Components are determined by PᵀP, whose rounding in float32 the gaps between its eigenvalues divide.
    assert relative(ours.cov_factor, expected.cov_factor) < (1e-10 if dtype == torch.float64 else 1e-3)
    assert relative(ours.log_prob(x), expected.log_prob(x.double())) < (1e-10 if dtype == torch.float64 else 1e-3)
    if dtype == torch.float64:
        for a, b in zip(
            *(gradients(lambda *t, m=m: scaled(m)(*t).log_prob(x).sum(), *exact) for m in (False, True)), strict=True
        ):
            assert relative(a, b) < 1e-8


def test_nothing_as_large_as_the_factor_is_made(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 2000)  # as blocks of an image would be
    monkeypatch.setattr(blocks, "BLOCK_PIXELS", 16)
    value, observed = edits("several")
    for last in (False, True):
        for diagonal in ("pixel", "scalar"):
            F, weight, bias, mean_weight, mean_bias, d, x = (t.requires_grad_() for t in tensors(last=last))
            d = d if diagonal == "pixel" else d[0, 0]
            # A value and a mask for each of four edits: 4·B·N, beside B·N·R.
            with NothingAsLargeAs(B * N * R):
                D = distribution(F, weight, bias, mean_weight, mean_bias, d)
                loss = D.log_prob(x).sum() + D.entropy().sum() + D.variance.sum() + D.covariance_row(3).sum()
                edited = D.condition(value, observed)
                loss = loss + edited.rsample((2,)).sin().sum() + edited.variance.sum()
                scaled = scale_components(D, torch.linspace(1, 0, R, dtype=F.dtype))
                loss = loss + scaled.log_prob(x).sum() + scaled.rsample().sum()
                loss.backward()
            assert F.grad.stride() == F.stride()
            with pytest.raises(AssertionError), NothingAsLargeAs(B * N * R):
                D.cov_factor  # noqa: B018


# --- Transforms -----------------------------------------------------------------------------------------------------


def test_vmap_makes_no_factor(monkeypatch):
    """Over items, over values, over weights; with gradients of each item, and a mean that is learned."""
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()

    def loss(F, weight, d, x, mean_weight=None):
        factor = LinearFactor(F[None], weight, bias)
        loc = torch.zeros(N, dtype=F.dtype) if mean_weight is None else LinearMean(F[None], mean_weight, mean_bias)
        log_prob, entropy = LowRankMultivariateNormal(loc, factor, d, validate_args=False).log_prob_and_entropy(x)
        return (log_prob.sin() + entropy).squeeze(0)

    per_item = torch.randn(B, R, CHANNELS, K, dtype=F.dtype)
    means = mean_weight.expand(B, CHANNELS, K) * torch.arange(1, B + 1).view(B, 1, 1)
    cases = [
        ((0, None, 0, 0), (F, weight, d, x)),
        ((0, 0, None, 0), (F, per_item, d[0], x)),
        ((None, 0, None, 0), (F[0], per_item, d[0], x)),
        ((None, None, None, 0), (F[0], weight, d[0], x)),
        ((0, None, 0, 0, None), (F, weight, d, x, mean_weight)),
        ((0, None, 0, 0, 0), (F, weight, d, x, means)),
    ]
    expected = []
    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    for dims, inputs in cases:
        items = [[t if dim is None else t[i] for t, dim in zip(inputs, dims, strict=True)] for i in range(B)]
        expected.append([(loss(*item), *gradient(*item)) for item in items])
    monkeypatch.setattr(LinearFactor, "materialise", None)
    for (dims, inputs), one_by_one in zip(cases, expected, strict=True):
        values = torch.func.vmap(loss, dims)(*inputs)
        grads = torch.func.vmap(gradient, dims)(*inputs)
        for i, parts in enumerate(one_by_one):
            for a, b in zip((values[i], *(g[i] for g in grads)), parts, strict=True):
                torch.testing.assert_close(a, b, msg=lambda m, dims=dims: f"{dims}: {m}")


def test_vmap_of_conditionals(monkeypatch):
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()
    observed = torch.rand(B, N) < 0.3

    def conditional(F, d, x, observed):
        loc = LinearMean(F[None], mean_weight, mean_bias)
        mean, factor, _ = condition(x, observed, loc, LinearFactor(F[None], weight, bias), d)
        return mean[0], factor.row_norms()[0]

    expected = [conditional(F[i], d[i], x[i], observed[i]) for i in range(B)]
    monkeypatch.setattr(LinearFactor, "materialise", None)
    for a, b in zip(torch.func.vmap(conditional)(F, d, x, observed), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiled():
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()
    observed = torch.rand(N) < 0.3

    def function(F, weight, d):
        D = distribution(F, weight, bias, mean_weight, mean_bias, d)
        edited = D.condition(x, observed)
        return D.log_prob(x) - D.entropy(), D.variance, edited.loc, edited.variance, D.covariance_row(2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(F, weight, d), function(F, weight, d), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        *(gradients(lambda *t, f=f: sum(o.sin().sum() for o in f(*t)), F, weight, d) for f in (compiled, function)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()
    F, d, x = F[:2, :, :2, :2], d[:2, : 4 * CHANNELS], x[:2, : 4 * CHANNELS]
    observed = torch.arange(4 * CHANNELS) < 3
    inputs = [t.clone().requires_grad_() for t in (F, weight[:2], bias[:2], d, x)]

    def function(F, weight, bias, d, x):
        D = distribution(F, weight, bias, mean_weight, mean_bias, d)
        edited = D.condition(x, observed)
        return edited.loc, edited.variance, D.variance

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_operators_for_conditioning():
    F, weight, bias, mean_weight, mean_bias, d, x = tensors()
    W = torch.cat([weight, bias[..., None]], -1).transpose(0, 1)[:, :3]
    m = torch.cat([mean_weight, mean_bias[:, None]], -1)
    F, x, d = (
        F.flatten(2)[..., :6],
        x.unflatten(1, (CHANNELS, -1))[None, ..., :6],
        d.unflatten(1, (CHANNELS, -1))[..., :6],
    )
    for per_item, mean, precision in ((False, m, d), (True, None, d), (False, m, d[:, :1, :1])):
        weights = W.expand(B, *W.shape) if per_item else W[None]
        arguments = [t if t is None else t.clone().requires_grad_() for t in (x, None if per_item else x, F, weights)]
        arguments += [None if mean is None else mean.clone().requires_grad_(), precision.clone().requires_grad_()]
        operators, (_, _, F_, W_, _, rows) = torch.ops.lowrank_mvn, arguments
        torch.library.opcheck(operators.linear_normal_equations.default, (*arguments, "aten"))
        torch.library.opcheck(operators.linear_row_norms.default, (F_, W_))
        torch.library.opcheck(operators.linear_gram.default, (F_, W_, rows, "aten"))
        torch.library.opcheck(operators.linear_logdet.default, (F_, W_, rows, "aten"))
        with torch.no_grad():
            cotangents = [torch.randn_like(t) for t in operators.linear_normal_equations(*arguments, "aten")]
            logdet, *kept = operators.linear_logdet(F_, W_, rows, "aten")
        torch.library.opcheck(operators.linear_normal_equations_backward.default, (*cotangents, *arguments, [True] * 3))
        torch.library.opcheck(operators.linear_gram_backward.default, (cotangents[0], F_, W_, rows, [True] * 2))
        torch.library.opcheck(operators.linear_row_norms_backward.default, (F_.new_ones(B, CHANNELS, 6), F_, W_, True))
        backward = operators.linear_logdet_backward.default
        torch.library.opcheck(backward, (logdet, F_, W_, rows, *kept, [True] * 2, "aten"))
