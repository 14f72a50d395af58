"""Runs the tests of the kernels in Triton's interpreter: a process of its own. `test_triton_kernels.py` says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["test_triton_kernels.py", "test_triton_sampling.py", "test_triton_operators.py", "test_triton_linear.py"],
)
def test_in_the_interpreter(name):
    # In float32 as ever, on one thread: the interpreter is numpy on small arrays.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    done = subprocess.run(command, cwd=HERE.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_importing_the_package_imports_no_triton():
    code = "import sys, lowrank_mvn; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
