"""grad_d where a pixel's leverage is near one, and P has fewer independent rows than columns, against 80 digits.

`test_triton_session.py` runs it with the kernels too.
"""

import functools

import pytest
import torch
from leverage_cases import F64, FACTORS, case, exact

from lowrank_mvn import LinearFactor, condition, entropy, leverage, log_prob, log_prob_and_entropy
from lowrank_mvn.factors.dense.aten import residual

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def linear(P):
    """P [..., N, R] as a linear factor whose features are its columns, and other features that cancel."""
    F = torch.cat([P.mT, P.mT], -2).reshape(-1, 2 * P.shape[-1], P.shape[-2])
    one = torch.eye(P.shape[-1], dtype=P.dtype)
    return LinearFactor(F, torch.cat([3 * one, -2 * one], 1).unsqueeze(1))


def as_given(P):
    return P.unsqueeze(0)


KINDS = {"dense": as_given, "linear": linear}


@functools.cache
def expected(name, d, dtype, one_d):
    """Inputs, π and z; and the same of inputs whose last digit has moved."""
    torch.manual_seed(1)
    inputs = case(name, d, dtype, one_d)
    moved = [t.double() * (1 + torch.finfo(dtype).eps * (torch.rand_like(t, dtype=F64) - 0.5)) for t in inputs]
    return inputs, exact(*inputs), exact(*moved)


def gradient(function, d):
    d = d.unsqueeze(0).requires_grad_()
    return torch.autograd.grad(function(d).sum(), d)[0][0].double()


def check(kind, name, d, dtype, one_d, joint=True):
    (x, P, diagonal), right, moved = expected(name, d, dtype, one_d)
    factor, loc = KINDS[kind](P), torch.zeros_like(x)

    def terms(pi, z):
        """What grad_d is the difference of: Σₛ z²/2 and a multiple of π."""
        pi, square = (t.sum(0, keepdim=True) if one_d else t for t in (pi, z.square()))
        return [(0 * pi, -0.5 * pi), (0.5 * square, 0.5 * pi), (0.5 * square, 2 * pi)][: 3 if joint else 1]

    losses = [
        lambda d: entropy(factor, d),
        lambda d: log_prob(x, loc, factor, d),
        lambda d: log_prob(x, loc, factor, d) - 3 * entropy(factor, d),
    ]
    for loss, (a, b), (a_moved, b_moved) in zip(losses, terms(*right), terms(*moved), strict=False):
        size = a + b.abs()  # the terms may cancel, exactly as they do in the loss
        error = ((gradient(loss, diagonal) - (a - b)).abs() / size).max()
        inherent = (((a_moved - a).abs() + (b_moved - b).abs()) / size).max()
        assert error < max(TOLERANCE[dtype], 10 * inherent)


each_kind = pytest.mark.parametrize("kind", KINDS)
each_diagonal = pytest.mark.parametrize("one_d", [False, True], ids=["pixel", "one"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@each_kind
@each_diagonal
@each_dtype
@pytest.mark.parametrize("d", [3e-6, 1e-9, 1e-12, 1e12])  # ‖pₙ‖²/d of about 1e8, 1e11, 1e14 and 1e-11
@pytest.mark.parametrize("name", FACTORS)
def test_grad_d(name, d, dtype, one_d, kind):
    check(kind, name, d, dtype, one_d)


# The density is left out at 1e-9: there z is not good enough in the kernels, whoever asks for it.
IN_KERNELS = ["1 row, 2 columns", "12 rows, 9 of zeros", "33 rows, fainter and fainter", "one plane"]


@each_kind
@each_diagonal
@each_dtype
@pytest.mark.parametrize(("name", "d"), [(name, 3e-6) for name in IN_KERNELS] + [("3 rows, 8 columns", 1e-9)])
@pytest.mark.usefixtures("backend")
def test_grad_d_of_the_kernels(name, d, dtype, one_d, kind):
    check(kind, name, d, dtype, one_d, joint=d == 3e-6)


@each_diagonal
@each_dtype
@pytest.mark.parametrize("name", IN_KERNELS)
@pytest.mark.usefixtures("in_torch")
def test_grad_d_in_torchs_operators(name, dtype, one_d):
    check("dense", name, 3e-6, dtype, one_d)


@each_kind
@each_diagonal
@pytest.mark.usefixtures("in_torch")
def test_blocks(monkeypatch, kind, one_d):
    """A small factor takes another way in the forward pass."""
    monkeypatch.setattr(residual, "AT_ONCE_VALUES", 0)
    check(kind, "43 rows, 40 faint", 3e-6, torch.float32, one_d)
    check(kind, "duplicates", 3e-6, torch.float32, one_d)


def items(dtype=torch.float64):
    """x [5, N], P and d of five items, of which the second and the last but one have leverages near one."""
    P, d = torch.randn(5, 43, 8, dtype=F64), 0.5 + torch.rand(5, 43, dtype=F64)
    P[1], d[1] = FACTORS["43 rows, 40 faint"](), 3e-6
    P[3], d[3] = FACTORS["43 rows, 40 faint"](), 3e-6
    return torch.randn(5, 43, dtype=dtype), P.to(dtype), d.to(dtype)


def loss(kind):
    def both(x, P, d):
        log_p, H = log_prob_and_entropy(x, torch.zeros_like(x), KINDS[kind](P) if kind == "linear" else P, d)
        return log_p - 3 * H

    return both


@each_kind
@each_dtype
def test_items_are_apart(kind, dtype):
    x, P, d = items(dtype)
    d.requires_grad_()
    (together,) = torch.autograd.grad(loss(kind)(x, P, d).sum(), d)
    for i in range(5):
        (alone,) = torch.autograd.grad(loss(kind)(x[i : i + 1], P[i : i + 1], d[i : i + 1]).sum(), d)
        torch.testing.assert_close(together[i], alone[i], rtol=1e-9 if dtype == F64 else 1e-5, atol=0)
    for i in (1, 3):
        pi, z = exact(x[i], P[i], d[i].detach())
        right, size = 0.5 * z.square() - 2 * pi, 0.5 * z.square() + 2 * pi
        assert ((together[i] - right).abs() / size).max() < TOLERANCE[dtype]


@each_kind
def test_samples_add_up(kind):
    _, P, d = items()
    x, factor = torch.randn(7, 5, 43, dtype=F64), P if kind == "dense" else linear(P)

    def grad_d(x):
        leaf = d.clone().requires_grad_()
        return torch.autograd.grad(log_prob(x, torch.zeros_like(x), factor, leaf).sum(), leaf)[0]

    torch.testing.assert_close(grad_d(x), sum(grad_d(row) for row in x), rtol=1e-7, atol=0)


@each_kind
def test_an_empty_batch(kind):
    P, d = torch.empty(0, 3, 8, dtype=F64), torch.empty(0, 3, dtype=F64, requires_grad=True)
    factor = P if kind == "dense" else LinearFactor(P.mT, torch.ones(8, 1, 8, dtype=F64))
    assert torch.autograd.grad(entropy(factor, d).sum(), d)[0].shape == (0, 3)
    one = torch.empty(0, 1, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(entropy(factor, one).sum(), one)[0].shape == (0, 1)


def test_transforms():
    x, P, d = items()
    d.requires_grad_()
    (right,) = torch.autograd.grad(loss("dense")(x, P, d).sum(), d)
    one_by_one = torch.func.vmap(torch.func.grad(loss("dense"), 2))
    torch.testing.assert_close(one_by_one(x, P, d.detach()), right, rtol=1e-9, atol=0)
    compiled = torch.compile(loss("dense"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, P, d).sum(), d)[0], right, rtol=1e-9, atol=0)


@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_nothing_is_made_again_where_no_leverage_is_near_one(monkeypatch, layout):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(leverage, "at_heaviest", never)
    P = torch.randn(3, 500, 10)
    P = P.mT.contiguous().mT if layout == "BRN" else P
    for kind in KINDS:
        for d in (1e-5 * (1 + torch.rand(3, 500)), 1e-5 * (1 + torch.rand(3, 1))):
            loss(kind)(torch.randn(3, 500), P, d.requires_grad_()).sum().backward()
            assert d.grad.isfinite().all()


@pytest.mark.parametrize("d", [1e-2, 1e-5, 1e-8])
@each_kind
@pytest.mark.usefixtures("backend")
def test_scalar_d_of_a_conditional_mean_in_kernels_too(kind, d):
    """∂(P₁v)/∂d = −P₁C₂⁻¹v/d: of its terms, one for each pixel, a part of 1/C₂ is left."""
    N, R = 1920, 10
    P, x, loc, cotangent = torch.randn(N, R), torch.randn(N), torch.randn(N), torch.randn(N)
    observed, diagonal = torch.rand(N) < 0.5, torch.tensor(d, requires_grad=True)
    factor = P if kind == "dense" else linear(P)
    mean = condition(x, observed, loc, factor, diagonal).loc
    (ours,) = torch.autograd.grad((mean * cotangent).sum(), diagonal)
    seen, d64 = P[observed].double(), diagonal.detach().double()
    C = torch.eye(R, dtype=F64) + seen.mT @ seen / d64
    v = torch.linalg.solve(C, seen.mT @ (x - loc).double()[observed] / d64)
    right = -(P.double()[~observed] @ torch.linalg.solve(C, v) / d64) @ cotangent.double()[~observed]
    assert abs(ours - right) < 1e-3 * abs(right)
