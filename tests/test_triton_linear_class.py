"""A linear factor through the public functions, its kernels beneath; `test_triton_linear.py` has the kernels alone.

Runs as `test_triton_kernels.py` does.
"""

import linear_cases
import pytest
import torch
from lowrank_cases import BF16, F32, F64, relative
from test_triton_linear import inputs
from triton_cases import DEVICE, INTERPRET, MARKS, name

import lowrank_mvn
from lowrank_mvn import LinearFactor, LinearMean, LowRankMultivariateNormal
from lowrank_mvn.factors.dense import triton as dense

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # torch's own, in opcheck


def tensors(dtype=F64, B=2, K=5, R=4, channels=3, spatial=(3, 3), diagonal="pixel", last=False):
    """Two values, and one d for all pixels unless each has its own."""
    diagonal, sizes = "pixel" if diagonal == "pixel" else "scalar", (B, K, R, channels, spatial)
    return linear_cases.tensors(dtype, (), last, 1.0, diagonal, (2,), sizes, DEVICE)


def joint(F, weight, bias, mean_weight, mean_bias, d, x, impl="triton"):
    """log p and H of both made of the features."""
    loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
    return lowrank_mvn.log_prob_and_entropy(x, loc, factor, d, impl=impl)


@pytest.mark.parametrize(("diagonal", "last"), [("pixel", False), ("item", True)])
def test_the_class_and_every_gradient(diagonal, last):
    """The functions of the class choose "triton" for a device that it runs on; here it is asked for."""
    args = tensors(F32, diagonal=diagonal, last=last)

    def loss(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in args]
        log_prob, entropy = joint(*leaves, impl)
        total = log_prob.sum() - 0.7 * entropy.sum()
        return total, torch.autograd.grad(total, leaves)

    ours, expected = loss("triton", F32), loss("aten", F64)
    assert relative(ours[0], expected[0]) < 1e-6
    for a, b in zip(ours[1], expected[1], strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 5e-6
    if not INTERPRET:
        assert lowrank_mvn.functional.check_impl(None, LinearFactor(*args[:3])) == "triton"
    distribution = LowRankMultivariateNormal(LinearMean(args[0], *args[3:5]), LinearFactor(*args[:3]), args[5])
    torch.testing.assert_close(
        lowrank_mvn.entropy(LinearFactor(*args[:3]), args[5], impl="triton"), distribution.entropy()
    )


@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_gradcheck(linear_kernels, diagonal):
    args = [t.requires_grad_() for t in tensors(B=1, K=2, R=2, channels=2, spatial=(2, 1), diagonal=diagonal)]
    assert torch.autograd.gradcheck(joint, args, fast_mode=True)


SAMPLES = [
    # dtype, S, B, K, R, channels, spatial, diagonal, channels last
    (F32, 1, 1, 1, 1, 1, (1, 1), "pixel", False, 3e-7),
    (F32, 3, 2, 16, 4, 3, (7, 9), "pixel", True, 3e-7),
    (F32, 2, 2, 33, 4, 2, (8, 8), "item", False, 3e-7),
    (F32, 1, 1, 130, 4, 1, (4, 5), "pixel", False, 1e-6),
    (F64, 2, 1, 5, 4, 3, (3, 3), "item", True, 1e-13),
    (BF16, 2, 1, 16, 4, 3, (4, 5), "pixel", False, 8e-3),
]


@pytest.mark.parametrize("joined", [True, False], ids=["linear-mean", "loc"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
@pytest.mark.parametrize("case", SAMPLES, ids=name)
def test_samples_and_gradients(case, given, joined):
    """Given noise against the formula; drawn noise against the sample that the kernel for a dense factor draws."""
    dtype, S, B, K, R, channels, spatial, diagonal, last, tolerance = case
    F, weight, bias, mean_weight, mean_bias, d, _ = tensors(F64, B, K, R, channels, spatial, diagonal, last)
    weight = weight / K**0.5
    args = [t.to(dtype) for t in (F, weight, bias, mean_weight / K**0.5, mean_bias, d)]
    N = channels * spatial[0] * spatial[1]
    noise = [torch.randn(S, B, n, device=DEVICE).to(dtype) for n in (R, N)] if given else None
    grad_y = torch.randn(S, B, N, device=DEVICE).to(dtype)

    def sampled(exact):
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in args]
        F, weight, bias, mean_weight, mean_bias, d = leaves
        loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        loc = loc if joined and not exact else loc.materialise()
        factor = factor.materialise() if exact else factor
        torch.manual_seed(5)
        drawn = noise and [t.to(loc.dtype) for t in noise]
        if exact and not given:  # ω_p as it was drawn, and ω_d from the same seed
            omega_p = torch.randn(S, B, R, dtype=dtype, device=DEVICE)
            seed = torch.randint(2**62, (B,), device=DEVICE)
            drawn = [omega_p.double(), dense.noise(seed, S, N, F32).double()]
        if exact:
            y = lowrank_mvn.rsample(loc, factor, d, (S,), noise=tuple(drawn), impl="aten")
        else:
            y = lowrank_mvn.rsample(loc, factor, d, (S,), noise=drawn and tuple(drawn), impl="triton")
        return y, torch.autograd.grad(y, leaves, grad_y.to(y.dtype))

    (ours, grads), (expected, expected_grads) = sampled(False), sampled(True)
    assert ours.dtype == dtype
    assert relative(ours, expected) < tolerance
    for what, a, b in zip(("F", "weight", "bias", "mean weight", "mean bias", "d"), grads, expected_grads, strict=True):
        assert a.shape == b.shape, what
        assert relative(a, b) < 4 * tolerance, what


def test_second_derivative_of_a_sample():
    F, weight, bias, mean_weight, mean_bias, d, _ = tensors(B=1, K=2, R=2, channels=2, spatial=(1, 2))
    noise = [torch.randn(2, 1, n, dtype=F64, device=DEVICE) for n in (2, 4)]

    def sample(F, weight, bias, mean_weight, d, *noise):
        loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        return lowrank_mvn.rsample(loc, factor, d, (2,), noise=noise, impl="triton")

    args = [t.requires_grad_() for t in (F, weight, bias, mean_weight, d, *noise)]
    assert torch.autograd.gradgradcheck(sample, args, fast_mode=True)


def test_second_derivatives_of_a_density(linear_kernels):
    """By way of P, in torch's operators, whichever way the first ones are made."""
    args = [t.requires_grad_() for t in tensors(B=1, K=2, R=2, channels=2, spatial=(2, 1))]
    assert torch.autograd.gradgradcheck(joint, args, fast_mode=True)


def test_vmap_of_a_density_and_its_gradient(linear_kernels):
    """Over items, with their own weights or one; and over values alone."""
    F, weight, bias, _, _, d, x = tensors()

    def loss(F, weight, d, x):
        factor = LinearFactor(F[None], weight, bias)
        log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, torch.zeros_like(x), factor, d, impl="triton")
        return (log_prob.sin() + entropy).squeeze(0)

    weights_of_items = torch.stack([weight, 2 * weight])
    cases = [
        ((0, None, 0, 0), (F, weight, d, x[0])),
        ((0, 0, None, 0), (F, weights_of_items, d[0], x[0])),
        ((None, None, None, 0), (F[0], weight, d[0], x[0])),
    ]
    gradient = torch.func.grad_and_value(loss, argnums=(0, 1, 2, 3))
    for dims, args in cases:
        grads, values = torch.func.vmap(gradient, dims)(*args)
        for i in range(2):
            item = [t if dim is None else t[i] for t, dim in zip(args, dims, strict=True)]
            expected, value = gradient(*item)
            torch.testing.assert_close(values[i], value)
            for ours, theirs in zip(grads, expected, strict=True):
                torch.testing.assert_close(ours[i], theirs)


def test_autocast_leaves_the_precision_alone(linear_kernels):
    """Features and values of half precision, weights and diagonal in float32, as under autocast."""
    F, *rest, x = tensors(F32)
    leaves = [t.requires_grad_() for t in (F.bfloat16(), *rest, x.bfloat16())]

    def step(*leaves):
        log_prob, entropy = joint(*leaves)
        return log_prob, entropy, *torch.autograd.grad(log_prob.sum() + entropy.sum(), leaves)

    expected = step(*leaves)
    with torch.autocast(DEVICE, BF16):
        found = step(*leaves)
    assert [t.dtype for t in found] == [F32, F32, BF16, *[F32] * 5, BF16]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_opcheck(linear_kernels):
    x, loc, F, W, m, d = inputs(F32, 1, 2, 3, 2, 2, 5, "BKM", "pixel", True, True, False)
    operators = torch.ops.lowrank_mvn
    leaves = [t.requires_grad_() for t in (x, loc, F, W, m, d)]
    torch.library.opcheck(operators.linear_mahalanobis_and_logdet.default, (*leaves, "triton"))
    with torch.no_grad():
        q, logdet, *kept = operators.linear_mahalanobis_and_logdet(*leaves, "triton")
    torch.library.opcheck(
        operators.linear_mahalanobis_and_logdet_backward.default,
        (q, logdet, *leaves, *kept, [True] * 3, "triton"),
    )
    factor = F, W, d
    torch.library.opcheck(operators.linear_gram.default, (*factor, "triton"))
    torch.library.opcheck(operators.linear_normal_equations.default, (*leaves, "triton"))
    torch.library.opcheck(operators.linear_logdet.default, (*factor, "triton"))
    with torch.no_grad():
        logdet, *kept = operators.linear_logdet(*factor, "triton")
    torch.library.opcheck(operators.linear_logdet_backward.default, (logdet, *factor, *kept, [True, True], "triton"))
    u, seed = torch.randn(2, 2, 2, 4, device=DEVICE, requires_grad=True), torch.tensor([1, 2], device=DEVICE)
    for shift, noise, drawn in ((loc, None, seed), (None, torch.randn(2, 2, 2, 5, device=DEVICE), None)):
        arguments = (shift, F, u, d, noise, drawn, "triton")
        torch.library.opcheck(operators.linear_rsample.default, arguments)


def test_compiled_without_a_graph_break(linear_kernels):
    F, weight, bias, mean_weight, mean_bias, d, x = tensors(F32)

    def loss(F, weight):
        loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, factor, d, impl="triton")
        return log_prob.sum() + entropy.sum() + lowrank_mvn.rsample(loc, factor, d, (2,), impl="triton").sum()

    leaves = [F.requires_grad_(), weight.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.manual_seed(0)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_a_transform_samples_are_torch_operators():
    F, weight, bias, mean_weight, mean_bias, d, _ = tensors()
    noise = torch.randn(3, 2, 4, dtype=F64, device=DEVICE), torch.randn(3, 2, 27, dtype=F64, device=DEVICE)

    def sample(omega_p, omega_d):
        loc, factor = LinearMean(F, mean_weight, mean_bias), LinearFactor(F, weight, bias)
        return lowrank_mvn.rsample(loc, factor, d, noise=(omega_p, omega_d), impl="triton")

    mapped = torch.func.vmap(sample)(*noise)
    torch.testing.assert_close(mapped, torch.stack([sample(*pair) for pair in zip(*noise, strict=True)]))
