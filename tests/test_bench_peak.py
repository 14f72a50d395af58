"""What a peak of memory counts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import peak

ROOT = Path(__file__).parent.parent
CODE = """
import numpy as np
from bench import peak

def call():
    first, between = np.ones(2 << 20), np.ones(1 << 17)  # 16 MiB and, beside it, 1
    del first
    return np.ones(17 << 17).sum() + between.sum()  # a MiB more than the hole holds

np.ones(3 << 20)  # freed: from now on glibc keeps pieces of up to 24 MiB, unless the environment says otherwise
call()
print(*peak.peak_above(call, "cpu"))
"""


def test_a_peak_is_what_a_call_needs():
    size = 1 << 26

    def call():
        return np.ones(size // 8).sum() + np.ones(size // 16).sum()  # the first is gone before the second is made

    found, by = peak.peak_above(call, "cpu")
    if by == "resident":
        assert 0.95 * size < found < 1.3 * size
    else:
        assert np.isnan(found)


def test_a_peak_is_not_what_an_allocator_keeps_between_two_pieces():
    environment = {**os.environ, **peak.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found, *by = done.stdout.split()
    if not by:
        pytest.skip("this system gives no resident peak")
    assert 17 << 20 < float(found) < 20 << 20
