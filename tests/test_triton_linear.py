"""The kernels of a linear factor against the closed forms of `aten` in float64.

The public functions are in `test_triton_linear_class.py`. Runs as `test_triton_kernels.py` does.
"""

import pytest
import torch
from lowrank_cases import BF16, F16, F32, F64, relative, strided
from triton_cases import DEVICE, MARKS, TOLERANCE, both, check_logdet, name, weights, wide

from lowrank_mvn.capacitance import LOG_DET_TOLERANCE
from lowrank_mvn.device import launch
from lowrank_mvn.factors.linear import aten, triton
from lowrank_mvn.factors.linear.triton import blocks

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # torch's own, in opcheck

# (dtype, S, B, K, R, channels, pixels, layout of F, diagonal, loc, linear mean, W per item), ragged first.
MATRIX = [
    (F32, 1, 1, 1, 1, 1, 1, "BKM", "pixel", True, False, False),
    (F32, 1, 2, 5, 3, 3, 5, "BMK", "item", True, True, False),
    (F32, 1, 2, 16, 25, 3, 63, "BKM", "item", False, True, False),
    (F32, 1, 2, 16, 3, 3, 63, "BMK", "pixel", True, False, True),
    (F32, 2, 2, 5, 33, 1, 130, "BKM", "item", True, True, True),
    (F32, 2, 1, 16, 25, 3, 63, "strided", "pixel", False, True, False),
    (F32, 2, 1, 5, 1, 3, 130, "BMK", "item", False, False, True),
    (F32, 1, 1, 64, 25, 3, 130, "BKM", "item", False, True, False),
    (F32, 1, 1, 64, 3, 1, 63, "BMK", "pixel", False, True, False),
    (F32, 1, 1, 65, 3, 1, 63, "BKM", "pixel", False, False, False),
    (F32, 1, 1, 100, 3, 1, 63, "BMK", "item", True, True, False),
    (F32, 0, 2, 16, 3, 3, 63, "BKM", "pixel", False, True, False),
    (F32, 0, 1, 5, 3, 1, 63, "BMK", "item", False, False, True),
    (F32, 1, 2, 5, 3, 1, 97, "BKM", "pixel", True, True, False),  # 2 · 48 + 1: no block has one pixel
    (F64, 1, 2, 5, 3, 3, 63, "BKM", "pixel", True, True, True),
    (F64, 2, 1, 33, 3, 1, 20, "BMK", "item", False, True, False),
    (BF16, 1, 2, 16, 3, 3, 63, "BKM", "item", False, True, False),
    (BF16, 2, 1, 16, 3, 1, 63, "BMK", "pixel", True, True, True),
    (F16, 1, 1, 5, 3, 1, 63, "BKM", "item", False, False, False),
]
NAMES = ("grad_x", "grad_F", "grad_W", "grad_m", "grad_d")


def features(dtype, B, K, pixels, layout):
    F = torch.randn(B, K, pixels, dtype=F64, device=DEVICE).to(dtype)
    if layout == "BMK":
        return F.mT.contiguous().mT
    return strided(F) if layout == "strided" else F


def inputs(dtype, S, B, K, R, channels, pixels, layout, diagonal, with_loc, with_mean, per_item, d=1.0):
    """x, loc, F, W, m and d in canonical shapes; d in float32 beside half precision."""
    options = {"dtype": F64, "device": DEVICE}
    W = torch.randn(B if per_item else 1, channels, R, K + 1, **options) / K**0.5
    x, loc = (torch.randn(n, B, channels, pixels, **options) for n in (S, 2 if S == 2 else 1))
    m = torch.randn(channels, K + 1, **options)
    diag = d * (0.5 + torch.rand(B, *((channels, pixels) if diagonal == "pixel" else (1, 1)), **options))
    x, loc, W, m = (t.to(dtype) for t in (x, loc, W, m))
    diag = diag.to(F64 if dtype == F64 else F32)
    return x, loc if with_loc else None, features(dtype, B, K, pixels, layout), W, m if with_mean else None, diag


def oracle(args, a, b):
    """Outputs and gradients of `aten` in float64."""
    out, grads = both(aten, wide(args), a, b)
    return out[:4], grads


def check(kernels, args):
    """Outputs and gradients of float32 to its rounding."""
    ab = weights(*args[0].shape[:2])
    (out, grads), (expected, expected_grads) = both(kernels, args, *ab), oracle(args, *ab)
    for ours, theirs in zip((*out[:4], *grads), (*expected, *expected_grads), strict=True):
        assert relative(ours, theirs) < 2e-6 if theirs.numel() else ours.numel() == 0


def amplified(x, loc, F, W, m, d):
    """The largest tr G / λ_min(G). With more columns than features grad_W has C⁻¹W_cG_c, and |ΔG_kl| ≤ ε√(G_kk G_ll),
    ‖ΔG‖ ≤ ε tr G, moves it by that much of itself: A ΔG (I − M_cG) beside A G, with A = C⁻¹W_c and 0 ⪯ M_cG ⪯ I."""
    ones = torch.cat([F, torch.ones_like(F[:, :1])], 1).double()
    precision = d.double().reciprocal().expand(-1, -1, F.shape[2])
    values = torch.linalg.eigvalsh(torch.einsum("bkn,bcn,bln->bckl", ones, precision, ones))
    return (values.sum(-1) / values[..., 0]).max().item()


@pytest.mark.parametrize("case", MATRIX, ids=name)
def test_density_and_every_gradient(linear_kernels, case):
    dtype, S, B = case[:3]
    args, ab = inputs(*case), weights(S, B)
    (expected, expected_grads), (out, grads) = oracle(args, *ab), both(linear_kernels, args, *ab)
    for what, ours, theirs in zip(("q", "logdet", "L_inv", "v"), out, expected, strict=False):
        assert (ours.dtype, ours.shape) == (F64, theirs.shape)
        assert relative(ours, theirs) < (TOLERANCE[F64] if dtype == F64 else 2e-6), what
    residual, F = out[-2], args[2]
    for what, ours, theirs, like in zip(NAMES, grads, expected_grads, (residual, F, *args[3:]), strict=True):
        assert ours.shape == (theirs.shape if like is None else like.shape), what
        assert ours.dtype == (ours.dtype if like is None else like.dtype), what
        scale = TOLERANCE[F32] if what in ("grad_x", "grad_d") and dtype != F64 else TOLERANCE[dtype]
        if dtype == F32 and case[4] > case[3] + 1:
            if what == "grad_W":
                scale = max(scale, 2.0**-21 * amplified(*args))
            elif what == "grad_m":  # nearly all of F̃z cancels: rounding is relative to the terms of the sum
                ones = torch.cat([F, torch.ones_like(F[:, :1])], 1).double()
                terms = torch.einsum("sbcn,bkn->ck", expected_grads[0].abs(), ones.abs())
                scale *= (terms.norm() / theirs.norm()).item()
        assert relative(ours, theirs) < scale, what
    if case[7] != "strided":
        assert grads[1].stride() == F.stride()


@pytest.mark.parametrize("diagonal", ["pixel", "item"])
@pytest.mark.parametrize("needs", [(0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0)])
def test_only_what_is_asked_for(linear_kernels, needs, diagonal):
    args, ab = inputs(F32, 1, 2, 5, 3, 3, 20, "BKM", diagonal, True, False, False), weights(1, 2)
    (_, expected), (_, grads) = both(linear_kernels, args, *ab), both(linear_kernels, args, *ab, needs)
    assert grads[3].numel() == 0
    assert torch.equal(grads[2], expected[2])
    for i, need in zip((0, 1, 4), needs, strict=True):
        assert torch.equal(grads[i], expected[i]) if need else grads[i].numel() == 0


@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_more_columns_than_ride_along(linear_kernels, diagonal):
    """10 columns: rounds in the residual, the last of them with fewer; their sums are passes of their own."""
    check(linear_kernels, inputs(F32, 5, 2, 5, 3, 2, 37, "BMK", diagonal, True, True, False))


@pytest.mark.parametrize(("diagonal", "S"), [("pixel", 1), ("item", 1), ("pixel", 5)])
def test_more_features_than_one_tile(linear_kernels, diagonal, S):
    check(linear_kernels, inputs(F32, S, 1, 130, 2, 1, 20, "BKM", diagonal, False, True, False))


def test_diagonal_of_any_strides(linear_kernels):
    *args, d = inputs(F32, 1, 3, 5, 3, 1, 40, "BKM", "pixel", True, False, False)
    turned = d.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert turned.stride() != d.stride()
    check(linear_kernels, (*args, turned))


def test_which_way_is_taken():
    chosen = blocks.chosen
    assert chosen(1, 8, 257, per_pixel=False)
    assert chosen(3, 25, 257, per_pixel=True)
    assert not chosen(3, 100, 257, per_pixel=False)  # P would cost more than the features
    assert not chosen(1, 8, 129, per_pixel=True)  # one tile holds the features


def test_never_more_of_the_factor_than_a_block(monkeypatch):
    made, product = [], blocks.product

    def counted(A, X, out, *rest, **options):
        made.append(X.shape[2])
        product(A, X, out, *rest, **options)

    monkeypatch.setattr(blocks, "BLOCK_VALUES", 2 * 2 * 3 * 64)
    monkeypatch.setattr(blocks, "LEAST_PIXELS", 16)
    monkeypatch.setattr(blocks, "product", counted)
    both(triton, inputs(F32, 1, 2, 130, 3, 2, 300, "BKM", "pixel", True, True, False), *weights(1, 2))
    assert len(made) > 15
    assert max(made) <= 64


def test_empty_batch(linear_kernels):
    args = inputs(F32, 2, 0, 5, 3, 2, 20, "BKM", "pixel", True, True, False)
    out, grads = both(linear_kernels, args, *weights(2, 0))
    assert out[0].shape == (2, 0)
    assert [g.shape for g in grads] == [t.shape for t in (args[0], *args[2:])]
    assert not grads[2].any()


@pytest.mark.parametrize("case", [MATRIX[i] for i in (0, 2, 3, 5, 8, 9, 14, 16)], ids=name)
def test_log_determinant_alone(linear_kernels, case):
    _, _, F, W, _, d = inputs(*case)
    tolerance = TOLERANCE[F64] if case[0] == F64 else 2e-6
    scale = max(1, 2.0**-21 * amplified(None, None, F, W, None, d) / tolerance) if case[4] > case[3] + 1 else 1
    allowed = [TOLERANCE[F.dtype], TOLERANCE[W.dtype] * scale, TOLERANCE[d.dtype]]
    check_logdet(linear_kernels, aten, (F, W, d), weights(*case[1:3])[1], tolerance, allowed)


@pytest.mark.parametrize("masked", [True, False])
def test_gram(linear_kernels, masked):
    x, loc, F, W, m, d = inputs(F32, 2, 2, 5, 3, 2, 70, "BKM", "pixel" if masked else "item", True, True, False)
    precision = d.reciprocal() * (torch.rand_like(d) < 0.5 if masked else 1)
    gram, w = linear_kernels.normal_equations(x, loc, F, W, m, precision)
    ones = torch.cat([F, torch.ones_like(F[:, :1])], 1).double()
    P = torch.einsum("crk,bkn->bcnr", W[0].double(), ones)
    delta = x.double() - loc.double() - torch.einsum("ck,bkn->bcn", m.double(), ones)
    scaled = P * precision.double().expand(2, 2, 70)[..., None]
    assert relative(gram, torch.einsum("bcnr,bcns->brs", P, scaled)) < 2e-6
    assert torch.equal(linear_kernels.gram(F, W, precision), gram)
    assert relative(w, torch.einsum("sbcn,bcnr->sbr", delta, scaled)) < 1e-12  # made in float64


@pytest.mark.parametrize("layout", ["BKM", "BMK"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("collinear", "log_p", "gradient"), [("none", 0.05, 1e-4), ("weights", 1.0, 1e-3), ("features", 1.0, 1e-3)]
)
def test_small_diagonal_and_what_is_collinear(linear_kernels, collinear, log_p, gradient, dtype, layout):
    """The bars of a dense factor, at d = 1e-5; in half precision of the features as they were rounded."""
    S, B, K, R, channels, pixels = 1, 2, 16, 10, 3, 300
    _, _, F, W, m, d = inputs(F32, S, B, K, R, channels, pixels, layout, "item", False, True, True, d=1e-5)
    W = 0.2 * W
    if collinear == "weights":
        W[1] = W[1, :, :1] + 1e-4 * W[1]
    elif collinear == "features":
        F[1] = F[1, :1] + 1e-4 * F[1]
    F = F.to(dtype)  # the layout stays; of features in half precision 1e-4 is lost, and they are the same
    d = torch.full_like(d, 1e-5)
    ones = torch.cat([F, torch.ones_like(F[:, :1])], 1).double()
    omega = torch.randn(B, R, dtype=F64, device=DEVICE)
    u = torch.einsum("br,bcrk->bck", omega, W.double()) + m.double()
    x = torch.einsum("bck,bkn->bcn", u, ones)
    x = (x + d.double().sqrt() * torch.randn_like(x)).float()[None]
    halves = [torch.full(shape, -0.5, dtype=F64, device=DEVICE) for shape in ((S, B), (B,))]
    args = x, None, F, W, m, d
    (expected, expected_grads), (out, grads) = oracle(args, *halves), both(linear_kernels, args, *halves)
    # Rounding is in G, so that only features can ask for float64; then C is as exact as G, whatever W is. With blocks
    # it is in P.
    rounded = blocks.chosen()
    assert out[-1].tolist() == [False, collinear == "features" or (rounded and collinear == "weights")]
    assert (out[1] - expected[1]).abs().max() < LOG_DET_TOLERANCE
    assert (0.5 * ((out[0] - expected[0]).abs() + (out[1] - expected[1]).abs())).max() < log_p
    for what, ours, theirs in zip(NAMES, grads, expected_grads, strict=True):
        assert relative(ours, theirs) < max(gradient, TOLERANCE[ours.dtype]), what


def test_one_item_that_is_not_finite(linear_kernels):
    args, ab = inputs(F32, 1, 3, 5, 3, 2, 40, "BKM", "pixel", True, True, True), weights(1, 3)
    good, good_grads = both(linear_kernels, args, *ab)
    args[2][1, 2, 7] = float("nan")
    out, grads = both(linear_kernels, args, *ab)
    assert out[0][0, 1].isnan()
    assert out[1][1].isnan()
    for i, axis in ((0, 1), (1, 0)):
        assert torch.equal(out[i].unbind(axis)[0], good[i].unbind(axis)[0])
        assert torch.equal(out[i].unbind(axis)[2], good[i].unbind(axis)[2])
    for i in (1, 2, 4):
        assert torch.equal(grads[i][::2], good_grads[i][::2])


@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_without_tensor_cores(linear_kernels, monkeypatch, diagonal):
    monkeypatch.setattr(launch, "products", lambda *tensors: "float32")
    check(linear_kernels, inputs(F32, 1, 1, 5, 3, 2, 20, "BKM", diagonal, False, True, False))


def test_the_same_bits_twice(linear_kernels):
    args, ab = inputs(F32, 1, 2, 16, 3, 2, 300, "BMK", "pixel", True, True, False), weights(1, 2)
    (out, grads), (again, grads_again) = (both(linear_kernels, args, *ab) for _ in range(2))
    for ours, theirs in zip((*out, *grads), (*again, *grads_again), strict=True):
        assert torch.equal(ours, theirs)


def test_offsets_beyond_int32(linear_kernels):
    """A batch stride and a stride of pixels beyond 2³¹ elements in all, of which next to nothing is touched."""
    B, K, pixels = 2, 2, 3
    stride_b, stride_n = 2**31 + 5, 2**30 + 3
    storage = torch.UntypedStorage(4 * (stride_b + (pixels - 1) * stride_n + K), device=DEVICE)
    F = torch.empty(0, device=DEVICE).set_(storage, 0, (B, K, pixels), (stride_b, 1, stride_n))
    F.copy_(torch.randn(B, K, pixels))
    x, loc, _, W, m, d = inputs(F32, 1, B, K, 2, 2, pixels, "BKM", "pixel", True, True, False)
    expected = linear_kernels.mahalanobis_and_logdet(x, loc, F.mT.contiguous().mT, W, m, d)
    for ours, theirs in zip(linear_kernels.mahalanobis_and_logdet(x, loc, F, W, m, d), expected, strict=True):
        assert torch.equal(ours, theirs)
