"""Gradients where a pixel's leverage is near one, and P has fewer independent rows than columns, against 80 digits.

`test_triton_session.py` runs them with the kernels too.
"""

import functools
import math

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
    """Inputs, what is exact of them, and the same of inputs whose last digit has moved, several times where that is
    all that can be asked."""
    torch.manual_seed(1)
    inputs = case(name, d, dtype, one_d)
    moved = [exact(*last_digits_moved(inputs)) for _ in range(4 if name in CROWDED and d == 1e-12 else 1)]
    return inputs, exact(*inputs), moved


# More heavy rows than directions: what is small depends on how these miss each other.
CROWDED = "duplicates", "multiples", "four directions"


def last_digits_moved(inputs):
    eps = torch.finfo(inputs[0].dtype).eps
    return [t.double() * (1 + eps * (torch.rand_like(t, dtype=F64) - 0.5)) for t in inputs]


def terms(e, of_log_p, of_H, one_d):
    """The gradients of x, P and d, as two terms each, and their sizes, of a pixel: the terms may cancel."""
    z2, pi = (t.sum(0, keepdim=True) if one_d else t for t in (e.z.square(), e.pi))
    both = {
        "x": (-of_log_p * e.z, 0 * e.z),
        "P": (of_log_p * e.z[:, None] * e.v, (of_H - of_log_p) * e.SP),
        "d": (0.5 * of_log_p * z2, 0.5 * (of_H - of_log_p) * pi),
    }
    sizes = {n: sum(t if n == "d" else t.reshape(len(t), -1).norm(dim=1) for t in map(abs, both[n])) for n in both}
    return both, sizes | {"x": sizes["x"] + abs(of_log_p) * e.pi.sqrt()}


def errors(found, e, size):
    """Of each pixel, beside the size of its terms."""
    off = found.double() - sum(e)
    off = off if off.dim() == 1 else off.norm(dim=1)
    return (off.abs() / size.clamp_min(1e-300)).max()


LOSSES = {"H": (0, 1), "log p": (1, 0), "both": (1, -3)}


def check(kind, name, d, dtype, one_d, losses=tuple(LOSSES)):
    inputs, right, moved = expected(name, d, dtype, one_d)
    loc = torch.zeros_like(inputs[0])
    for of_log_p, of_H in (LOSSES[loss] for loss in losses):
        x, P, diagonal = (t.clone().requires_grad_() for t in inputs)
        factor, value = KINDS[kind](P), 0
        if of_log_p:
            log_p = log_prob(x, loc, factor, diagonal.unsqueeze(0))
            value = value + of_log_p * log_p
            assert_density(log_p, right, moved, TOLERANCE[dtype])
        if of_H:
            value = value + of_H * entropy(factor, diagonal.unsqueeze(0))
        grads = torch.autograd.grad(value.sum(), (x, P, diagonal), allow_unused=True)
        e, size = terms(right, of_log_p, of_H, one_d)
        others = [terms(m, of_log_p, of_H, one_d)[0] for m in moved]
        for n, found in zip("xPd", grads, strict=True):
            if found is not None:
                inherent = max(sum(errors(b, [a], size[n]) for a, b in zip(e[n], o[n], strict=True)) for o in others)
                assert errors(found, e[n], size[n]) < max(TOLERANCE[dtype], 10 * inherent), (n, of_log_p, of_H)


def assert_density(found, right, moved, tolerance):
    def log_p(e):
        return -0.5 * (len(e.z) * math.log(2 * math.pi) + e.logdet + e.q)

    size = len(right.z) + abs(right.logdet) + right.q
    inherent = max(abs(log_p(m) - log_p(right)) for m in moved)
    assert abs(found.item() - log_p(right)) < max(tolerance * size, 10 * inherent)


each_kind = pytest.mark.parametrize("kind", KINDS)
each_diagonal = pytest.mark.parametrize("one_d", [False, True], ids=["pixel", "one"])
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@each_kind
@each_diagonal
@each_dtype
@pytest.mark.parametrize("d", [3e-6, 1e-9, 1e-12, 1e12])  # ‖pₙ‖²/d of about 1e8, 1e11, 1e14 and 1e-11
@pytest.mark.parametrize("name", FACTORS)
def test_gradients(name, d, dtype, one_d, kind):
    if (kind, name, d, dtype) == ("linear", "a column of one pixel", 1e-12, torch.float32):
        pytest.skip("C is well conditioned, and one step of v leaves ε²‖aₙ‖² of float32 in z at that pixel")
    check(kind, name, d, dtype, one_d)


# Of a linear factor the kernels add up features, not rows of P: exact to ε‖pₙ‖²/d where there are more than 2R pixels.
IN_KERNELS = {
    "1 row, 2 columns": (1e-12,),
    "3 rows, 8 columns": (1e-9,),
    "12 rows, 9 of zeros": (1e-9,),
    "33 rows, fainter and fainter": (3e-6,),
    "one plane": (3e-6,),
}
IN_KERNELS_OF_P = {"43 rows, 40 faint": 1e-9, "duplicates": 1e-9, "multiples": 1e-9, "a column of one pixel": 1e-9}
FOR_KERNELS = [(kind, name, d) for name, ds in IN_KERNELS.items() for d in ds for kind in KINDS]
FOR_KERNELS += [("dense", name, d) for name, d in IN_KERNELS_OF_P.items()]


@each_diagonal
@each_dtype
@pytest.mark.parametrize(("kind", "name", "d"), FOR_KERNELS)
@pytest.mark.usefixtures("backend")
def test_gradients_of_the_kernels(kind, name, d, dtype, one_d):
    check(kind, name, d, dtype, one_d, ("H", "both"))


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
    check(kind, "multiples", 1e-9, torch.float64, one_d)


@each_kind
@pytest.mark.parametrize("name", ["multiples", "3 rows, 8 columns"])
def test_what_is_finite_stays_so(name, kind):
    """‖pₙ‖²/d is 1e18, and C says nothing of I."""
    check(kind, name, 1e-16, F64, one_d=False, losses=("log p",))


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
        pi, z, *_ = exact(x[i], P[i], d[i].detach())
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
def test_small_leverages_recompute_nothing(monkeypatch, layout):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(leverage, "Heaviest", never)
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


@each_kind
@each_dtype
@pytest.mark.parametrize("d", [1e-9, 1e-12])
def test_conditional_mean_given_fewer_pixels_than_columns(kind, dtype, d):
    torch.manual_seed(1)
    P, x, observed = 7 * torch.randn(12, 8, dtype=F64), torch.randn(12, dtype=F64), torch.arange(12) < 3
    inputs = [t.to(dtype) for t in (x, P, d * (1 + torch.rand(12, dtype=F64)))]
    moved = last_digits_moved(inputs)
    right, other = (t[1][~observed].double() @ exact(*(u[observed] for u in t)).v for t in (inputs, moved))
    x, P, diagonal = inputs
    found = condition(x, observed, torch.zeros_like(x), KINDS[kind](P), diagonal).loc.flatten()[~observed]
    assert (found - right).norm() / right.norm() < max(TOLERANCE[dtype], 10 * (other - right).norm() / right.norm())
