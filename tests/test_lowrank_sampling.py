"""Samples on the CPU and their gradients against the formula in float64."""

import pytest
import sampling_cases
import torch

from lowrank_mvn.factors.dense import aten, cpu
from lowrank_mvn.factors.dense.aten import blocks

BOTH = pytest.mark.parametrize("impl", [aten, cpu], ids=["aten", "cpu"])


@BOTH
@pytest.mark.parametrize("case", sampling_cases.CASES, ids=sampling_cases.name)
def test_samples_and_gradients(case, impl):
    sampling_cases.check(impl, case, given=True, device="cpu")


@pytest.mark.parametrize("layout", ["BRN", "BNR"])
def test_several_blocks(monkeypatch, layout):
    """Blocks smaller than an item, of P and of the vectors over the pixels, and several items in one."""
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 1 << 9)
    monkeypatch.setattr(blocks, "VECTOR_VALUES", 1 << 7)
    for shared, diagonal in ((True, "pixel"), (False, "item")):
        sampling_cases.check(aten, (torch.float32, 2, 3, 130, 3, layout, diagonal, shared), given=True, device="cpu")


@BOTH
def test_noise_has_to_be_given(impl):
    loc, P, d, omega_p = sampling_cases.inputs(torch.float32, 1, 1, 5, 2)
    with pytest.raises(ValueError, match="aten takes the noise"):
        impl.rsample(loc, P, d, omega_p, None, torch.tensor([7]))


@BOTH
def test_no_samples_and_no_items(impl):
    for S, B in ((0, 2), (2, 0)):
        loc, P, d, omega_p = sampling_cases.inputs(torch.float32, S, B, 5, 2)
        omega_d = torch.randn(S, B, 5)
        assert impl.rsample(loc, P, d, omega_p, omega_d, None).shape == (S, B, 5)
        grads = impl.rsample_backward(omega_d, P, d, omega_p, omega_d, None, [True, True, True])
        assert [g.shape for g in grads] == [P.shape, d.shape, omega_d.shape]
        assert all((g == 0).all() for g in grads)
