"""The kernels through the public functions: operators, derivatives, transforms, the distribution class.

Runs as `test_triton_kernels.py` does.
"""

import os

import pytest
import torch

import lowrank_mvn
from lowrank_mvn import ops, ops_rsample

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [
    *([] if INTERPRET else [pytest.mark.gpu]),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, in opcheck
]


def parameters(dtype=torch.float64, batch=(2,), N=7, R=3):
    options = {"dtype": dtype, "device": DEVICE}
    loc, P = torch.randn(*batch, N, **options), torch.randn(*batch, N, R, **options)
    return loc, P, 0.5 + torch.rand(*batch, N, **options)


def test_gradcheck_of_a_density():
    loc, P, d = (t.requires_grad_() for t in parameters())
    x = torch.randn(2, 2, 7, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def both(x, loc, P, d):
        return lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl="triton")

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

    def drawn(loc, P, d):
        torch.manual_seed(3)
        return lowrank_mvn.rsample(loc, P, d, (2,), impl="triton")

    assert torch.autograd.gradcheck(drawn, (loc, P, d), fast_mode=True)
    again = drawn(loc, P, d)
    assert torch.equal(again, drawn(loc, P, d))
    torch.manual_seed(4)
    assert not torch.equal(again, lowrank_mvn.rsample(loc, P, d, (2,), impl="triton"))


def test_opcheck():
    loc, P, d = parameters(torch.float32)
    x = torch.randn(2, 2, 7, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operators = torch.ops.lowrank_mvn
    leaves = [t.requires_grad_() for t in (x, loc[None], P, d)]
    torch.library.opcheck(
        operators.mahalanobis_and_logdet.default, (*leaves, None, None, None, "triton"), test_utils=checks
    )
    torch.library.opcheck(operators.gram.default, (*leaves, "triton"), test_utils=checks)
    omega_p, seed = torch.randn(2, 2, 3, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    arguments = (*leaves[1:], omega_p, None, seed, "triton")
    torch.library.opcheck(operators.rsample.default, arguments, test_utils=checks)


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


def test_condition_agrees_with_aten():
    loc, P, d = parameters()
    observed = torch.tensor([True, False, True, True, False, False, True], device=DEVICE)
    value = torch.randn_like(loc)
    ours, theirs = (lowrank_mvn.condition(value, observed, loc, P, d, impl=i) for i in ("triton", "aten"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_without_a_graph_break():
    loc, P, d = (t.requires_grad_() for t in parameters(torch.float32))
    x = torch.randn(2, 7, device=DEVICE)

    def loss(x, loc, P, d):
        log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl="triton")
        return log_prob.sum() + entropy.sum() + lowrank_mvn.rsample(loc, P, d, (2,), impl="triton").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = torch.autograd.grad(loss(x, loc, P, d), (loc, P, d))
    torch.manual_seed(0)
    for ours, theirs in zip(torch.autograd.grad(compiled(x, loc, P, d), (loc, P, d)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_impossible_choice_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _, P, d = (t.cpu() for t in parameters())
    with pytest.raises(ValueError, match=r"'triton' is not available for tensors on cpu.*'aten', 'reference'"):
        lowrank_mvn.entropy(P, d, impl="triton")
    assert ops.runs_on("triton", torch.device("cuda"))
    assert callable(ops_rsample.rsample)
