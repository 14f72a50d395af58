"""Runs the tests of the kernels in Triton's interpreter: a process of its own. `test_triton_kernels.py` says why."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The longest first.
FILES = [
    "test_triton_kernels.py",
    "test_lowrank_transforms.py",
    "test_triton_linear.py",
    "test_triton_linear_class.py",
    "test_triton_paths.py",
    "test_distribution_contract.py",
    "test_triton_operators.py",
    "test_triton_tune.py",
    "test_triton_sampling.py",
    "test_triton_class.py",
    "test_lowrank_leverage.py",
    "test_stencil.py",
    "test_stencil_operators.py",
    "test_stencil_contract.py",
    "test_global_local.py",
    "test_student_t.py",
    "test_student_t_contract.py",
]
SELECTION = {
    "test_lowrank_leverage.py": ["-k", "kernels"],
    # Second derivatives are made of the same operators, at minutes of the interpreter's time; first ones are elsewhere.
    "test_stencil_operators.py": ["-k", "not derivatives"],
    # Conditionals and variances have no kernels of their own.
    "test_stencil.py": ["-k", "not condition and not estimated and not differentiable"],
    "test_global_local.py": ["-k", "densities or gradients or samples or features"],
}


def interpret(name: str) -> subprocess.CompletedProcess:
    # In float32 as ever, on one thread: the interpreter is numpy on small arrays.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    command += SELECTION.get(name, [])
    return subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sessions(request):
    """The files that this run asks for, two at a time."""
    items = [item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        yield {item.callspec.params["name"]: pool.submit(interpret, item.callspec.params["name"]) for item in items}
        pool.shutdown(cancel_futures=True)  # nobody waits for the others after the first failure under -x


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(sessions, name):
    done = sessions[name].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_importing_the_package_imports_no_triton():
    code = "import sys, lowrank_mvn; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
