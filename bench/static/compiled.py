"""Compiles a launch for a target that is not there, and reads registers, spills and the main loop off the result."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launches import Launch

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int64: "i64",
}
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers, warps, programs and bytes of shared memory of one multiprocessor (CUDA programming guide, table of
# technical specifications).
_LIMITS = {
    "sm_75": (65536, 32, 16, 65536),
    "sm_80": (65536, 64, 32, 167936),
    "sm_90": (65536, 64, 32, 233472),
    "sm_100": (65536, 64, 32, 233472),
}


@dataclass
class Compiled:
    registers: int
    spills: int  # bytes of stack per thread; on AMD, spilled registers
    shared: int
    programs: int | None = None  # resident on one multiprocessor
    occupancy: float | None = None
    loop: Counter = field(default_factory=Counter)  # instructions of the main loop, with their suffixes

    def widths(self, *names: str) -> dict[int, int]:
        """Bytes per lane -> how many, of the loop's instructions of these names."""
        out: Counter[int] = Counter()
        for instruction, count in self.loop.items():
            if instruction.split(".")[0] in names:
                out[width(instruction)] += count
        return dict(sorted(out.items()))


def width(instruction: str) -> int:
    """Bytes per lane that a load or store moves."""
    if instruction.startswith(("LDSM", "STSM")):
        return 4 * int(instruction.rsplit(".", 1)[-1]) if instruction[-1] in "124" else 4
    found = re.search(r"\.(?:U|S)?(8|16|64|128)\b", instruction)
    return int(found.group(1)) // 8 if found else 4


def compile_launch(launch: Launch, target: str) -> Compiled:
    kernel, arguments = launch.kernel, launch.arguments
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    aligned = [["tt.divisibility", 16]]
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + _TYPES[value.dtype], aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = aligned
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        return _read_amd(binary.asm["amdgcn"])
    return _read_nvidia(binary, target, launch.num_warps)


def _read_amd(text: str) -> Compiled:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return Compiled(number("vgpr_count"), number("vgpr_spill_count"), number("group_segment_fixed_size"))


def _read_nvidia(binary, target: str, num_warps: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {usage}")
    registers, stack = (int(text) for text in found.groups())
    file_size, max_warps, max_programs, max_shared = _LIMITS[target]
    warps = file_size // (-(-registers // 8) * 8 * 32)
    shared = binary.metadata.shared
    reserved = 1024 if target != "sm_75" else 0
    programs = min(warps // num_warps, max_programs, max_warps // num_warps, max_shared // max(1, shared + reserved))
    return Compiled(registers, stack, shared, programs, programs * num_warps / max_warps, _main_loop(code))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BIN / name, *arguments], capture_output=True, text=True, check=True).stdout


def _main_loop(code: str) -> Counter:
    """The longest stretch that ends with a jump back to its own start and reads or writes global memory."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"^(\.L\S+):", line):
            labels[label.group(1)] = len(instructions)
        if found := re.match(r"\s+/\*[0-9a-f]+\*/\s+([^/].*?);", line):
            text = re.sub(r"^@!?U?P\w+\s+", "", found.group(1).strip())
            instructions.append(text.split()[0])
            jump = re.search(r"BRA.*?`\((\.L\S+)\)", found.group(1))
            if jump and jump.group(1) in labels:
                body = instructions[labels[jump.group(1)] :]
                if len(body) > len(best) and any(i.startswith(("LDG", "STG")) for i in body):
                    best = body
    return Counter(best)
