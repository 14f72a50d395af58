"""A distribution computes with what its parameters are now: whatever changed them, and whatever it was asked before.

Everything is compared with a new object over the same parameters.
"""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from state_cases import ASKED, CALLS, KINDS, B, N, R, dense, leaf, same
from torch import nn
from torch.utils import checkpoint

from lowrank_mvn import LowRankMultivariateNormal, Stencil, StencilMultivariateNormal

VIEWS = {"transposed": {"P", "d"}, "views": {"flat"}, "convolution": {"weight", "bias"}, "linear-mean": {"mean_weight"}}
NAMES = [(kind, name) for kind, make in KINDS.items() for name in make()[0]]


# --- How it changes -------------------------------------------------------------------------------------------------


def no_grad(change):
    def changed(t):
        with torch.no_grad():
            change(t)

    return changed


def step(optimiser, **options):
    def changed(t):
        t.grad = torch.full_like(t, 1e-3)
        optimiser([t], **options).step()
        t.grad = None

    return changed


class Written(torch.optim.Optimizer):
    """As optimisers outside of torch write."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.5)


CHANGES = {
    "mul_": no_grad(lambda t: t.mul_(1.5)),
    "one-value": no_grad(lambda t: t.view(-1)[-1].add_(1)),
    "of-a-view": no_grad(lambda t: t.detach().view(-1)[1:].mul_(2)),
    "copy_": no_grad(lambda t: t.copy_(2 * t)),
    "inference": lambda t: torch.inference_mode()(lambda: t.mul_(1.5))(),
    "data.mul_": lambda t: t.data.mul_(1.5),
    "data=": lambda t: setattr(t, "data", 1.5 * t.data),
    "set_": no_grad(lambda t: t.set_(1.5 * t)),
    "storage": lambda t: t.untyped_storage().copy_((1.5 * t).untyped_storage()),
    "numpy": lambda t: t.detach().numpy().__imul__(1.5),
    "vector_to_parameters": lambda t: nn.utils.vector_to_parameters(1.5 * t.detach().flatten(), [t]),
    "sgd": step(torch.optim.SGD, lr=100.0),
    "sgd-fused": step(torch.optim.SGD, lr=100.0, fused=True),
    "adam": step(torch.optim.Adam, lr=0.1),
    "adam-fused": step(torch.optim.Adam, lr=0.1, fused=True),
    "adamw-foreach": step(torch.optim.AdamW, lr=0.1, foreach=True),
    "adagrad-fused": step(torch.optim.Adagrad, lr=0.1, fused=True),
    "another": step(Written, defaults={}),
}

REPLACING = {"data=", "set_", "vector_to_parameters"}


@pytest.mark.parametrize("case", range(len(NAMES)), ids=["-".join(pair) for pair in NAMES])
def test_every_change_of_every_parameter_is_noticed(case):
    """Whatever was asked before: every thirteenth pair of a change and a call, others for the next parameter."""
    (kind, name), asked = NAMES[case], itertools.cycle(ASKED)
    x = torch.randn(B, N, dtype=torch.float64)
    pairs = itertools.product(enumerate(CHANGES.items()), enumerate(CALLS.values()))
    for (i, (how, change)), (j, call) in pairs:
        # What replaces a tensor's memory does not reach the views of it that a distribution was made of.
        if (i + j + case) % 13 or (how in REPLACING and name in VIEWS.get(kind, ())):
            continue
        leaves, arguments = KINDS[kind]()
        p = LowRankMultivariateNormal(*arguments())
        call(p, x)
        before = leaves[name].detach().clone()
        change(leaves[name])
        assert before.numel() == 1 or not torch.equal(before, leaves[name]), how
        same(p, arguments, x, leaves, next(asked), more=not j % 4)


# --- Graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_calls_and_backward_passes(kind):
    """Two losses with a backward pass each, twice; in each order of making and differentiating them."""
    x = torch.randn(B, N, dtype=torch.float64)
    losses = {"log_prob": lambda p: p.log_prob(x).sum(), "entropy": lambda p: p.entropy().sum()}
    for first, second in itertools.permutations(losses):
        leaves, arguments = KINDS[kind]()
        p, tensors = LowRankMultivariateNormal(*arguments()), list(leaves.values())

        def gradients(loss, tensors=tensors, **options):
            return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True, **options)

        expected = {n: gradients(f(LowRankMultivariateNormal(*arguments()))) for n, f in losses.items()}
        for _ in range(2):
            for retained, end in itertools.product((True, False), repeat=2):
                made = {n: losses[n](p) for n in (first, second)}
                order = (second, first) if end else (first, second)
                # One node may serve both: its graph is there for the second as long as the first leaves it.
                found = {order[0]: gradients(made[order[0]], retain_graph=True)}
                found[order[1]] = gradients(made[order[1]], retain_graph=retained)
                again = {n: gradients(losses[n](p)) for n in order}
                for n, grads in expected.items():
                    torch.testing.assert_close(found[n], grads)
                    torch.testing.assert_close(again[n], grads)


@pytest.mark.parametrize("fused", [False, True])
def test_hidden_writes_are_noticed_after_a_backward_pass_or_a_step(fused):
    """A write through `.data` into the midst of a large tensor, and the fused optimisers, which hide alike."""
    loc, P, d, x = torch.zeros(900), leaf(900, 2), torch.ones(900), torch.randn(900)
    loc, d, x = loc.double(), d.double(), x.double()
    p = LowRankMultivariateNormal(loc, P, d)
    if fused:
        P.grad = torch.zeros_like(P)
        P.grad[450] = 1
        p.entropy()
        torch.optim.SGD([P], lr=3.0, fused=True).step()
    else:
        (p.entropy() - p.log_prob(x)).backward()
        P.data[450] += 3
    fresh = LowRankMultivariateNormal(loc, P, d)
    torch.testing.assert_close((p.entropy(), p.log_prob(x)), (fresh.entropy(), fresh.log_prob(x)))


@pytest.mark.parametrize("change", ["mul_", "data.mul_", "sgd-fused", "data="])
def test_a_conditional_of_a_stencil_follows_its_weights(change):
    """It keeps a factorisation of them."""
    log_diagonal, neighbours, x = leaf(1, 4, 3), leaf(1, 4, 4, 3), torch.randn(N, dtype=torch.float64)
    p = StencilMultivariateNormal(torch.zeros(N, dtype=torch.float64), Stencil(log_diagonal, neighbours))
    observed = torch.arange(N) < 5
    with torch.no_grad():
        conditional = p.condition(x, observed)
        conditional.log_prob(x), conditional.variance
    CHANGES[change](neighbours)
    with torch.no_grad():
        fresh = p.condition(x, observed)
        found, expected = ((q.entropy(), q.variance, q.covariance_row(7)) for q in (conditional, fresh))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(copy.deepcopy(conditional).entropy(), expected[0])


def test_entropy_keeps_its_gradient_when_value_or_mean_change():
    """Value and mean, which the entropy does not depend on, share a node with it."""
    leaves, arguments = dense()
    x = torch.randn(B, N, dtype=torch.float64)
    expected = torch.autograd.grad(LowRankMultivariateNormal(*arguments()).entropy().sum(), leaves["P"])
    for change in (lambda: x.mul_(2), lambda: torch.no_grad()(leaves["loc"].add_)(1)):
        p = LowRankMultivariateNormal(*arguments())
        p.log_prob(x)
        change()
        torch.testing.assert_close(torch.autograd.grad(p.entropy().sum(), leaves["P"]), expected)


def test_a_parameter_that_begins_or_ends_to_need_a_gradient():
    x = torch.randn(N, dtype=torch.float64)
    loc, P, d = (t.detach() for t in (leaf(N), leaf(N, R), leaf(N, positive=True)))
    p = LowRankMultivariateNormal(loc, P, d)
    p.log_prob(x)
    P.requires_grad_()
    assert p.entropy().requires_grad
    p.log_prob(x)
    P.requires_grad_(False)
    assert not p.entropy().requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calls", ["both", "entropy-first"])
def test_activations_that_are_made_again(reentrant, calls):
    """By a distribution from outside of what is checkpointed, which then computes inside of a backward pass."""
    leaves, arguments = dense()
    p = LowRankMultivariateNormal(*arguments())
    x = torch.randn(B, N, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return sum(t.sum() for t in CALLS[calls](p, x))

    found = torch.autograd.grad(checkpoint.checkpoint(loss, x, use_reentrant=False), [*leaves.values(), x])
    torch.testing.assert_close(found, torch.autograd.grad(loss(x), [*leaves.values(), x]))
    if reentrant:
        checkpoint.checkpoint(loss, x, use_reentrant=True).backward()
        torch.testing.assert_close(leaves["P"].grad, found[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_recorded_program_follows_parameters_that_are_its_inputs():
    """Recorded after calls whose results would be constants of it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, arguments = dense()
    x = torch.randn(B, N, dtype=torch.float64)
    p = LowRankMultivariateNormal(*arguments(), validate_args=False)

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            for name, t in leaves.items():
                self.register_parameter(name, t)

        def forward(self, x):
            return 2 * p.log_prob(x) - p.entropy()

    program = Program()
    records = {
        "trace": lambda: torch.jit.trace(program, x, check_trace=False),
        "make_fx": lambda: make_fx(program)(x),
        "fake": lambda: make_fx(program, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    }
    for name, record in records.items():
        program(x)
        recorded = record()
        torch.no_grad()(leaves["P"].mul_)(1.1)
        torch.testing.assert_close(recorded(x), program(x), msg=name)
        fresh = LowRankMultivariateNormal(*arguments())
        torch.testing.assert_close(program(x), 2 * fresh.log_prob(x) - fresh.entropy())


def test_nothing_is_kept_longer_than_it_is_of_use():
    """Neither graph nor value after a backward pass, and no cycle that waits for the garbage collector."""
    leaves, arguments = dense()
    gc.collect()
    gc.disable()
    try:
        p = LowRankMultivariateNormal(*arguments())
        seen = []

        def watched():
            t = torch.randn(B, N, dtype=torch.float64)
            seen.append(weakref.ref(t))
            return t

        p.log_prob(watched()).sum().backward()
        assert seen[-1]() is None
        p.log_prob(watched())
        p.log_prob(watched())  # the last one shares its node with the entropy
        assert seen[-2]() is None
        p.entropy().sum().backward()
        assert seen[-1]() is None
        torch.no_grad()(p.log_prob)(watched())
        assert seen[-1]() is None
        p.log_prob(watched())
        dead = weakref.ref(p), weakref.ref(p._cache), weakref.ref(leaves["P"])
        del p, arguments
        leaves.clear()
        assert [ref() for ref in dead] == [None] * 3
        assert seen[-1]() is None
    finally:
        gc.enable()
