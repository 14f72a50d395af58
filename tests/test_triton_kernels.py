"""Every Triton kernel against float64: in the interpreter on the CPU, compiled where there is a device.

Triton decides when it is imported whether kernels are interpreted (TRITON_INTERPRET=1), so that one process cannot do
both. `test_triton_session.py` runs this file a second time in a process of its own with the interpreter on; in an
ordinary session the same tests are marked `gpu`.

The interpreter multiplies in full precision where tensor cores read 11 significant bits: `tensor_cores` in
conftest.py cuts the operands of every tf32 product, so that the split products are tested with the error they have.
"""

import pytest
import torch
from lowrank_cases import BF16, F16, F32, F64, relative
from triton_cases import DEVICE, MARKS, TOLERANCE, both, check, check_logdet, inputs, name, oracle, weights, wide

from lowrank_mvn.device import launch
from lowrank_mvn.factors.dense import aten

pytestmark = MARKS

# (dtype, S, B, N, R, layout, diagonal, loc shared by the samples): every value of every column, ragged first.
MATRIX = [
    (F32, 1, 1, 1, 1, "BRN", "pixel", True),
    (F32, 1, 2, 5, 2, "BNR", "item", True),
    (F32, 1, 2, 63, 3, "BRN", "pixel", True),
    (F32, 1, 2, 128, 25, "BRN", "pixel", True),
    (F32, 1, 2, 128, 25, "BNR", "item", True),
    (F32, 1, 1, 1000, 25, "BRN", "pixel", True),
    (F32, 1, 1, 1000, 16, "BNR", "pixel", True),
    (F32, 3, 2, 63, 25, "strided", "pixel", False),
    (F32, 2, 2, 128, 32, "BRN", "item", True),
    (F32, 1, 1, 1000, 33, "BRN", "pixel", True),
    (F32, 1, 1, 128, 64, "BNR", "pixel", True),
    (F32, 1, 1, 63, 100, "BRN", "pixel", True),
    (F64, 1, 2, 63, 3, "BRN", "pixel", True),
    (F64, 2, 1, 128, 25, "BNR", "item", False),
    (BF16, 1, 2, 63, 16, "BRN", "pixel", True),
    (BF16, 2, 1, 128, 25, "BNR", "pixel", False),
    (F16, 1, 2, 63, 25, "BRN", "item", True),
    (F16, 1, 1, 5, 1, "BNR", "pixel", True),
]


@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_density_and_every_gradient(kernels, case):
    args, tolerance = inputs(*case), TOLERANCE[case[0]]
    ab = weights(*case[1:3])
    (expected, expected_grads), (out, grads) = oracle(args, *ab), both(kernels, args, *ab)
    for what, ours, theirs in zip(("q", "logdet", "L_inv", "v"), out, expected, strict=False):
        assert ours.dtype == F64
        assert relative(ours, theirs) < max(2e-6 if case[0] != F64 else 0, TOLERANCE[F64]), what
    for what, ours, theirs, like in zip(("x", "loc", "P", "d"), grads, expected_grads, args, strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
        assert relative(ours, theirs) < tolerance, what
    if case[5] != "strided":
        assert grads[2].stride() == args[2].stride()


def test_mean_that_is_large_beside_the_deviation(kernels):
    """w is a difference of two products in pass 1; pass 2 corrects v."""
    x, loc, P, d = inputs(F32, 1, 2, 63, 3, "BRN", "pixel", True)
    args = (x + 3000, loc + 3000, P, d)
    expected, out = aten.mahalanobis_and_logdet(*wide(args)), kernels.mahalanobis_and_logdet(*args)
    assert relative(out[0], expected[0]) < 2e-6
    assert relative(out[3], expected[3]) < 2e-6


@pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0), (1, 0, 0, 1)])
@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_only_what_is_asked_for(kernels, needs, diagonal):
    check(kernels, inputs(F32, 2, 2, 20, 3, "BRN", diagonal, True), needs=needs)


def test_capacitance_given(kernels):
    args = inputs(F32, 3, 2, 70, 5, "BRN", "pixel", True)
    first = kernels.mahalanobis_and_logdet(*args)
    again = kernels.mahalanobis_and_logdet(*args, first[2], first[1], first[-1])
    for ours, theirs in zip(again, first, strict=True):
        assert torch.equal(ours, theirs)


def test_no_samples_and_empty_batch(kernels):
    args = inputs(F32, 2, 2, 20, 3, "BRN", "pixel", True)
    q, logdet, *_ = kernels.mahalanobis_and_logdet(args[0][:0], args[1], *args[2:])
    assert q.shape == (0, 2)
    assert relative(logdet, aten.mahalanobis_and_logdet(*wide(args))[1]) < 1e-6
    nothing = inputs(F32, 2, 0, 20, 3, "BRN", "pixel", True)
    out, grads = both(kernels, nothing, *weights(2, 0))
    assert out[0].shape == (2, 0)
    assert [g.shape for g in grads] == [t.shape for t in nothing]


@pytest.mark.parametrize(("N", "R"), [(40, 7), (130, 25)])
def test_gram_with_a_mask(kernels, N, R):
    x, loc, P, d = inputs(F32, 2, 2, N, R, "BRN", "pixel", True)
    precision = torch.where(torch.rand_like(d) < 0.5, d.reciprocal(), torch.zeros_like(d))
    gram, w = kernels.normal_equations(x, loc, P, precision)
    expected = aten.normal_equations(*wide((x, loc, P, precision)))
    assert relative(gram, expected[0]) < 1e-6
    assert relative(w, expected[1]) < 1e-12  # made in float64
    assert torch.equal(kernels.gram(P, precision), gram)


@pytest.mark.parametrize("case", [MATRIX[i] for i in (0, 3, 4, 6, 11, 13, 15)], ids=name)
def test_log_determinant_alone(kernels, case):
    _, _, P, d = inputs(*case)
    check_logdet(kernels, aten, (P, d), weights(*case[1:3])[1], 2e-6, [TOLERANCE[case[0]]] * 2)


@pytest.mark.parametrize("R", [129])
def test_rank_beyond_one_tile(kernels, R):
    check(kernels, inputs(F32, 1, 1, 8, R, "BRN", "pixel", True, scale=0.1))


@pytest.mark.parametrize(("ratio", "log_p", "gradient"), [(1.0, 0.05, 1e-4), (1e-2, 0.05, 1e-4), (1e-4, 1.0, 1e-3)])
def test_small_diagonal_and_collinear_columns(kernels, ratio, log_p, gradient):
    """The bars at N = 116 412, d = 1e-5, at an N that the interpreter can do."""
    N, R = 1000, 25
    _, loc, P, d = inputs(F32, 1, 1, N, R, "BRN", "item", True, d=1e-5, scale=0.2)
    P = (P[..., :1] + ratio * P).mT.contiguous().mT if ratio < 1 else P
    d = torch.full_like(d, 1e-5)
    omega = torch.randn(1, R, 1, dtype=F64, device=DEVICE)
    noise = torch.randn(1, N, dtype=F64, device=DEVICE)
    x = (loc.double() + (P.double() @ omega)[..., 0] + d.double().sqrt() * noise).float()
    halves = [torch.full(shape, -0.5, dtype=F64, device=DEVICE) for shape in ((1, 1), (1,))]
    args = x, loc, P, d
    (expected, expected_grads), (out, grads) = oracle(args, *halves), both(kernels, args, *halves)
    off = 0.5 * ((out[0] - expected[0]).abs().sum() + (out[1] - expected[1]).abs().sum())
    assert off < log_p
    for what, ours, theirs in zip(("x", "loc", "P", "d"), grads, expected_grads, strict=True):
        assert relative(ours, theirs) < gradient, what


def test_condition_of_1e9_is_made_again_in_float64(kernels):
    x, loc, P, d = inputs(F32, 1, 2, 200, 4, "BRN", "item", True)
    P, d = P.contiguous(), torch.full_like(d, 1e-7)
    P[1, :, 1] = P[1, :, 0] + 1e-5 * P[1, :, 1]
    q, logdet, L_inv, *_, flags = kernels.mahalanobis_and_logdet(x, loc, P, d)
    assert torch.linalg.cond(L_inv)[1] ** 2 > 1e9
    assert flags.tolist() == [False, True]
    expected = aten.mahalanobis_and_logdet(*wide((x, loc, P, d)))
    assert relative(logdet, expected[1]) < 1e-6
    assert relative(q, expected[0]) < 1e-6


def test_one_item_that_is_not_finite(kernels):
    args, ab = inputs(F32, 1, 3, 40, 5, "BRN", "pixel", True), weights(1, 3)
    good, good_grads = both(kernels, args, *ab)
    args[2][1, 7, 2] = float("nan")
    out, grads = both(kernels, args, *ab)
    assert out[0][0, 1].isnan()
    assert out[1][1].isnan()
    assert torch.equal(out[0][0, ::2], good[0][0, ::2])
    assert torch.equal(out[1][::2], good[1][::2])
    assert torch.equal(grads[2][::2], good_grads[2][::2])


def test_the_same_bits_twice(kernels):
    """On a device; the interpreter runs one program after the other."""
    args, ab = inputs(F32, 1, 2, 70, 9, "BNR", "pixel", True), weights(1, 2)
    (out, grads), (again, grads_again) = (both(kernels, args, *ab) for _ in range(2))
    for ours, theirs in zip((*out, *grads), (*again, *grads_again), strict=True):
        assert torch.equal(ours, theirs)


def everything(kernels, args, ab, omega_p, seed):
    """Density, sample, and the gradients of both."""
    x, loc, P, d = args
    out, grads = both(kernels, args, *ab)
    y = kernels.rsample(loc, P, d, omega_p, None, seed)
    return *out, *grads, y, *kernels.rsample_backward(x, P, d, omega_p, None, seed, [True, True, False])


@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_more_splits_than_work(kernels, monkeypatch, diagonal):
    """What a program without columns writes is zero, in every kernel."""
    args, ab = inputs(F32, 1, 1, 70, 3, "BRN", diagonal, True), weights(1, 1)
    noise = torch.randn(1, 1, 3, device=DEVICE), torch.tensor([1], device=DEVICE)
    expected = everything(kernels, args, ab, *noise)
    monkeypatch.setattr(launch, "ceil_div", lambda a, b: -(-a // b) + (3 if a == 70 else 0))
    for ours, theirs in zip(everything(kernels, args, ab, *noise), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_offsets_beyond_int32(kernels, monkeypatch):
    """A batch stride and a row stride beyond 2³¹ elements, of P and of its gradients, over memory of which next to
    nothing is touched."""
    B, N, R = 2, 3, 2
    stride_b, stride_n = 2**31 + 101, 2**30 + 3  # no two values in one place
    size = 4 * (stride_b + (N - 1) * stride_n + R)
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("needs 52 GB of the GPU's memory: nothing is lazy there")

    def far():
        storage = torch.UntypedStorage(size, device=DEVICE)
        return torch.empty(0, device=DEVICE).set_(storage, 0, (B, N, R), (stride_b, stride_n, 1))

    P, values = far(), torch.randn(B, N, R)
    P.copy_(values)
    x, loc, _, d = inputs(F32, 1, B, N, R, "BNR", "pixel", True)
    others = weights(1, B), torch.randn(1, B, R, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    assert not torch.equal(P[0], P[1])
    expected = everything(kernels, (x, loc, P.contiguous(), d), *others)
    ordinary = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: far() if t is P else ordinary(t, **how))
    found = everything(kernels, (x, loc, P, d), *others)
    gradients = [t for t in found if t.shape == P.shape]
    assert [t.stride() for t in gradients] == [P.stride()] * 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
