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

from .banks import conflicts
from .launches import SHARED, Launch
from .machine_code import amd_loop, nvidia_loop, unrolled

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers, warps, programs and bytes of shared memory of one multiprocessor (CUDA programming guide, table of
# technical specifications), and bytes of it that every program takes for the system.
_LIMITS = {
    "sm_75": (65536, 32, 16, 65536, 0),
    "sm_80": (65536, 64, 32, 167936, 1024),
    "sm_86": (65536, 48, 16, 102400, 1024),
    "sm_90": (65536, 64, 32, 233472, 1024),
    "sm_100": (65536, 64, 32, 233472, 1024),
}
# One SIMD of gfx942: 512 registers of 64 lanes, at most 8 waves; four SIMDs share 64 KiB (CDNA3 ISA guide).
_AMD_REGISTERS, _AMD_WAVES = 512, 8


@dataclass
class Compiled:
    registers: int
    spills: int  # bytes of stack per thread; on AMD, spilled registers
    shared: int
    programs: int  # resident on one multiprocessor
    occupancy: float
    loop: Counter = field(default_factory=Counter)  # instructions of the main loop, with their suffixes
    steps: int = 1  # of the kernel's loop in one turn of it
    conflicts: dict[str, float] = field(default_factory=dict)  # clocks of accesses to shared memory over the least


def compile_launch(launch: Launch, target: str) -> Compiled:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    aligned = [["tt.divisibility", 16]]

    def typed(value: Any, path: tuple[int, ...]) -> Any:
        """What Triton's launcher would find out about an argument, or a value inside one that is a tuple."""
        if isinstance(value, tuple):
            return tuple(typed(v, (*path, i)) for i, v in enumerate(value))
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = aligned
        return "*" + _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" if abs(value) < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = typed(value, (i,))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        return _read_amd(binary, launch.num_warps)
    return _read_nvidia(binary, target, launch.num_warps)


def _read_amd(binary, num_warps: int) -> Compiled:
    text = binary.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    registers, shared = number("vgpr_count"), binary.metadata.shared
    waves = min(_AMD_WAVES, _AMD_REGISTERS // max(8, -(-registers // 8) * 8)) * 4
    programs = min(waves // num_warps, SHARED["gfx942"] // max(1, shared))
    occupancy = programs * num_warps / (4 * _AMD_WAVES)
    spills = number("vgpr_spill_count")
    return Compiled(registers, spills, shared, programs, occupancy, amd_loop(text))


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
    file_size, max_warps, max_programs, max_shared, reserved = _LIMITS[target]
    warps = file_size // (-(-registers // 8) * 8 * 32)
    shared = binary.metadata.shared
    programs = min(warps // num_warps, max_programs, max_warps // num_warps, max_shared // max(1, shared + reserved))
    occupancy = programs * num_warps / max_warps
    loop, ptx = nvidia_loop(code), binary.asm["ptx"]
    return Compiled(registers, stack, shared, programs, occupancy, loop, unrolled(loop, ptx), conflicts(ptx))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BIN / name, *arguments], capture_output=True, text=True, check=True).stdout
