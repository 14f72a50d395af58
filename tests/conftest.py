"""What several test files share."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a device that torch can see; without one they are skipped, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """New memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tensor_cores(monkeypatch):
    """The interpreter multiplies in full precision where tensor cores read 11 significant bits: here the operands of
    every tf32 product are cut to these, so that split products are tested with the error that they have."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def cut(handle):
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self, a, b, d, input_precision, *rest):
        if getattr(input_precision, "name", "") == "TF32" and a.data.dtype == np.float32:
            a, b = cut(a), cut(b)
        return plain(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
