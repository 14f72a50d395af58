"""The compiled CPU backend by itself: its instructions, its threads, its layouts, and what happens without it."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from lowrank_cases import draw, oracle, parameters, relative

import lowrank_mvn
from lowrank_mvn.device import native
from lowrank_mvn.factors.dense import cpu

pytestmark = pytest.mark.skipif(
    native.missing() is not None and not os.environ.get("CI"), reason=f"not built: {native.missing()}"
)
F32, F64 = torch.float32, torch.float64
NAMES = "loc", "P", "d", "x"


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request):
    """Each kind of vectors that this processor has."""
    own = native.variant()
    try:
        native.use_variant(request.param)
    except ValueError:
        pytest.skip(f"no {request.param} here")
    yield request.param
    native.use_variant(own)


def loss(impl):
    def total(loc, P, d, x):
        log_prob, entropy = lowrank_mvn.log_prob_and_entropy(x, loc, P, d, impl=impl)
        weights = torch.linspace(0.5, 2, log_prob.numel(), dtype=F64).view(log_prob.shape)
        return (log_prob.double() * weights).sum() - 0.7 * entropy.double().sum()

    return total


def everything(impl, *tensors):
    """The loss, and its gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    total = loss(impl)(*leaves)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def exact(*tensors):
    """The same by torch's class in float64."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    loc, P, d, x = leaves
    distribution = oracle(loc, P, d)
    log_prob = distribution.log_prob(x)
    weights = torch.linspace(0.5, 2, log_prob.numel(), dtype=F64).view(log_prob.shape)
    total = (log_prob * weights).sum() - 0.7 * distribution.entropy().sum()
    return [total.detach(), *torch.autograd.grad(total, leaves)]


# Ends of blocks (256 pixels, 128 in float64), of tiles (3 and 5 rows), of squares of 8, of chunks (4096).
SIZES = [(1, 1), (7, 2), (8, 3), (9, 8), (16, 9), (31, 5), (255, 16), (257, 26), (300, 33), (513, 7), (4097, 4)]
TOLERANCE = {F64: 1e-11, F32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["BNR", "BRN"])
def test_ragged_sizes_of_every_variant(variant, layout, dtype):
    for N, R in SIZES:
        for diagonal in ("pixel", "item"):
            loc, P, d = parameters((2,), N, R, layout, diagonal, dtype=dtype)
            x = draw(loc, P, d, samples=(3,) if R < 9 else ())
            for name, a, b in zip(("loss", *NAMES), everything("cpu", loc, P, d, x), exact(loc, P, d, x), strict=True):
                assert relative(a, b) < TOLERANCE[dtype], (name, N, R, diagonal)


@pytest.mark.parametrize("seed", range(40))
def test_fuzzed_sizes(seed):
    r = torch.Generator().manual_seed(seed)

    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=r))]

    N, R = int(torch.randint(1, 1200, (), generator=r)), int(torch.randint(1, 40, (), generator=r))
    batch, dtype = one_of((), (1,), (5,), (40,), (2, 3)), one_of(F32, F32, F64, torch.bfloat16)
    d = one_of(1e-5, 1.0) if dtype == F64 else 1.0
    loc, P, d = parameters(batch, N, R, one_of("BNR", "BRN", "strided"), one_of("pixel", "item"), dtype=dtype, d=d)
    x = draw(loc, P, d, samples=one_of((), (2,), (33,)))
    for name, a, b in zip(("loss", *NAMES), everything("cpu", loc, P, d, x), exact(loc, P, d, x), strict=True):
        assert relative(a, b) < (1e-8 if dtype == F64 else 3 * TOLERANCE[dtype]), (name, N, R, batch, dtype)


def test_many_samples_in_groups():
    loc, P, d = parameters((2,), 700, 40, dtype=F32)
    x = draw(loc, P, d, samples=(70,))
    for name, a, b in zip(("loss", *NAMES), everything("cpu", loc, P, d, x), exact(loc, P, d, x), strict=True):
        assert relative(a, b) < 1e-5, name


def test_pixels_that_lie_apart():
    """Gaps behind pixels, one mean for all samples, and expanded tensors."""
    holder = torch.randn(2, 90, 11, dtype=F64)
    P, loc, d = holder[..., :5], torch.randn(1, dtype=F64).expand(90), torch.rand(1, 90, dtype=F64).expand(2, 90) + 0.5
    x = torch.randn(90, 3, 2, dtype=F64).movedim(0, -1)
    ours, theirs = (everything(impl, loc, P, d, x) for impl in ("cpu", "aten"))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-12
    assert holder[..., 5:].isfinite().all()


# --- Threads ----------------------------------------------------------------------------------------------------------


def operands(B, N, R):
    """Of several items the second has nearly collinear columns, so that it takes products in float64."""
    loc, P, d = parameters((B,), N, R, dtype=F32)
    if B > 1:
        P[1], d[1] = P[1, :, :1] + 1e-4 * P[1], 1e-5 * d[1]
    return loc, P, d, draw(loc, P, d)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# An item by several threads, and each thread its items.
@pytest.mark.parametrize(("B", "N", "R"), [(1, 20_000, 5), (3, 9_000, 25), (70, 300, 4)])
def test_any_number_of_threads_gives_the_same_bits(threads, B, N, R):
    tensors = operands(B, N, R)
    noise = torch.randn(B, R), torch.randn(B, N)
    found = []
    for count in (1, 2, 5, 16):
        threads(count)
        found.append([*everything("cpu", *tensors), lowrank_mvn.rsample(*tensors[:3], noise=noise, impl="cpu")])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_several_callers_at_once(threads):
    threads(4)
    tensors = operands(2, 30_000, 8)
    expected, wrong = everything("cpu", *tensors), []

    def call():
        for _ in range(20):
            if not all(map(torch.equal, expected, everything("cpu", *tensors))):
                wrong.append(True)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_process_that_forks_goes_on():
    code = """
import os, torch, lowrank_mvn
torch.set_num_threads(3)
P = torch.randn(2, 50_000, 5)
def entropy(): return lowrank_mvn.entropy(P, 1.0, impl="cpu")
before = entropy()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(before, entropy()) else 1)
print(os.waitpid(child, 0)[1], torch.equal(before, entropy()))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0 True", done.stderr


# --- What it is not good for ------------------------------------------------------------------------------------------


def test_without_the_library_the_error_says_why_and_the_default_is_aten(monkeypatch):
    P = torch.randn(2, 5, 2)
    assert lowrank_mvn.arguments.as_factor(P).implementation(None) == "cpu"
    monkeypatch.setattr(native, "_MISSING", "it was not built")
    assert lowrank_mvn.arguments.as_factor(P).implementation(None) == "aten"
    with pytest.raises(ValueError, match=r"impl='cpu' is not available for tensors on cpu.*: it was not built"):
        lowrank_mvn.entropy(P, 1.0, impl="cpu")


def test_a_tensor_elsewhere_is_an_error():
    with pytest.raises(ValueError, match="impl='cpu' is not available for tensors on meta"):
        lowrank_mvn.entropy(torch.randn(5, 2, device="meta"), torch.ones(5, device="meta"), impl="cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_an_item_that_is_not_finite_leaves_the_others_alone(which, bad):
    tensors = operands(3, 600, 6)
    expected = everything("cpu", *tensors)
    tensors[which][1, 5] = bad
    log_prob, entropy = lowrank_mvn.log_prob_and_entropy(tensors[3], *tensors[:3], impl="cpu")
    assert log_prob.isfinite().tolist() == [True, False, True]
    assert entropy.isfinite().tolist() == [True, which in (0, 3), True]
    for a, b in zip(expected[1:], everything("cpu", *tensors)[1:], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])


def test_wide_items_are_marked_as_by_aten():
    loc, P, d, x = operands(3, 900, 6)
    tensors = [t.unsqueeze(0) for t in (x, loc)]
    assert cpu.mahalanobis_and_logdet(*tensors, P, d)[-1].tolist() == [False, True, False]
    for name, a, b in zip(("loss", *NAMES), everything("cpu", loc, P, d, x), exact(loc, P, d, x), strict=True):
        assert relative(a, b) < 1e-3, name
