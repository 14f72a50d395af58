"""torch.compile, export, trace and the transforms of torch.func: what works with torch's class works with ours.

`test_triton_session.py` runs it with the kernels too; with a device they are compiled (marker `gpu`).
"""

import pytest
import torch
import torch.distributions as td
from lowrank_cases import parameters
from torch.utils._pytree import tree_leaves
from triton_cases import INTERPRET

from lowrank_mvn import LowRankMultivariateNormal

B, N, R = 3, 7, 2
pytestmark = pytest.mark.usefixtures("everywhere")
# The operators are opaque to the compiler: what its C++ looks like says nothing about kernels, and takes a minute.
COMPILER = "aot_eager" if INTERPRET else "inductor"


def inputs():
    loc, P, d = parameters((B,), N, R)
    return loc, P, d, torch.randn(B, N, dtype=torch.float64)


def joint(cls, validate_args=False):
    def function(loc, P, d, x):
        D = cls(loc, P, d, validate_args=validate_args)
        return 2 * D.log_prob(x) - D.entropy()

    return function


def total(cls):
    return lambda *tensors: joint(cls)(*tensors).sum()


def leaves(tensors):
    return [t.clone().requires_grad_() for t in tensors]


def double_backward(cls, *tensors):
    tensors = leaves(tensors)
    grads = torch.autograd.grad(total(cls)(*tensors), tensors, create_graph=True)
    return torch.autograd.grad(sum((g * g.sin()).sum() for g in grads), tensors)


def triple_backward(cls, *tensors):
    tensors = leaves(tensors)
    (first,) = torch.autograd.grad(total(cls)(*tensors), tensors[1], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), tensors[2], create_graph=True)
    return torch.autograd.grad(second.square().sum(), tensors)


def traced(cls, *tensors):
    function = torch.jit.trace(joint(cls), tensors)
    shifted = leaves(t + 0.1 for t in tensors)
    value = function(*shifted)
    return value, torch.autograd.grad(value.sum(), shifted)


def compiled(cls, *tensors, **options):
    tensors = leaves(tensors)
    value = torch.compile(joint(cls), fullgraph=True, backend=COMPILER, **options)(*tensors)
    return value, torch.autograd.grad(value.sum(), tensors)


class Module(torch.nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.function = joint(cls)

    def forward(self, loc, P, d, x):
        return self.function(loc, P, d, x)


def dual(cls, *tensors):
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        return tuple(torch.autograd.forward_ad.unpack_dual(joint(cls)(*duals)))


def ones(tensors):
    return tuple(torch.ones_like(t) for t in tensors)


func = torch.func
ALL = (0, 1, 2, 3)
TRANSFORMS = {
    "grad": lambda cls, *a: func.grad(total(cls), argnums=ALL)(*a),
    "vmap": lambda cls, *a: func.vmap(joint(cls))(*a),
    "vmap-value": lambda cls, loc, P, d, x: func.vmap(joint(cls), (None, None, None, 0))(
        loc, P, d, torch.stack([x, x + 1, 2 * x])
    ),
    "vmap-loc": lambda cls, loc, P, d, x: func.vmap(joint(cls), (0, None, None, None))(
        torch.stack([loc, loc + 1]), P, d, x
    ),
    "vmap-factor": lambda cls, loc, P, d, x: func.vmap(joint(cls), (None, 1, None, None))(
        loc, torch.stack([P, 2 * P], 1), d, x
    ),
    "vmap-vmap": lambda cls, *a: func.vmap(func.vmap(joint(cls)))(*(t.expand(2, *t.shape) for t in a)),
    "vmap-grad": lambda cls, *a: func.vmap(func.grad(total(cls), argnums=ALL))(*a),
    "vmap-grad-value": lambda cls, loc, P, d, x: func.vmap(func.grad(lambda x: total(cls)(loc[0], P[0], d[0], x)))(x),
    "vmap-grad-loc": lambda cls, loc, P, d, x: func.vmap(func.grad(lambda loc: total(cls)(loc, P, d, x)))(
        torch.stack([loc, loc + 1])
    ),
    "grad-vmap": lambda cls, *a: func.grad(lambda *a: func.vmap(joint(cls))(*a).sum(), argnums=ALL)(*a),
    "jvp": lambda cls, *a: func.jvp(joint(cls), a, ones(a)),
    "dual-numbers": dual,
    "jacfwd": lambda cls, *a: func.jacfwd(joint(cls), argnums=ALL)(*a),
    "jacrev": lambda cls, *a: func.jacrev(joint(cls), argnums=ALL)(*a),
    "hessian": lambda cls, *a: func.hessian(total(cls), argnums=ALL)(*a),
    "jacrev-jacrev": lambda cls, *a: func.jacrev(func.jacrev(total(cls), argnums=(0, 1)), argnums=(2, 3))(*a),
    "jacrev-jacfwd": lambda cls, *a: func.jacrev(func.jacfwd(total(cls), argnums=1), argnums=2)(*a),
    "autograd-hessian": lambda cls, *a: torch.autograd.functional.hessian(total(cls), a),
    "double-backward": double_backward,
    "triple-backward": triple_backward,
    "export": lambda cls, *a: torch.export.export(Module(cls), a).module()(*a),
    "compile": compiled,
    "compile-dynamic": lambda cls, *a: compiled(cls, *a, dynamic=True),
    "compile-vmap-grad": lambda cls, *a: torch.compile(
        func.vmap(func.grad(total(cls), argnums=ALL)), fullgraph=True, backend=COMPILER
    )(*a),
    "compile-jvp": lambda cls, *a: torch.compile(
        lambda *a: func.jvp(joint(cls), a, ones(a)), fullgraph=True, backend=COMPILER
    )(*a),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_transform_agrees_with_torchs_class(name):
    tensors = inputs()
    expected = tree_leaves(TRANSFORMS[name](td.LowRankMultivariateNormal, *tensors))
    actual = tree_leaves(TRANSFORMS[name](LowRankMultivariateNormal, *tensors))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace_of_value_and_gradient():
    tensors = inputs()
    expected = tree_leaves(traced(td.LowRankMultivariateNormal, *tensors))
    for a, b in zip(tree_leaves(traced(LowRankMultivariateNormal, *tensors)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_default_validation_has_no_graph_break():
    tensors = inputs()
    function = torch.compile(joint(LowRankMultivariateNormal, validate_args=None), fullgraph=True, backend=COMPILER)
    torch.testing.assert_close(function(*tensors), joint(td.LowRankMultivariateNormal)(*tensors))


def test_vmap_of_rsample():
    loc, P, d, _ = inputs()

    def sample(loc, P, d):
        return LowRankMultivariateNormal(loc, P, d, validate_args=False).rsample((4,))

    y = torch.func.vmap(sample, randomness="different")(loc, P, d)
    assert y.shape == (B, 4, N)
    same = torch.func.vmap(sample, randomness="same")(*(t[:1].expand(2, *t.shape[1:]) for t in (loc, P, d)))
    torch.testing.assert_close(same[0], same[1])
    compiled = torch.compile(
        lambda *a: LowRankMultivariateNormal(*a, validate_args=False).rsample((4,)), fullgraph=True, backend=COMPILER
    )
    assert compiled(loc, P, d).shape == (4, B, N)


def test_nothing_outlives_a_transform():
    """A distribution made outside and used inside a transform keeps no tensor of it."""
    loc, P, d, x = inputs()
    D = LowRankMultivariateNormal(loc, P, d)
    mapped = torch.func.vmap(lambda x: D.log_prob(x))(x.expand(2, B, N))
    torch.testing.assert_close(D.entropy(), td.LowRankMultivariateNormal(loc, P, d).entropy())
    torch.testing.assert_close(mapped[0], D.log_prob(x))
    torch.func.grad(lambda x: D.log_prob(x).sum())(x)
    torch.func.jvp(D.log_prob, (x,), (x,))
    torch.testing.assert_close(D.log_prob(x), mapped[1])
    with torch.inference_mode():
        inferred = LowRankMultivariateNormal(loc, P, d)
        inside = inferred.log_prob(x)
    outside = inferred.log_prob(x.clone().requires_grad_())
    torch.testing.assert_close(outside, inside)
    outside.sum().backward()


OPCHECKS = {
    "float64": ("BNR", torch.float64, "pixel"),
    "transposed-float32": ("BRN", torch.float32, "pixel"),
    "scalar-d": ("BRN", torch.float64, "item"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")  # the latter torch's own
@pytest.mark.parametrize(("layout", "dtype", "diagonal"), OPCHECKS.values(), ids=list(OPCHECKS))
def test_opcheck(everywhere, layout, dtype, diagonal):
    loc, P, d = parameters((2,), 9, 3, layout, diagonal, dtype=dtype)
    x = torch.randn(4, 2, 9, dtype=dtype)
    arguments = [t.requires_grad_() for t in (x, loc[None].detach(), P.detach(), d.detach())]
    _, _, P_, d_ = arguments
    check, operators, impl = torch.library.opcheck, torch.ops.lowrank_mvn, everywhere
    check(operators.normal_equations.default, (*arguments, impl))
    check(operators.gram.default, (P_, d_, impl))
    check(operators.logdet.default, (P_, d_, impl))
    density = operators.mahalanobis_and_logdet.default
    check(density, (*arguments, None, None, None, impl))
    with torch.no_grad():
        logdet, *of_logdet = operators.logdet(P_, d_, impl)
        _, _, *kept = density(*arguments, None, None, None, impl)
    for needs in ([True] * 2, [True, False]):
        check(operators.logdet_backward.default, (logdet, P_, d_, *of_logdet, needs, impl))
    check(density, (*arguments, kept[0], logdet, kept[-1], impl))
    cotangents = torch.randn(4, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    for needs in ([True] * 4, [True, False, False, True]):
        check(operators.mahalanobis_and_logdet_backward.default, (*cotangents, *arguments, *kept, needs, impl))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("given", [True, False], ids=["given", "drawn"])
def test_opcheck_of_samples(everywhere, given):
    check, operators, impl = torch.library.opcheck, torch.ops.lowrank_mvn, everywhere
    if not given and impl != "triton":
        pytest.skip("only the kernels draw noise")
    loc, P, d = (t.requires_grad_() for t in parameters((2,), 9, 3, dtype=torch.float32))
    omega_p, omega_d = (torch.randn(4, 2, n).requires_grad_() for n in (3, 9))
    seed = torch.tensor([1, 2])
    noise = (omega_d, None) if given else (None, seed)
    check(operators.rsample.default, (loc[None].detach().requires_grad_(), P, d, omega_p, *noise, impl))
    grad_y = torch.randn(4, 2, 9, requires_grad=True)
    check(operators.rsample_backward.default, (grad_y, P, d, omega_p, *noise, [True, True, given], impl))
    if not given:
        check(operators.noise.default, (seed, 4, 9, torch.float32, impl))
