"""The kernels through the public functions: operators, derivatives, transforms, the distribution class.

Runs as `test_triton_kernels.py` does.
"""

import pytest
import torch
from triton_cases import DEVICE, ON_A_DEVICE

import lowrank_mvn
from lowrank_mvn.registry import runs_on

pytestmark = [
    *ON_A_DEVICE,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, in opcheck
]


def parameters(dtype=torch.float64, batch=(2,), N=7, R=3):
    options = {"dtype": dtype, "device": DEVICE}
    loc, P = torch.randn(*batch, N, **options), torch.randn(*batch, N, R, **options)
    return loc, P, 0.5 + torch.rand(*batch, N, **options)


def both(x, loc, P, d):
    return lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl="triton")


def drawn(loc, P, d, shape=(2,)):
    torch.manual_seed(3)
    return lowrank_mvn.rsample(loc, P, d, shape, impl="triton")


def test_gradcheck_of_a_density():
    loc, P, d = (t.requires_grad_() for t in parameters())
    x = torch.randn(2, 2, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)

    assert torch.autograd.gradcheck(both, (x, loc, P, d), fast_mode=True)


def test_gradcheck_and_second_derivative_of_a_sample():
    loc, P, d = (t.requires_grad_() for t in parameters(batch=(1,), N=3, R=2))
    noise = [torch.randn(2, 1, n, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (2, 3)]

    def sample(loc, P, d, *noise):
        return lowrank_mvn.rsample(loc, P, d, (2,), noise=noise, impl="triton")

    assert torch.autograd.gradcheck(sample, (loc, P, d, *noise))
    assert torch.autograd.gradgradcheck(sample, (loc, P, d, *noise))


def test_a_drawn_sample_is_that_of_the_formula():
    loc, P, d = (t.requires_grad_() for t in parameters())

    assert torch.autograd.gradcheck(drawn, (loc, P, d), fast_mode=True)
    again = drawn(loc, P, d)
    assert torch.equal(again, drawn(loc, P, d))
    torch.manual_seed(4)
    assert not torch.equal(again, lowrank_mvn.rsample(loc, P, d, (2,), impl="triton"))


def test_every_operator_is_checked():
    """In `test_lowrank_transforms`; `test_lowrank_linear` and `test_stencil_operators` have the others."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowrank_mvn::")}
    ours = {name for name in names if not name.startswith(("linear", "stencil"))}
    density = {"mahalanobis_and_logdet", "mahalanobis_and_logdet_backward", "logdet", "logdet_backward"}
    assert ours == density | {"gram", "normal_equations", "rsample", "rsample_backward", "noise"}


def test_second_derivatives_of_a_density():
    loc, P, d = (t.requires_grad_() for t in parameters(batch=(1,), N=4, R=2))
    x = torch.randn(2, 1, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

    assert torch.autograd.gradgradcheck(both, (x, loc, P, d), fast_mode=True)


def test_second_derivatives_of_a_drawn_sample_and_of_a_conditional():
    loc, P, d = (t.requires_grad_() for t in parameters(batch=(1,), N=4, R=2))

    assert torch.autograd.gradgradcheck(lambda *a: drawn(*a, shape=()), (loc, P, d), fast_mode=True)
    observed = torch.tensor([True, False, True, False], device=DEVICE)
    value = torch.randn(1, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def conditional(value, loc, P, d):
        # The square: the factor itself has the sign that the Cholesky decomposition gives it.
        mean, factor, diag = lowrank_mvn.condition(value, observed, loc, P, d, impl="triton")
        return mean, factor @ factor.mT, diag

    assert torch.autograd.gradcheck(conditional, (value, loc, P, d), fast_mode=True)
    assert torch.autograd.gradgradcheck(conditional, (value, loc, P, d), fast_mode=True)


FORWARD = {
    "log_prob_and_entropy": lambda impl, x, *a: lowrank_mvn.log_prob_and_entropy(x, *a, impl=impl),
    "entropy": lambda impl, x, loc, P, d: lowrank_mvn.entropy(P, d, impl=impl),
    "rsample": lambda impl, x, *a: lowrank_mvn.rsample(*a, noise=(x[..., :3], x), impl=impl),
    "condition": lambda impl, x, *a: lowrank_mvn.condition(x, x > 0, *a, impl=impl),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode(name):
    inputs = torch.randn(2, 7, dtype=torch.float64, device=DEVICE), *parameters()
    tangents = tuple(torch.randn_like(t) for t in inputs)
    ours, theirs = (
        torch.func.jvp(lambda *a, i=impl: FORWARD[name](i, *a), inputs, tangents) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, theirs)


def linear_parameters():
    F, W = (torch.randn(*s, dtype=torch.float64, device=DEVICE) for s in ((2, 4, 7), (3, 1, 4)))
    return F, W, torch.rand(2, 7, dtype=torch.float64, device=DEVICE) + 0.5


@pytest.mark.parametrize("factor", ["tensor", "linear", "masked"])
def test_forward_mode_draws_the_same_sample(factor):
    """The state of torch's generator says which, whatever is differentiated."""
    loc, P, d = parameters()
    mask = None
    if factor != "tensor":
        P, W, d = linear_parameters()
        mask = torch.arange(7, device=DEVICE).expand(2, 7) < 5 if factor == "masked" else None

    def drawn(P):
        torch.manual_seed(4)
        P = P if factor == "tensor" else lowrank_mvn.LinearFactor(P, W, mask=mask)
        return lowrank_mvn.rsample(loc, P, d, (3,), impl="triton")

    sample, tangent = torch.func.jvp(drawn, (P,), (torch.ones_like(P),))
    torch.testing.assert_close(sample, drawn(P))
    step = 1e-4
    torch.testing.assert_close(tangent, (drawn(P + step) - drawn(P - step)) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", ["triton", "aten", "reference"])
def test_samples_have_the_precision_of_their_dtype(impl):
    """Half precision of the mean alone, which autocast gives, does not round a float32 sample."""
    loc, P, d = parameters(torch.float32)
    loc, noise = loc.bfloat16(), (torch.randn(2, 3, device=DEVICE), torch.randn(2, 7, device=DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = lowrank_mvn.rsample(loc, P, d, noise=noise, impl=impl)
    exact = loc.double() + (P.double() @ noise[0].double().unsqueeze(-1)).squeeze(-1) + d.double().sqrt() * noise[1]
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_autocast_leaves_the_precision_alone():
    """Half precision beside a float32 diagonal, forward and backward inside: the same numbers, the same dtypes."""
    loc, P, d = parameters(torch.bfloat16)
    leaves = [t.requires_grad_() for t in (torch.randn(2, 7, device=DEVICE).bfloat16(), loc, P, d.detach().float())]

    def step(x, loc, P, d):
        log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl="triton")
        y = lowrank_mvn.rsample(loc, P, d, noise=(x[..., :3], x), impl="triton")
        loss = log_prob.sum() + entropy.sum() + y.float().square().sum()
        return log_prob, entropy, y, *torch.autograd.grad(loss, (x, loc, P, d))

    expected = step(*leaves)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = step(*leaves)
    half, single = torch.bfloat16, torch.float32
    assert [t.dtype for t in found] == [single, single, half, half, half, half, single]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_vmap_over_samples_and_parameters():
    loc, P, d = parameters(batch=(3,))
    x = torch.randn(3, 7, dtype=torch.float64, device=DEVICE)

    def density(x, loc, P, d):
        return lowrank_mvn.log_prob(x, loc, P, d, impl="triton")

    mapped = torch.func.vmap(density)(x, loc, P, d)
    torch.testing.assert_close(mapped, density(x, loc, P, d))
    noise = torch.randn(3, 3, dtype=torch.float64, device=DEVICE), torch.randn_like(x)

    def sample(loc, P, d, *noise):
        return lowrank_mvn.rsample(loc, P, d, noise=noise, impl="triton")

    torch.testing.assert_close(torch.func.vmap(sample)(loc, P, d, *noise), sample(loc, P, d, *noise))
    drawn = torch.func.vmap(lambda loc, P, d: lowrank_mvn.rsample(loc, P, d, impl="triton"), randomness="different")(
        loc, P, d
    )
    assert drawn.shape == (3, 7)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_vmap_over_gradients_of_samples(given):
    loc, P, d = parameters(batch=(3,))
    noise = torch.randn(3, 3, dtype=loc.dtype, device=DEVICE), torch.randn_like(loc)

    def total(loc, P, d, *noise):
        torch.manual_seed(3)
        return lowrank_mvn.rsample(loc, P, d, noise=noise if given else None, impl="triton").square().sum()

    grad = torch.func.grad(total, argnums=(0, 1, 2))
    mapped = torch.func.vmap(grad, randomness="same")(loc, P, d, *noise)
    for ours, theirs in zip(mapped, zip(*map(grad, loc, P, d, *noise), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_vmap_over_conditionals():
    loc, P, d = parameters(batch=(3,))
    value = torch.randn_like(loc)

    def mean(value, loc, P, d):
        return lowrank_mvn.condition(value, value > 0, loc, P, d, impl="triton").loc

    torch.testing.assert_close(torch.func.vmap(mean)(value, loc, P, d), mean(value, loc, P, d))


def test_condition_agrees_with_aten():
    loc, P, d = parameters()
    observed = torch.tensor([True, False, True, True, False, False, True], device=DEVICE)
    value = torch.randn_like(loc)
    ours, theirs = (lowrank_mvn.condition(value, observed, loc, P, d, impl=i) for i in ("triton", "aten"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_an_impossible_choice_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, P, d = (t.cpu() for t in parameters())
    with pytest.raises(ValueError, match=r"'triton' is not available for tensors on cpu.*'aten',.* 'reference'"):
        lowrank_mvn.entropy(P, d, impl="triton")
    assert runs_on("triton", torch.device("cuda"))
