"""The compiled passes of a stencil against `aten` in float64: instructions, layouts, sizes of a unit of work, threads.

What they share with every implementation is in `test_stencil.py` and `test_stencil_operators.py`, which run on them.
"""

import os

import pytest
import torch
from lowrank_cases import relative
from stencil_cases import F64, SHAPES, weights

from lowrank_mvn import Stencil, StencilMultivariateNormal
from lowrank_mvn.device import native
from lowrank_mvn.local.stencil import aten, cpu

pytestmark = pytest.mark.skipif(
    native.missing() is not None and not os.environ.get("CI"), reason=f"not built: {native.missing()}"
)
# Several units of lines, vectors with a rest, more channels than one, lines of other planes, no lines at all.
LARGE = [
    ("units", (2,), 3, (70, 65), (5, 5), "own", "pixel"),
    ("units-one-stencil", (1,), 3, (70, 65), (3, 3), "one", None),
    ("planes", (1,), 2, (9, 20, 17), (3, 3, 3), "own", "one"),
    ("one-line", (2,), 1, (5000,), (5,), "own", None),
]
TOLERANCE = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


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


def operands(case, S, dtype):
    """x, loc, the weights in canonical shapes, and the sizes of the image."""
    _, batch, channels, spatial, neighbourhood, stencils, ties = case
    given = weights(batch, channels, spatial, neighbourhood, stencils, ties, dtype)
    B = torch.Size(batch).numel()
    log_t, s, m = (None if t is None else t.flatten(-len(spatial)) for t in given)
    assert log_t is not None
    assert s is not None
    canonical = (
        log_t.reshape(B, *log_t.shape[-2:]),
        s.reshape(B, *s.shape[-3:]),
        None if m is None else m.reshape(B, *m.shape[-2:]),
    )
    x, loc = (torch.randn(n, B, channels, log_t.shape[-1], dtype=F64).to(dtype) for n in (S, 1 if S < 5 else S))
    return x, loc, canonical, (spatial, neighbourhood)


def every_pass(of, x, loc, given, where):
    """All that an implementation makes of these; the cotangents are of the mean's and the product's numbers."""
    y, q, logdet = of.product(x, loc, *given, *where)
    seeds = loc.to(y.dtype) + 0 * y, 1 + q.detach() / (1 + q), 1 - logdet
    needs = [True, True, True, True, given[2] is not None]
    found = [y, q, logdet, of.transpose(x, *given, *where), *(of.solve(x, *given, *where, t) for t in (False, True))]
    found += of.product_backward(x, loc, *given, y, *seeds, *where, needs)
    found += of.product_backward(x, None, *given, y, None, *seeds[1:], *where, [*needs[:1], False, *needs[2:]])
    few = [False, False, True, False, False]
    return [*found, *of.product_backward(x, loc, *given, y, seeds[0], None, None, *where, few)]


def check(case, S, dtype):
    x, loc, given, where = operands(case, S, dtype)
    wide = [None if t is None else t.double() for t in given]
    ours = every_pass(cpu, x, loc, given, where)
    exact = every_pass(aten, x.double(), loc.double(), wide, where)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert relative(a, b) < TOLERANCE[torch.float32 if a.dtype == F64 != dtype else dtype], (case, S, i)
    if case in SHAPES:
        like = every_pass(aten, x, loc, given, where)
        assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in like], case
        assert all(t.is_contiguous() for t in ours), case


def test_every_pass_of_every_variant(variant):
    for case in SHAPES:
        for S in (1, 5, 37):
            check(case, S, torch.float32)
    for case in LARGE:
        check(case, 3, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_type(dtype):
    for case in SHAPES:
        for S in (1, 17):
            check(case, S, dtype)


def test_any_strides():
    """Images with channels last, weights of one item for all, samples side by side."""
    x, loc, (log_t, s, m), where = operands(LARGE[0], 20, F64)
    other = x.permute(1, 3, 2, 0).contiguous().permute(3, 0, 2, 1), loc.permute(0, 1, 3, 2).contiguous().mT
    log_t, s = log_t[:1].expand(2, -1, -1), s.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    given = log_t, s, m.mT.contiguous().mT
    plain = [t.contiguous() for t in given]
    for a, b in zip(every_pass(cpu, *other, given, where), every_pass(cpu, x, loc, plain, where), strict=True):
        assert torch.equal(a, b)


def test_one_thread_and_several_give_the_same_bits():
    threads = torch.get_num_threads()
    try:
        for case in LARGE:
            given = operands(case, 37, torch.float32)
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(every_pass(cpu, *given))
            for several in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], several, strict=True)), case
    finally:
        torch.set_num_threads(threads)


def test_an_item_with_nan_touches_no_other():
    log_t, s, _ = weights((2,), 1, (9, 9), (3, 3), dtype=torch.float32)
    s[0, 0, 0, 4, 4] = torch.nan
    D = StencilMultivariateNormal(torch.zeros(2, 81), Stencil(log_t, s), validate_args=False)
    y = D.rsample((20,))
    assert y[:, 1].isfinite().all()
    assert y[:, 0].isnan().any()
    assert D.log_prob(torch.randn(2, 81)).isnan().tolist() == [True, False]


def test_aten_is_there_to_be_chosen(in_torch):
    stencil = Stencil(*weights((2,), 1, (4, 5), (3, 3))[:2])
    assert stencil.implementation(None) == "aten"
    with pytest.raises(ValueError, match="impl='cpu' is not available for a Stencil on cpu"):
        stencil.implementation("cpu")
