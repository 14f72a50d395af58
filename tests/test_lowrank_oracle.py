"""`lowrank_mvn` against float64 oracles: torch's class on the same inputs, and dense linear algebra."""

import math

import pytest
import torch
import torch.distributions as td
from lowrank_cases import SHAPE_IDS, SHAPES, draw, gradients, loss, oracle, parameters, relative

import lowrank_mvn
from lowrank_mvn import LowRankMultivariateNormal, capacitance
from lowrank_mvn.factors.dense import cpu
from lowrank_mvn.factors.dense.aten import residual

NAMES = ("loc", "cov_factor", "cov_diag", "value")


@pytest.fixture(params=["compiled", "at-once", "in-blocks"])
def way(request, monkeypatch):
    if request.param != "compiled":
        request.getfixturevalue("in_torch")
    if request.param == "in-blocks":
        monkeypatch.setattr(residual, "AT_ONCE_VALUES", 0)


# By default, and in torch's operators: there a small factor takes another way than an image's.
both_ways = pytest.mark.usefixtures("way")


WAYS = [("compiled", "cpu"), ("at-once", "aten"), ("in-blocks", "aten"), ("compiled", "reference")]


@pytest.mark.parametrize(("id", "batch", "N", "R", "layout", "diagonal"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize(("way", "impl"), WAYS, indirect=["way"])
def test_float64_agrees_to_rounding(way, impl, id, batch, N, R, layout, diagonal):
    loc, P, d = parameters(batch, N, R, layout, diagonal)
    x = draw(loc, P, d, samples=(2,))
    log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl=impl)
    expected = oracle(loc, P, d)
    torch.testing.assert_close(
        log_prob, expected.log_prob(x) if batch != (0,) else x.new_empty(2, 0), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(entropy, expected.entropy() if batch != (0,) else x.new_empty(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lowrank_mvn.log_prob(x, loc, P, d, impl=impl), log_prob, rtol=0, atol=0)
    torch.testing.assert_close(lowrank_mvn.entropy(P, d, impl=impl).expand_as(entropy), entropy, rtol=1e-13, atol=1e-13)


def _oracle_without_empty():
    return [shape for shape in SHAPES if shape[0] != "empty-batch"]


@both_ways
@pytest.mark.parametrize(("id", "batch", "N", "R", "layout", "diagonal"), _oracle_without_empty())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_gradient_by_name(dtype, id, batch, N, R, layout, diagonal):
    loc, P, d = parameters(batch, N, R, layout, diagonal, dtype=dtype)
    x = draw(loc, P, d, samples=(2,))
    ours = gradients(lambda *a: loss(LowRankMultivariateNormal(*a[:3]), a[3]), loc, P, d, x)
    theirs = gradients(lambda *a: loss(oracle(*a[:3]), a[3]), *(t.double() for t in (loc, P, d, x)))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert a.dtype == dtype
        assert a.shape == b.shape, name
        assert relative(a, b) < tolerance, name


@both_ways
@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_well_conditioned_float32_agrees_to_1e_6(layout):
    loc, P, d = parameters((3,), 2000, 25, layout, dtype=torch.float32)
    x = draw(loc, P, d)
    D, expected = LowRankMultivariateNormal(loc, P, d), oracle(loc, P, d)
    torch.testing.assert_close(D.log_prob(x).double(), expected.log_prob(x.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(D.entropy().double(), expected.entropy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["cpu", "aten", "reference"])
def test_dense_covariance(impl):
    loc, P, d = parameters((2,), 11, 3)
    x = draw(loc, P, d)
    dense = td.MultivariateNormal(loc, P @ P.mT + torch.diag_embed(d))
    log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl=impl)
    torch.testing.assert_close(log_prob, dense.log_prob(x))
    torch.testing.assert_close(entropy, dense.entropy())


@both_ways
@pytest.mark.parametrize("d", [1e-8, 1e-5, 1.0, 1e6])
def test_tiny_and_huge_diagonals_in_float32(d):
    loc, P, diag = parameters((2,), 500, 10, dtype=torch.float32, d=d)
    x = draw(loc, P, diag)
    expected = oracle(loc, P, diag).log_prob(x.double())
    log_prob = LowRankMultivariateNormal(loc, P, diag).log_prob(x).double()
    # The residual is what is left of values of size 1 (rounding 1e-7) at a scale of √d, in 500 squares.
    tolerance = 1e-6 * expected.abs() + 500 * (1e-7 / math.sqrt(d)) * 4
    assert (log_prob - expected).abs().le(tolerance).all()


CASES = [
    # (id, columns nearly equal but for this share, log p in nats, gradient relative)
    ("independent", None, 0.05, 1e-4),
    ("collinear-1e-2", 1e-2, 0.05, 1e-4),
    ("collinear-1e-4", 1e-4, 1.0, 1e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("id", "share", "nats", "gradient"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_exact_at_the_size_of_the_paper(id, share, nats, gradient, layout):
    """N = 218·178·3, R = 25, d = 1e-5: where torch's class in float32 is off by tens of thousands of nats."""
    N, R, d = 116_412, 25, 1e-5
    P = torch.randn(1, N, R) * 0.2
    if share is not None:
        P[..., 1:] = P[..., :1] + share * P[..., 1:]
    P = P.mT.contiguous().mT if layout == "BRN" else P
    loc, diag = torch.rand(1, N), torch.full((1, N), d)
    x = draw(loc, P, diag)

    def loss(cls):
        return lambda loc, P, diag: (
            -cls(loc, P, diag, validate_args=False).log_prob(x.to(loc.dtype)).sum()
            + (cls(loc, P, diag, validate_args=False).entropy().sum())
        )

    expected = oracle(loc, P, diag).log_prob(x.double())
    log_prob = LowRankMultivariateNormal(loc, P, diag).log_prob(x).double()
    assert (log_prob - expected).abs().item() < nats
    exact = gradients(loss(td.LowRankMultivariateNormal), *(t.double() for t in (loc, P, diag)))
    ours = [
        relative(a, b) for a, b in zip(gradients(loss(LowRankMultivariateNormal), loc, P, diag), exact, strict=True)
    ]
    assert max(ours) < gradient
    try:
        torchs = gradients(loss(td.LowRankMultivariateNormal), loc, P, diag)
    except torch.linalg.LinAlgError:
        assert share == 1e-4
        return
    for name, error, grad, truth in zip(NAMES, ours, torchs, exact, strict=False):
        assert error < relative(grad, truth) / 20, name


@both_ways
@pytest.mark.parametrize("bad", ["cov_factor", "loc", "cov_diag", "value"])
def test_a_non_finite_item_spoils_only_itself(bad):
    loc, P, d = parameters((3,), 40, 5, dtype=torch.float32)
    x = draw(loc, P, d)
    clean = lowrank_mvn.log_prob_and_entropy(x, loc, P, d)
    {"cov_factor": P, "loc": loc, "cov_diag": d, "value": x}[bad][1, 3] = float("nan")
    leaves = [t.clone().requires_grad_() for t in (x, loc, P, d)]
    log_prob, entropy = lowrank_mvn.log_prob_and_entropy(*leaves)
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob[1].isnan()
    assert entropy[1].isnan() == (bad in ("cov_factor", "cov_diag"))
    torch.testing.assert_close(log_prob[[0, 2]], clean[0][[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(entropy[[0, 2]], clean[1][[0, 2]], rtol=0, atol=0)
    assert all(leaf.grad[[0, 2]].isfinite().all() for leaf in leaves)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_half_precision_is_computed_in_float32(dtype, layout):
    loc, P, d = parameters((2,), 300, 6, layout, dtype=dtype)
    x = draw(loc, P, d)
    D, expected = LowRankMultivariateNormal(loc, P, d), oracle(loc, P, d)
    assert D.log_prob(x).dtype == D.entropy().dtype == torch.float32
    torch.testing.assert_close(D.log_prob(x).double(), expected.log_prob(x.double()), rtol=1e-6, atol=0)
    ours = gradients(lambda *a: loss(LowRankMultivariateNormal(*a[:3]), a[3]), loc, P, d, x)
    theirs = gradients(lambda *a: loss(oracle(*a[:3]), a[3]), *(t.double() for t in (loc, P, d, x)))
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < 2 * torch.finfo(dtype).eps, name
    # A number, or a diagonal in float32, is not rounded to half precision.
    exact = oracle(loc, P, torch.full((2, 300), 1e-5, dtype=torch.float32)).entropy()
    for diag in (1e-5, torch.tensor(1e-5), torch.full((2, 300), 1e-5)):
        torch.testing.assert_close(lowrank_mvn.entropy(P, diag).double(), exact, rtol=1e-6, atol=0)
    assert D.sample((3,)).dtype == dtype
    assert D.precision_matrix.dtype == D.scale_tril.dtype == torch.float32


def test_autocast_leaves_the_precision_alone():
    loc, P, d = parameters((2,), 300, 6, dtype=torch.float32)
    x = draw(loc, P, d)
    expected = LowRankMultivariateNormal(loc, P, d).log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        D = LowRankMultivariateNormal(loc, P, d)
        torch.testing.assert_close(D.log_prob(x), expected, rtol=0, atol=0)
        assert D._capacitance_tril.dtype == torch.float32
        mixed = LowRankMultivariateNormal(loc.bfloat16(), P, d).log_prob(x.bfloat16())
        assert mixed.dtype == torch.float32
        conditional = D.condition(x, torch.arange(300) < 100)
    torch.testing.assert_close(conditional.loc, D.condition(x, torch.arange(300) < 100).loc, rtol=0, atol=0)


@both_ways
def test_gradcheck():
    loc, P, d = (t.requires_grad_() for t in parameters((2,), 7, 3))
    x = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True)

    def joint(x, loc, P, d):
        return lowrank_mvn.log_prob_and_entropy(x, loc, P, d)

    assert torch.autograd.gradcheck(joint, (x, loc, P, d))
    assert torch.autograd.gradgradcheck(joint, (x, loc, P, d))
    scalar = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(joint, (x, loc, P, scalar))
    assert torch.autograd.gradcheck(lowrank_mvn.entropy, (P, d))
    noise = (torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 7, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *a: lowrank_mvn.rsample(*a, (4,), noise=noise), (loc, P, d))
    observed = torch.tensor([True, False, False, True, False, False, True])
    assert torch.autograd.gradcheck(
        lambda x, loc, P, d: lowrank_mvn.condition(x, observed, loc, P, d), (x[0], loc, P, d)
    )


BROADCASTS = [
    ("shared-P", (4, 3, 9), (3, 9), (9, 2), (3, 9)),
    ("shared-P-and-d", (3, 9), (3, 9), (9, 2), (9,)),
    ("shared-d", (3, 9), (9,), (3, 9, 2), (9,)),
    ("loc-per-sample", (5, 1, 9), (5, 3, 9), (3, 9, 2), (3, 9)),
    ("crossed", (9,), (1, 3, 9), (2, 1, 9, 2), (1, 1, 9)),
    ("crossed-P-d", (6, 1, 1, 9), (9,), (2, 1, 9, 2), (3, 9)),
    ("value-shared", (9,), (3, 9), (3, 9, 2), (3, 1)),
]


@both_ways
@pytest.mark.parametrize(("id", "value", "loc", "P", "d"), BROADCASTS, ids=[case[0] for case in BROADCASTS])
def test_broadcasting(id, value, loc, P, d):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in (loc, P)]
    tensors += [torch.rand(d, dtype=torch.float64) + 0.5, torch.randn(value, dtype=torch.float64)]
    ours = gradients(lambda *a: loss(LowRankMultivariateNormal(*a[:3]), a[3]), *tensors)
    theirs = gradients(lambda *a: loss(oracle(*a[:3]), a[3]), *tensors)
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    D = LowRankMultivariateNormal(*tensors[:3])
    assert D.log_prob(tensors[3]).shape == oracle(*tensors[:3]).log_prob(tensors[3]).shape
    noise = torch.randn(4, *D.batch_shape, 2, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    expected = tensors[0] + (tensors[1] @ noise[0].unsqueeze(-1))[..., 0]
    torch.testing.assert_close(D.rsample((4,), noise=noise), expected)


def test_one_capacitance_serves_every_call(monkeypatch):
    calls = []
    original = capacitance.factorise
    monkeypatch.setattr(capacitance, "factorise", lambda *a, **k: calls.append(1) or original(*a, **k))
    forward, given = cpu._forward, 28
    monkeypatch.setattr(cpu, "_forward", lambda *a: (None if a[given] else calls.append(1)) or forward(*a))
    loc, P, d = parameters((2,), 50, 3)
    D = LowRankMultivariateNormal(loc, P.requires_grad_(), d)
    x = draw(loc, P, d).detach()
    first, second = D.log_prob(x), D.log_prob(x + 1)
    entropy, expanded = D.entropy(), D.expand((5, 2)).log_prob(x)
    assert len(calls) == 1
    expected = oracle(loc, P, d)
    torch.testing.assert_close(second, expected.log_prob(x + 1))
    torch.testing.assert_close(expanded, expected.expand((5, 2)).log_prob(x))
    with torch.no_grad():
        assert not D.entropy().requires_grad
    # One joint node: the entropy hangs on the node of the last log-density.
    nodes = set()

    def walk(node):
        if node is not None:
            nodes.add(node)
            for following, _ in node.next_functions:
                walk(following)

    walk(entropy.grad_fn)
    walk(second.grad_fn)
    assert sum("mahalanobis" in type(node).__name__ for node in nodes) == 1
    assert first.requires_grad


def test_memory_of_backward_is_the_gradient():
    """No autograd node keeps anything of the size of P but P itself."""
    loc, P, d = parameters((2,), 4000, 25, dtype=torch.float32)
    P.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LowRankMultivariateNormal(loc, P, d, validate_args=False).log_prob(loc)
    large = [t for t in kept if t.numel() >= P.numel()]
    assert all(t.data_ptr() == P.data_ptr() for t in large)
    (grad,) = gradients(lambda P: LowRankMultivariateNormal(loc, P, d).log_prob(loc).sum(), P.mT.contiguous().mT)
    assert grad.stride() == P.mT.contiguous().mT.stride(), "the gradient has the layout of P"
