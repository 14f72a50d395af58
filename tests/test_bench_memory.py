"""What a peak of memory counts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench import memory

ROOT = Path(__file__).parent.parent


def test_memory_is_what_a_call_needs():
    size = 1 << 26

    def call():
        return np.ones(size // 8).sum() + np.ones(size // 16).sum()  # the first is gone before the second is made

    peak, by = memory.peak_above(call, "cpu")
    assert by in ("resident", "maxrss")
    if by == "resident":
        assert 0.95 * size < peak < 1.3 * size


FRAGMENTS = """
import numpy as np
from bench import memory

def call():
    first, between = np.ones(2 << 20), np.ones(1 << 17)  # 16 MiB and, beside it, 1
    del first
    return np.ones(17 << 17).sum() + between.sum()  # a MiB more than the hole holds

np.ones(3 << 20)  # freed: from now on glibc keeps pieces of up to 24 MiB, unless the environment says otherwise
call()
print(*memory.peak_above(call, "cpu"))
"""


def test_memory_is_not_what_an_allocator_holds_between_two_pieces():
    environment = {**os.environ, **memory.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FRAGMENTS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peak, by = done.stdout.split()
    if by == "resident":
        assert 17 << 20 < int(peak) < 20 << 20
