"""Programs that are recorded within `plain_operators`: nothing of ours in them, and the values of ours."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from lowrank_cases import relative
from torch import nn

import lowrank_mvn
from lowrank_mvn import (
    GlobalLocalNormal,
    LinearFactor,
    LinearMean,
    LowRankMultivariateNormal,
    Stencil,
    StencilMultivariateNormal,
)

B, N, R, K, CHANNELS = 2, 96, 5, 4, 3
D = 2.0**-17  # about 1e-5, in float32 as in float64


def uniform(*shape, dtype=torch.float32):
    return torch.rand(shape, dtype=dtype)


def linear(features, weight, bias, mean_weight, d):
    factor = LinearFactor(features, weight, bias)
    return LowRankMultivariateNormal(LinearMean(features, mean_weight), factor, d, validate_args=False)


def masked(features, weight, bias, mean_weight, d):
    factor = LinearFactor(features, weight, bias, mask=torch.arange(N) % 3 > 0)
    return LowRankMultivariateNormal(LinearMean(features, mean_weight), factor, d, validate_args=False)


def dense(loc, P, d):
    return LowRankMultivariateNormal(loc, P, d, validate_args=False)


def stencil(loc, log_diagonal, neighbours):
    return StencilMultivariateNormal(loc, Stencil(log_diagonal, neighbours), validate_args=False)


def global_local(loc, log_diagonal, neighbours, P):
    return GlobalLocalNormal(loc, P, Stencil(log_diagonal, neighbours), validate_args=False)


FEATURES = uniform(B, K, 8, 4), torch.randn(R, CHANNELS, K), torch.randn(R, CHANNELS), torch.randn(CHANNELS, K)
STENCIL = 0.1 * torch.randn(B, CHANNELS, 8, 4), 0.1 * torch.randn(B, CHANNELS, 4, 8, 4)
KINDS = {
    "dense": (dense, uniform(B, N), torch.randn(B, N, R), D * (1 + uniform(B, N))),
    "number-d": (lambda loc, P: dense(loc, P, D), uniform(B, N), torch.randn(B, R, N).mT),
    "half": (dense, uniform(B, N).bfloat16(), torch.randn(B, N, R).bfloat16(), torch.full((B, 1), D)),
    "linear": (linear, *FEATURES, torch.tensor(D)),
    "masked": (masked, *FEATURES, torch.full((N,), D)),
    "stencil": (stencil, uniform(B, N), *STENCIL),
    "global-local": (global_local, uniform(B, N), *STENCIL, torch.randn(B, N, R)),
}


class Program(nn.Module):
    """Everything that is asked of a distribution; samples of given noise."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x, omega_p, omega_d, *tensors):
        p = self.make(*tensors)
        found = [*p.log_prob_and_entropy(x), p.entropy(), p.rsample((2,), noise=(omega_p, omega_d)), p.loc]
        if isinstance(p, LowRankMultivariateNormal):
            conditional = p.condition(x, x > 0.5)
            found += [conditional.loc, conditional.variance, p.variance, p.factor_gram(), p.covariance_row(3)]
        return found


def inputs(kind):
    make, *tensors = KINDS[kind]
    x = uniform(B, N)
    dtype = tensors[0].dtype
    return make, [x.to(dtype), torch.randn(B, R, dtype=dtype), torch.randn(B, N, dtype=dtype), *tensors]


def namespaces(program):
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_exported_program_is_torchs_and_says_what_ours_says(kind):
    make, given = inputs(kind)
    with lowrank_mvn.plain_operators():
        program = torch.export.export(Program(make), tuple(given))
    assert namespaces(program) == {"aten"}
    expected, found = Program(make)(*given), program.module()(*given)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < (1e-6 if b.dtype != torch.bfloat16 else 8e-3)
    # Gradients are those of float64.
    leaves = [t.clone().requires_grad_() for t in given], [t.double().requires_grad_() for t in given]
    for tensors, function in zip(leaves, (program.module(), Program(make)), strict=True):
        log_prob, entropy, *_ = function(*tensors)
        (log_prob.sum() + entropy.sum()).backward()
    for a, b in zip(*leaves, strict=True):
        if b.grad is not None:
            assert relative(a.grad, b.grad) < (1e-6 if a.dtype != torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_program_recorded_without_gradients_has_them(kind):
    """Recorded with tensors that need none: the entropy, which shares a node with the density, is not cut off."""
    make, given = inputs(kind)
    program = torch.export.export(Program(make), tuple(given)).module()
    leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
    for function, tensors in zip((program, Program(make)), leaves, strict=True):
        function(*tensors)[1].sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_samples_of_plain_operators_are_the_same():
    loc, P, d = KINDS["dense"][1:]
    samples = []
    for plain in (False, True):
        torch.manual_seed(0)
        if plain:
            with lowrank_mvn.plain_operators():
                samples.append(dense(loc, P, d).rsample((2,)))
        else:
            samples.append(dense(loc, P, d).rsample((2,)))
    torch.testing.assert_close(*samples)


LOADS = """
import sys
sys.path.append("{torch}")
import torch
try:
    import lowrank_mvn
except ImportError:
    pass
else:
    raise AssertionError(lowrank_mvn.__file__)
x, loc, P, d = torch.load("given.pt")
plain = torch.export.load("plain.pt2").module()(x, loc, P, d)
traced = torch.jit.load("traced.pt")(x, loc, P, d)
torch.save([plain, traced], "found.pt")
try:
    torch.export.load("ours.pt2")
except RuntimeError:  # "failed to resolve torch.ops.lowrank_mvn…"
    pass
else:
    raise AssertionError("loaded")
sys.path.append("{ours}")
import lowrank_mvn
torch.testing.assert_close(torch.export.load("ours.pt2").module()(x, loc, P, d), plain, rtol=1e-6, atol=0)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_plain_program_needs_nothing_where_it_is_loaded(tmp_path):
    """At d = 1e-5, where the textbook in float32 is off by a tenth; a program of our operators needs the import."""
    n = 4000
    given = uniform(B, n), uniform(B, n), torch.randn(B, n, 10), torch.full((B, n), 1e-5)

    class Density(nn.Module):
        def forward(self, x, loc, P, d):
            return dense(loc, P, d).log_prob(x)

    torch.save(given, tmp_path / "given.pt")
    torch.export.save(torch.export.export(Density(), given), tmp_path / "ours.pt2")
    with lowrank_mvn.plain_operators():
        torch.export.save(torch.export.export(Density(), given), tmp_path / "plain.pt2")
        torch.jit.trace(Density(), given, check_trace=False).save(tmp_path / "traced.pt")
    code = LOADS.format(torch=Path(torch.__file__).parents[1], ours=Path(lowrank_mvn.__file__).parents[1])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Without `site`, which would find an editable installation.
    command = [sys.executable, "-S", "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x, loc, P, d = (t.double() for t in given)
    exact = td.LowRankMultivariateNormal(loc, P, d, validate_args=False).log_prob(x)
    for found in torch.load(tmp_path / "found.pt"):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_the_context_ends_as_it_began():
    """Nested, after an error, and in its own thread alone."""
    from lowrank_mvn.registry import decomposed

    seen = []
    with lowrank_mvn.plain_operators(), lowrank_mvn.plain_operators():
        thread = threading.Thread(target=lambda: seen.append(decomposed()))
        thread.start()
        thread.join()
        assert decomposed()
    assert seen == [False]
    with pytest.raises(KeyError), lowrank_mvn.plain_operators():
        raise KeyError
    assert not decomposed()
    assert LinearFactor(*FEATURES[:3]).implementation("aten") == "aten"
