"""Bank conflicts in shared memory: the addresses of one warp's 32 lanes, worked out from the PTX of a kernel.

Shared memory has 32 banks of 4 bytes and answers one word of each per clock. What a warp asks for is served in groups
of lanes that move 128 bytes together (32 lanes of 4 bytes, 16 of 8, 8 of 16; one 8×8 matrix of `ldmatrix`), and a group
takes as many clocks as the busiest bank has different words to give. Addresses depend on the lane by integer
arithmetic alone; whatever else goes into them (arguments, the step of the loop) is the same for all lanes and taken
to be zero.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

Lanes = np.ndarray  # of one value per lane, int64

_ACCESS = re.compile(
    r"(?:@!?%p\d+ )?(ld\.shared|st\.shared|ldmatrix|stmatrix|cp\.async\.c[ag]\.shared)(\S*)\s+(?:\{[^}]*\}|%\w+)?,?\s*"
    r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\d+))?\s*\](.*)"
)
_NAMES = {"ld.shared": "LDS", "st.shared": "STS", "ldmatrix": "LDSM", "stmatrix": "STSM"}


def _shift_right(a: Lanes, b: Lanes) -> Lanes:
    return a >> np.minimum(b, 63)


_BINARY: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": lambda a, b: a << np.minimum(b, 40),
    "shr": _shift_right,
    "min": np.minimum,
    "max": np.maximum,
    "rem": lambda a, b: np.where(b == 0, 0, a % np.where(b == 0, 1, b)),
    "div": lambda a, b: np.where(b == 0, 0, a // np.where(b == 0, 1, b)),
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


class _Registers(dict):
    """Values of the lanes by register; what is not known is the same for all lanes."""

    def __missing__(self, name: str) -> Lanes:
        return np.zeros(32, dtype=np.int64)

    def read(self, operand: str) -> Lanes:
        if re.fullmatch(r"-?\d+", operand):
            return np.full(32, int(operand), dtype=np.int64)
        if operand == "%tid.x":
            return np.arange(32, dtype=np.int64)
        return self[operand]

    def run(self, operation: str, operands: list[str]) -> None:
        """One instruction; one that is not integer arithmetic makes its result unknown."""
        name, *rest = operation.split(".")
        values = [self.read(operand) for operand in operands[1:]]
        if name in ("mov", "cvt", "cvta") and len(values) == 1:
            result = values[0]
        elif name in ("and", "or", "xor", "not") and "pred" in rest and name != "not":
            result = _BINARY[name](values[0], values[1])
        elif name == "not":
            result = 1 - values[0] if "pred" in rest else ~values[0]
        elif name in _BINARY and len(values) == 2:
            result = _BINARY[name](values[0], values[1])
        elif name == "mad" and len(values) == 3:
            result = values[0] * values[1] + values[2]
        elif name == "bfe":
            result = (values[0] >> values[1]) & ((1 << values[2]) - 1)
            if rest[0].startswith("s"):
                result = np.where(result >> (values[2] - 1) & 1, result - (1 << values[2]), result)
        elif name == "selp":
            result = np.where(values[2] != 0, values[0], values[1])
        elif name == "setp" and rest[0] in _COMPARE:
            result = _COMPARE[rest[0]](values[0], values[1]).astype(np.int64)
        else:
            self.pop(operands[0], None)
            return
        self[operands[0]] = result


def clocks(addresses: Lanes, width: int) -> int:
    """Clocks that shared memory takes for one access of `width` bytes per lane."""
    total = 0
    lanes = max(1, min(32, 128 // width))
    for start in range(0, len(addresses), lanes):
        words = (addresses[start : start + lanes, None] + np.arange(0, max(4, width), 4)).ravel() // 4
        words = np.unique(words)
        total += int(np.bincount(words % 32).max())
    return total


def _width(name: str, suffix: str, tail: str) -> int:
    if name.startswith("cp.async"):
        found = re.search(r",\s*(0x[0-9a-f]+|\d+)\s*(?:,|$)", tail)
        return int(found.group(1), 0) if found else 16
    count = re.search(r"\.v([248])", suffix)
    bits = re.search(r"\.[bsuf](8|16|32|64|128)$", suffix)
    return max(1, int(bits.group(1) if bits else 32) // 8 * int(count.group(1) if count else 1))


def conflicts(ptx: str) -> dict[str, float]:
    """Instruction (as the machine code calls it) -> clocks over those without conflicts, in loops if there are any."""
    registers = _Registers()
    found: list[tuple[int, str, int, int]] = []  # line, name, clocks, least
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(ptx.splitlines()):
        text = line.split("//")[0].strip().rstrip(";")
        if label := re.match(r"(\$L\w+):", text):
            labels[label.group(1)] = number
        elif jump := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", text):
            if jump.group(1) in labels:
                loops.append((labels[jump.group(1)], number))
        elif access := _ACCESS.match(text):
            name, suffix, base, offset, tail = access.groups()
            at = registers[base] + int(offset or 0)
            if "matrix" in name:
                count = int(re.search(r"\.x([124])", suffix).group(1))  # type: ignore[union-attr]
                took, least = clocks(at[: 8 * count], 16), count
            else:
                width = _width(name, suffix, tail)
                took, least = clocks(at, width), max(1, 32 * width // 128)
            found.append((number, _NAMES.get(name, "LDGSTS"), took, least))
        elif not text.startswith(("@", ".", "}", "{")) and " " in text.replace("\t", " "):
            operation, operands = text.replace("\t", " ").split(" ", 1)
            names = [operand.strip() for operand in operands.split(",")]
            if len(names) > 1 and names[0].startswith("%"):
                registers.run(operation, names)
    inside = [access for access in found if any(first <= access[0] <= last for first, last in loops)] or found
    took, least = defaultdict(int), defaultdict(int)
    for _, name, clock, floor in inside:
        took[name] += clock
        least[name] += floor
    return {name: took[name] / least[name] for name in took}
