"""The operators of a stencil: precision, derivatives, transforms.

`test_triton_session.py` runs it a second time with the kernels in Triton's interpreter; with a device they are compiled
(marker `gpu`).
"""

import pytest
import torch
from lowrank_cases import gradients, relative
from stencil_cases import COLOUR, F64, GREY, distribution, make, of_parts, parts

from lowrank_mvn import Stencil, StencilMultivariateNormal

OPERATORS = torch.ops.lowrank_mvn

pytestmark = [
    pytest.mark.usefixtures("everywhere"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def impl(everywhere):
    return everywhere


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
