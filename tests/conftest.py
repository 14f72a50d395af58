"""What several test files share."""

import pytest
import torch
from triton_cases import INTERPRET

from lowrank_mvn import Stencil
from lowrank_mvn.device import native
from lowrank_mvn.factors.base import Factor


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
def backend(monkeypatch):
    """What ours is computed with where nobody chooses: in the interpreter the kernels, for CPU tensors too."""
    if not INTERPRET:
        return "aten" if native.missing() else "cpu"
    choose = Factor.implementation
    monkeypatch.setattr(Factor, "implementation", lambda factor, impl: choose(factor, impl or "triton"))
    choose_local = Stencil.implementation
    monkeypatch.setattr(Stencil, "implementation", lambda local, impl: choose_local(local, impl or "triton"))
    return "triton"


@pytest.fixture
def in_torch(monkeypatch):
    """By default everything is computed with torch's operators, as where the compiled backend is missing."""
    monkeypatch.setattr(native, "_MISSING", "it was not built")


@pytest.fixture(scope="session")
def editor_folder(tmp_path_factory):
    """Runs for the editor's tests, made once for all of their files."""
    from editor_cases import make_runs

    return make_runs(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def editor_server(editor_folder):
    """The address of `sosvae edit` over them."""
    from editor_cases import browser_path, serving

    browser_path()  # without one nobody asks
    with serving(editor_folder / "runs" / "sos", editor_folder / "runs" / "beta") as (address, _):
        yield address


@pytest.fixture(params=["cpu"] if INTERPRET else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def everywhere(request, backend):
    """`backend`, and with a device once more: what a test makes is there, and goes through the compiled kernels."""
    if request.param == "cpu":
        yield backend
    else:
        torch.set_default_device(request.param)
        yield "triton"
        torch.set_default_device(None)


@pytest.fixture(scope="session", autouse=INTERPRET)
def _language_patched_once():
    """The interpreter patches Triton's language anew for every launch and every call of a device function.

    That is two fifths of its time. Nothing is compiled in a process that interprets, so it can stay as it is.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_language, done = interpreter._patch_lang, set()

    def once(function):
        languages = frozenset(v for v in function.__globals__.values() if v is language or v is language.core)
        if languages not in done:
            done.add(languages)
            patch_language(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture
def poisoned():
    """New memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tensor_cores(monkeypatch):
    """In the interpreter, the products of tensor cores: with the 11 significant bits that they read."""
    if not INTERPRET:
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


@pytest.fixture
def kernels():
    from lowrank_mvn.factors.dense import triton

    return triton


@pytest.fixture(params=["features", "blocks"])
def linear_kernels(request, monkeypatch):
    """Either way through the features, whatever would be the cheaper one; blocks of few pixels."""
    from lowrank_mvn.factors.linear import triton
    from lowrank_mvn.factors.linear.triton import blocks

    monkeypatch.setattr(blocks, "chosen", lambda *sizes: request.param == "blocks")
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 1)
    monkeypatch.setattr(blocks, "LEAST_PIXELS", 48)
    return triton
