"""Paths through the kernels that the sizes of `test_triton_kernels.py` do not reach, each with an input that does.

Runs as that file does.
"""

import pytest
import torch
from lowrank_cases import BF16, F32, F64, relative
from triton_cases import DEVICE, INTERPRET, MARKS, NAMES, both, check, inputs, name, oracle, weights, wide

from lowrank_mvn.device import launch
from lowrank_mvn.device.launch import Block
from lowrank_mvn.factors.dense import aten

pytestmark = MARKS


@pytest.fixture
def short(monkeypatch, kernels):
    """Every program has one block of columns, so that small cases have many splits."""
    monkeypatch.setattr(launch, "split_columns", lambda N, R, block_n: block_n)


@pytest.fixture
def tiled(monkeypatch, kernels):
    """Ranks above 16 are walked over in tiles of 16 rows, as those above 128 are in tiles of 64."""
    monkeypatch.setattr(launch, "FUSED_R", 16)
    monkeypatch.setattr(launch, "TILED_R", 16)


def test_rank_that_shared_memory_does_not_hold(kernels, monkeypatch):
    """Where a program may have little of it, the backward kernel walks over tiles and the others do not."""
    rows, start = {}, launch.launch

    def noted(kernel, *args, **arguments):
        if "TILE" in arguments:
            rows[kernel.fn.__name__] = arguments["TILE"].ROWS
        start(kernel, *args, **arguments)

    monkeypatch.setattr(launch, "shared_memory", lambda device: 65536)
    monkeypatch.setattr(launch, "TILED_R", 16)
    monkeypatch.setattr(launch, "launch", noted)
    check(kernels, inputs(F32, 1, 1, 40, 18, "BRN", "pixel", True))
    assert (rows["backward_kernel"], rows["residual_kernel"]) == (16, 32)


SPLITS = [
    (F32, 1, 2, 200, 3, "BNR", "pixel", True),  # δ stands in a free row of P
    (F32, 2, 1, 70, 25, "BRN", "item", True),
    (F32, 1, 2, 70, 25, "BNR", "pixel", True),
    (F64, 1, 2, 70, 3, "BRN", "pixel", True),
    (BF16, 2, 1, 133, 16, "BRN", "pixel", False),
]


def check_splits(kernels, case):
    args = inputs(*case)
    check(kernels, args)
    expected = aten.normal_equations(*wide(args))
    for ours, theirs in zip(kernels.normal_equations(*args), expected, strict=True):
        assert relative(ours, theirs) < 1e-6


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("case", SPLITS, ids=name)
def test_many_splits(kernels, case):
    check_splits(kernels, case)


@pytest.mark.usefixtures("short", "tiled")
def test_many_splits_of_tiles(kernels):
    check_splits(kernels, (F32, 1, 1, 131, 18, "BRN", "pixel", True))


@pytest.fixture
def shared_out(monkeypatch, kernels):
    """Three programs share the samples of the same columns, and add up what they have in common."""
    monkeypatch.setattr(launch, "sample_chunks", lambda S, N, R: 3)


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize(
    "case",
    [
        (F32, 5, 2, 70, 3, "BRN", "pixel", True),
        (F32, 5, 2, 70, 3, "BNR", "item", False),
        (F32, 2, 1, 70, 20, "strided", "item", True),
        (F64, 4, 2, 40, 3, "BRN", "pixel", True),
        (BF16, 4, 2, 40, 16, "BNR", "pixel", True),
    ],
    ids=name,
)
def test_samples_that_several_programs_share(kernels, case):
    """Fewer samples than programs, and programs with a sample more than others, too."""
    args = inputs(*case)
    check(kernels, args)
    check(kernels, args, needs=[False, True, False, True])


@pytest.mark.usefixtures("shared_out", "tiled")
def test_samples_that_several_programs_share_in_tiles_and_in_float64(kernels):
    x, loc, P, d = collinear(18)
    args = torch.cat([x, x + 0.1, x - 0.1, 2 * x]), loc, P, d
    assert check(kernels, args, tolerance=2e-3)[-1].tolist() == [False, True]


def test_how_many_programs_share_samples(kernels):
    """None as long as there are few, or many columns; and partial sums of P are at most an eighth of x."""
    chunks = launch.sample_chunks
    assert chunks(1, 784, 25) == chunks(0, 784, 25) == chunks(64, 784, 25) == chunks(10**6, 2**24, 25) == 1
    assert chunks(100_000, 784, 25) * 4 >= 1000
    for S, N, R in [(10_000, 784, 25), (500, 1, 1), (3000, 12288, 100)]:
        assert 8 * chunks(S, N, R) * N * R <= S * N


@pytest.mark.parametrize("R", [1, 420, 5000])
@pytest.mark.parametrize("block", [16, 128])
def test_a_product_of_mantissas_is_finite(kernels, R, block):
    """A lane of a program has one in each block of columns, each below 2."""
    assert launch.split_columns(10**7, R, block) // block < 1024


def test_log_of_many_variances_does_not_overflow(kernels, monkeypatch):
    """As many columns as a large rank asks for, mantissas of nearly 2."""
    columns = launch.split_columns(10**7, 5000, 16)
    monkeypatch.setattr(launch, "split_columns", lambda N, R, block_n: columns)
    monkeypatch.setattr(launch, "block", lambda *_: Block(1, 16))
    x, loc, P, d = inputs(F32, 1, 1, columns + 5, 1, "BNR", "pixel", True)
    d = torch.full_like(d, 0.99)
    out = kernels.mahalanobis_and_logdet(x, loc, P, d)
    assert relative(out[1], aten.mahalanobis_and_logdet(*wide((x, loc, P, d)))[1]) < 1e-6


def test_more_pixels_than_an_int32_counts_are_an_error(kernels):
    meta = torch.empty(1, 2**31, 1, device="meta")
    with pytest.raises(ValueError, match="an item has 2147483648 pixels, the kernels take at most"):
        kernels.rsample(meta[None, ..., 0], meta, meta[..., 0], meta[:, :1], None, meta[:, 0, 0])


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
@pytest.mark.parametrize("diagonal", ["pixel", "item"])
def test_tiles_of_the_rank_and_samples(kernels, needs, diagonal):
    """Pairs of tiles, several samples with one mean for all and one for each."""
    args = inputs(F32, 2, 1, 40, 18, "BRN" if diagonal == "pixel" else "BNR", diagonal, needs[0] == 1)
    check(kernels, args, needs=needs)


def test_float64_above_32_rows(kernels):
    check(kernels, inputs(F64, 1, 1, 40, 33, "BRN", "pixel", True))


@pytest.mark.usefixtures("tiled")
def test_float64_in_tiles(kernels):
    check(kernels, inputs(F64, 2, 1, 40, 18, "BRN", "pixel", True))


def collinear(R, N=40, **options):
    """Two items; in the second, C has a condition of 1e9."""
    x, loc, P, d = inputs(F32, 1, 2, N, R, "BRN", "item", True, **options)
    P, d = P.contiguous(), torch.full_like(d, 1e-7)
    P[1, :, 1] = P[1, :, 0] + 1e-5 * P[1, :, 1]
    return x, loc, P, d


def check_collinear(kernels, R, diagonal):
    x, loc, P, d = collinear(R)
    if diagonal == "pixel":
        d = d.expand(-1, x.shape[-1]) * (0.5 + torch.rand_like(x[0]))
    *_, flags = check(kernels, (x, loc, P, d))
    assert flags[1]


@pytest.mark.parametrize(("R", "diagonal"), [(4, "item"), (4, "pixel"), (33, "pixel")])
def test_every_gradient_of_an_item_that_is_made_again_in_float64(kernels, R, diagonal):
    check_collinear(kernels, R, diagonal)


@pytest.mark.usefixtures("tiled")
def test_every_gradient_of_an_item_that_is_made_again_in_float64_in_tiles(kernels):
    check_collinear(kernels, 18, "pixel")


@pytest.mark.usefixtures("tiled")
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_100", "gfx"])
@pytest.mark.parametrize("case", [(F32, 1, 2, 40, 9), (F32, 2, 1, 40, 18), (F64, 1, 1, 20, 3)], ids=str)
def test_what_other_targets_choose(kernels, monkeypatch, target, case):
    """Products in plain float32 where there are no tensor cores for them, sums of products in float64 on AMD's."""
    monkeypatch.setattr(launch, "target", lambda device: target)
    args = inputs(*case, "BRN", "pixel", True)
    float32 = "float32" if target in ("sm_75", "gfx") else "tf32"
    assert launch.products(*args) == ("float64" if case[0] == F64 else float32)
    assert launch.of_matrices("float64", args[0].device) == ("outer" if target == "gfx" else "float64")
    check(kernels, args)
    loc, P, d = args[1:]
    omega_p, omega_d = torch.randn_like(P[None, :, 0]), torch.randn_like(loc)
    y = kernels.rsample(loc, P, d, omega_p, omega_d, None)
    loc, P, d, omega_p, omega_d = wide((loc, P, d, omega_p, omega_d))
    assert relative(y, loc + torch.einsum("bnr,sbr->sbn", P, omega_p) + d.sqrt() * omega_d) < 1e-6


def test_an_item_with_nothing_observed(kernels):
    x, loc, P, d = inputs(F32, 2, 3, 40, 7, "BNR", "pixel", True)
    precision = d.reciprocal()
    precision[1] = 0
    precision[2, 3:] = 0
    gram, w = kernels.normal_equations(x, loc, P, precision)
    assert not gram[1].any()
    assert not w[:, 1].any()
    expected = aten.normal_equations(*wide((x, loc, P, precision)))
    for ours, theirs in zip((gram, w), expected, strict=True):
        assert relative(ours[..., 2, :], theirs[..., 2, :]) < 1e-6


def test_any_strides(kernels):
    """x and d with gaps, a mean of one value, P shared by the items, expanded cotangents."""
    N, R = 37, 5
    holder = torch.full((2, 2, 2 * N), float("nan"), device=DEVICE)
    x = holder[..., ::2].copy_(torch.randn(2, 2, N))
    loc = torch.randn(1, 1, 1, device=DEVICE).expand(1, 2, N)
    P = torch.randn(1, R, N, device=DEVICE).mT.expand(2, N, R)
    d = (0.5 + torch.rand(N, 2, device=DEVICE)).T
    args, one = (x, loc, P, d), torch.ones((), dtype=F64, device=DEVICE)
    check(kernels, args)
    ab = one.expand(2, 2), one.expand(2)
    for what, ours, theirs in zip(NAMES[4:], both(kernels, args, *ab)[1], oracle(args, *ab)[1], strict=True):
        assert relative(ours, theirs) < 2e-6, what


@pytest.mark.parametrize("which", range(4), ids=["x", "loc", "P", "d"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_value_that_is_not_finite_spoils_its_item_alone(kernels, which, bad):
    args, ab = inputs(F32, 1, 3, 20, 3, "BNR", "pixel", False), weights(1, 3)
    good, good_grads = both(kernels, args, *ab)
    args[which].select(0 if which > 1 else 1, 1).flatten()[4] = bad
    assert sum((~t.isfinite()).sum() for t in args) == 1
    out, grads = both(kernels, args, *ab)
    assert not (out[0][0, 1] + out[1][1]).isfinite()
    for at, ours, theirs in zip((1, 0, 1, 1, 0, 0), (*out[:2], *grads), (*good[:2], *good_grads), strict=True):
        for item in (0, 2):
            assert torch.equal(ours.select(at, item), theirs.select(at, item))


@pytest.mark.parametrize("d", [2e-38, 0.0, -1.0], ids=["smallest", "zero", "negative"])
def test_a_diagonal_that_is_hardly_or_not_positive(kernels, d):
    """Two pixels without a factor, so that D alone is there: the smallest normal float32, and what is no variance."""
    args = inputs(F32, 1, 2, 20, 3, "BRN", "pixel", True)
    args[2][1, :2], args[3][1, :2] = 0, d
    args[0][:, 1, :2] = args[1][:, 1, :2]
    expected = aten.mahalanobis_and_logdet(*wide(args))
    q, logdet, *_ = kernels.mahalanobis_and_logdet(*args)
    assert relative(q[:, 0], expected[0][:, 0]) < 2e-6
    assert relative(logdet[:1], expected[1][:1]) < 2e-6
    if d > 0:
        assert relative(q[:, 1], expected[0][:, 1]) < 2e-6
        assert relative(logdet[1:], expected[1][1:]) < 2e-6
    else:
        assert not (q[0, 1] + logdet[1]).isfinite()


def test_the_flag_of_one_item_for_all(kernels):
    """What is expanded over the items has a stride of 0, and nothing behind it is read."""
    x, loc, P, d = inputs(F32, 1, 1, 12, 3, "BRN", "pixel", True)
    a, b = weights(1, 1)
    _, _, L_inv, v, *kept = kernels.mahalanobis_and_logdet(x, loc, P, d)
    flags = torch.tensor([True, False, False, False], device=DEVICE)
    expected = kernels.mahalanobis_and_logdet_backward(
        a, b, x, loc, P, d, L_inv, v, *kept[:2], flags[:1].clone(), [True] * 4
    )

    def items(t, at=0):
        return t.expand(*t.shape[:at], 4, *t.shape[at + 1 :])

    ours = kernels.mahalanobis_and_logdet_backward(
        items(a, 1), items(b), items(x, 1), items(loc, 1), items(P), items(d), items(L_inv), items(v, 1),
        *(items(t, 1) for t in kept[:2]), items(flags[:1]), [True] * 4,
    )  # fmt: skip
    for what, mine, theirs, at in zip(NAMES[4:], ours, expected, (1, 1, 0, 0), strict=True):
        for i in range(4):
            assert torch.equal(mine.select(at, i), theirs.select(at, 0)), what


if not INTERPRET:

    def test_items_beyond_int32(kernels):
        """P of more than 2³¹ elements, whose second half has other values."""
        B, N, R = 2, 2**25 + 5, 33
        if torch.cuda.mem_get_info()[0] < 3 * 2 * B * N * R:
            pytest.skip("too little memory")
        P = torch.randn(B, R, N, device=DEVICE, dtype=BF16).mT
        assert P.numel() > 2**31
        x, loc = torch.randn(2, 1, B, N, device=DEVICE, dtype=BF16)
        d = torch.ones(B, 1, device=DEVICE, dtype=BF16)
        together = kernels.mahalanobis_and_logdet(x, loc, P, d)
        for i in range(B):
            alone = kernels.mahalanobis_and_logdet(x[:, i : i + 1], loc[:, i : i + 1], P[i : i + 1], d[i : i + 1])
            assert torch.equal(alone[0][:, 0], together[0][:, i])
            assert torch.equal(alone[1][0], together[1][i])
