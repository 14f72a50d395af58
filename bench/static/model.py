"""Bounds on the bandwidth of a main loop on an H100: a count of instructions over the rates of the pipes.

Not a timing. Nothing is said about latency, bank conflicts, caches, or about what lies outside the main loop.
"""

import re
from collections import Counter

MULTIPROCESSORS, CLOCK = 132, 1.7e9  # H100 SXM5; clock in Hz, sustained
MEMORY = 3.0e12  # bytes/s that its memory is seen to deliver

# Warp instructions per clock and multiprocessor (CUDA programming guide, throughput of native instructions, 9.0).
ISSUE = 4.0
DOUBLE = 2.0  # 64 lanes
SPECIAL = 0.5  # 16 lanes: reciprocals, roots, logarithms; conversions from and to 64 bits have the same rate
CONVERT = 0.5
LOAD_STORE = 1.0  # 32 lanes, shuffles too
SHARED = 128.0  # bytes per clock and multiprocessor; the same for the first-level cache
TENSOR = 2048.0  # dense tf32 operations per clock and multiprocessor (495 TFLOP/s at 1.83 GHz)
TENSOR_DOUBLE = 256.0

ASSUMPTIONS = f"""\
Bounds for an H100: {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9} GHz; per clock and multiprocessor {ISSUE:.0f} \
warp instructions issued, {DOUBLE:.0f} in the float64
pipe, {SPECIAL} special functions, {CONVERT} conversions from or to 64 bits, {LOAD_STORE:.0f} load, store or shuffle, \
{SHARED:.0f} bytes each of shared memory and of the
first-level cache, {TENSOR:.0f} dense tf32 operations. Bytes are those of P in the main loop (read and, for grad_P, \
written). Every instruction
of the loop is counted once per step, cold branches too. No latency, no bank conflicts, nothing outside the loop.
These are bounds, not timings: nothing was run on a GPU."""


def caps(loop: Counter, num_warps: int, bytes_of_P: int) -> dict[str, float]:
    """Bytes/s at which each pipe alone would hold the loop, for `bytes_of_P` per step of a program."""
    from .compiled import width

    clocks = dict.fromkeys(("issue", "tensor", "float64", "special", "convert", "load/store", "shared", "L1"), 0.0)
    for instruction, count in loop.items():
        name = instruction.split(".")[0]
        clocks["issue"] += count / ISSUE
        if name in ("HMMA", "HGMMA", "DMMA"):
            clocks["tensor"] += count * _operations(instruction) / (TENSOR_DOUBLE if name == "DMMA" else TENSOR)
        elif name in ("DFMA", "DADD", "DMUL", "DSETP"):
            clocks["float64"] += count / DOUBLE
        elif name == "MUFU":
            clocks["special"] += count / SPECIAL
        elif name in ("F2F", "I2F", "F2I"):
            clocks["convert"] += count / CONVERT
        elif name in ("LDS", "STS", "LDSM", "STSM"):
            clocks["load/store"] += count / LOAD_STORE
            clocks["shared"] += count * 32 * width(instruction) / SHARED
        elif name in ("LDG", "STG", "LDGSTS"):
            clocks["load/store"] += count / LOAD_STORE
            clocks["L1"] += count * 32 * width(instruction) / SHARED
            if name == "LDGSTS":  # from memory to shared memory
                clocks["shared"] += count * 32 * width(instruction) / SHARED
        elif name == "SHFL":
            clocks["load/store"] += count / LOAD_STORE
    rate = MULTIPROCESSORS * CLOCK * bytes_of_P / num_warps
    return {pipe: rate / n for pipe, n in clocks.items() if n}


def _operations(instruction: str) -> float:
    """Multiplications and additions of one warp's share of a matrix instruction."""
    if group := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = (int(text) for text in group.groups())
        return 2 * m * n * k / 4  # one instruction in each of four warps
    if instruction.startswith("DMMA"):
        return 2 * 8 * 8 * 4
    shape = re.search(r"\.(16)(8)(8|16|4)\.", instruction)
    m, n, k = (int(text) for text in shape.groups()) if shape else (16, 8, 8)
    return 2 * m * n * k
