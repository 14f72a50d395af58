"""Bounds on the bandwidth of a main loop on an H100: a count of instructions over the rates of the pipes.

Not a timing. Nothing is said about latency, caches, or about what lies outside the main loop.
"""

import re
from collections import Counter
from collections.abc import Mapping

from .machine_code import width

MULTIPROCESSORS, CLOCK = 132, 1.7e9  # H100 SXM5; clock in Hz, sustained
MEMORY = 3.0e12  # bytes/s that its memory is seen to deliver
LATENCY = 600e-9  # seconds from a load to its value out of memory, under load

# Warp instructions per clock and multiprocessor: results per clock of the CUDA C++ programming guide's table
# "Throughput of native arithmetic instructions", column 9.0, over 32 lanes.
ISSUE = 4.0
INTEGER = 2.0  # 64: add, compare, minimum, logic, shift; selections go the same way
MULTIPLY = 2.0  # 64: integer multiply and multiply-add
DOUBLE = 2.0  # 64
SPECIAL = 0.5  # 16: reciprocals, roots, logarithms, sines
CONVERT = 0.5  # 16 from and to 64-bit types, taken for all that are not packings of halves
PACK = 2.0  # 64: conversions between float32 and half precision
SHUFFLE = 1.0  # 32, by way of the load and store units
LOAD_STORE = 1.0  # 32 lanes address at once
# Bytes per clock and multiprocessor of shared memory and first-level cache (H100 tuning guide: 32 banks of 4 bytes).
SHARED = 128.0
# Dense operations per clock and multiprocessor: 495 TFLOP/s of tf32, 990 of half precision at 1.83 GHz and 67 of
# float64 (H100 data sheet).
TENSOR, TENSOR_HALF, TENSOR_DOUBLE = 2048.0, 4096.0, 256.0
SYNC = 0.62  # what mma.sync reaches of wgmma's rate on Hopper (Luo et al., arXiv:2402.13499)

_INTEGER = {
    *("IADD", "IADD3", "VIADD", "VIADDMNMX", "LOP3", "LOP", "PLOP3", "SHF", "SHL", "SHR", "LEA", "ISETP", "ICMP"),
    *("SEL", "FSEL", "FSETP", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "VIMNMX3", "PRMT", "BMSK", "SGXT", "IABS", "FSET"),
}

ASSUMPTIONS = f"""\
Bounds for an H100: {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9} GHz; per clock and multiprocessor {ISSUE:.0f} \
warp instructions issued, {INTEGER:.0f} integer, logic,
compare or select, {MULTIPLY:.0f} integer multiplications, {DOUBLE:.0f} in the float64 pipe, {SPECIAL} special \
functions, {CONVERT} conversions, {LOAD_STORE:.0f} load, store or
shuffle (rates: CUDA C++ programming guide, throughput of native arithmetic instructions, 9.0); {SHARED:.0f} bytes \
each of shared memory and
first-level cache, with the bank conflicts that the PTX's addresses make; {TENSOR:.0f} dense tf32 operations by wgmma \
(data sheet), of which
mma.sync reaches {SYNC:.0%} (arXiv:2402.13499); wgmma's operands in shared memory are read there. Bytes are those of P \
in the main loop (read and,
for grad_P, written); of a linear factor those of F, where a d per pixel is counted for one channel of C; of a product \
those of its right operand, for up to 64 rows of the left one. \
Every instruction of the loop is counted once per step, cold branches and those under a \
predicate too. In flight:
tiles of P that resident programs have asked for (stages − 1 of each, at least one), with the columns of x, μ and d \
that go with them, against {LATENCY * 1e9:.0f} ns × \
{MEMORY / 1e12:.1f} TB/s / {MULTIPROCESSORS} = {LATENCY * MEMORY / MULTIPROCESSORS / 1e3:.1f} kB.
No latency, nothing outside the loop. These are bounds, not timings: nothing was run on a GPU."""


def in_flight(row: dict) -> str:
    """Bytes of P (or F) that one multiprocessor waits for, and how they come about."""
    rows, columns = row["tile"]
    stages = max(1, row["num_stages"] - 1)
    return f"{stages} × {rows}×{columns} × {row['programs']} = {row['bytes_in_flight'] / 1e3:.1f} kB"


def needed_in_flight() -> float:
    """Bytes per multiprocessor under way at any time for memory to deliver its rate (Little's law)."""
    return LATENCY * MEMORY / MULTIPROCESSORS


def caps(
    loop: Counter, num_warps: int, bytes_of_P: float, conflicts: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Bytes/s at which each pipe alone would hold the loop, for `bytes_of_P` per turn of a program."""
    conflicts = conflicts or {}
    clocks: Counter[str] = Counter()
    for instruction, count in loop.items():
        name = instruction.split(".")[0]
        moved = count * 32 * width(instruction) / SHARED
        clocks["issue"] += count / ISSUE
        if name in _INTEGER:
            clocks["integer"] += count / INTEGER
        elif name == "IMAD" and not re.search(r"\.(MOV|SHL|IADD)\b", instruction):
            clocks["multiply"] += count / MULTIPLY
        elif name in ("HMMA", "HGMMA", "DMMA"):
            clocks["tensor"] += count * _tensor_clocks(instruction)
            clocks["shared"] += count * _operand_bytes(instruction) / SHARED
        elif name in ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"):
            clocks["float64"] += count / DOUBLE
        elif name == "MUFU":
            clocks["special"] += count / SPECIAL
        elif name in ("F2F", "I2F", "F2I", "FRND"):
            clocks["convert"] += count / CONVERT
        elif name in ("F2FP", "I2FP", "HADD2"):  # HADD2.F32 widens a half
            clocks["integer"] += count / PACK
        elif name in ("LDS", "STS", "LDSM", "STSM"):
            clocks["load/store"] += count / LOAD_STORE
            clocks["shared"] += moved * conflicts.get(name, 1.0)
        elif name in ("LDG", "STG", "LDGSTS"):
            clocks["load/store"] += count / LOAD_STORE
            clocks["L1"] += moved
            if name == "LDGSTS":  # from memory to shared memory
                clocks["shared"] += moved * conflicts.get(name, 1.0)
        elif name == "SHFL":
            clocks["load/store"] += count / SHUFFLE
    rate = MULTIPROCESSORS * CLOCK * bytes_of_P / num_warps
    return {pipe: rate / n for pipe, n in clocks.items() if n}


def _shape(instruction: str) -> tuple[int, int, int]:
    """m, n, k of a matrix instruction."""
    if group := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        m, n, k = (int(text) for text in group.groups())
        return m, n, k
    shape = re.search(r"\.(16|8)x?(8)x?(16|8|4)\b", instruction)
    m, n, k = (int(text) for text in shape.groups()) if shape else (16, 8, 8)
    return m, n, k


def _tensor_clocks(instruction: str) -> float:
    """Clocks of the multiprocessor's tensor cores for what one warp does of a matrix instruction."""
    m, n, k = _shape(instruction)
    operations = 2 * m * n * k
    if instruction.startswith("DMMA"):
        return operations / TENSOR_DOUBLE
    rate = TENSOR if "TF32" in instruction else TENSOR_HALF
    if instruction.startswith("HGMMA"):
        return operations / 4 / rate  # one instruction in each of four warps
    return operations / (rate * SYNC)


def _operand_bytes(instruction: str) -> float:
    """Bytes of shared memory that one warp's share of a matrix instruction reads: wgmma's only."""
    if not instruction.startswith("HGMMA"):
        return 0.0
    m, n, k = _shape(instruction)
    rows = n + (m if instruction.endswith("SS") else 0)
    return rows * k * (4 if "TF32" in instruction else 2) / 4
