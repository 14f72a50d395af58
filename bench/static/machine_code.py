"""Reading machine code: the main loop of a kernel, and how wide its loads and stores are."""

import re
from collections import Counter

# What a listing calls its instructions and jumps; group 1 is the instruction with its operands.
_NVIDIA = re.compile(r"\s+/\*[0-9a-f]+\*/\s+([^/].*?);")
_NVIDIA_LABEL, _NVIDIA_JUMP = re.compile(r"^(\.L\S+):"), re.compile(r"BRA.*?`\((\.L\S+)\)")
_AMD = re.compile(r"^\s+([a-z]\w+.*)$")
_AMD_LABEL, _AMD_JUMP = re.compile(r"^(\.LBB\S+):"), re.compile(r"s_c?branch\w*\s+(\.LBB\S+)")
_PTX = re.compile(r"^\s+((?:@!?%p\d+ )?[a-z]\w*\..*?);")
_PTX_LABEL, _PTX_JUMP = re.compile(r"^(\$L\S+):"), re.compile(r"bra(?:\.uni)?\s+(\$L\w+)")


def nvidia_loop(code: str) -> Counter:
    """Instructions of the main loop, with their suffixes, in the listing of `nvdisasm -c`.

    Predicates are dropped: an instruction under one is counted, because it takes its slot; `@!PT`, which is never
    executed, is not. HGMMA gets a suffix that says where its first operand lies, SS (shared memory) or RS.
    """
    return _main_loop(code, _NVIDIA, _NVIDIA_LABEL, _NVIDIA_JUMP, ("LDG", "STG"))


def amd_loop(code: str) -> Counter:
    return _main_loop(code, _AMD, _AMD_LABEL, _AMD_JUMP, ("global_load", "global_store", "buffer_load", "buffer_store"))


def unrolled(loop: Counter, ptx: str) -> int:
    """Steps in one turn of the loop: its accesses to global memory over those of the loop that the assembler got."""
    names = ("ld.global", "st.global", "cp.async.ca", "cp.async.cg")
    given = _main_loop(ptx, _PTX, _PTX_LABEL, _PTX_JUMP, names)
    there = sum(count for name, count in given.items() if name.startswith(names))
    here = sum(count for name, count in loop.items() if name.startswith(("LDG", "STG")))
    return max(1, round(here / there)) if there else 1


def _main_loop(code: str, line_of: re.Pattern, label_of: re.Pattern, jump_of: re.Pattern, memory) -> Counter:
    """The loop whose instructions, those of loops inside it included, touch global memory most; of equals the longer.

    A loop is a stretch that ends with a jump back to its start. Loops inside another one are part of it and counted
    once; a jump out of the middle (`continue`) makes the stretch longer, never shorter.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    most = 0
    for line in code.splitlines():
        if label := label_of.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := line_of.match(line):
            text = found.group(1).strip()
            if text.startswith("@!PT"):
                continue
            jump = jump_of.search(text)
            instructions.append(_name(re.sub(r"^@!?(?:U?P|%p)\w+\s+", "", text)))
            if jump and jump.group(1) in labels:
                body = instructions[labels[jump.group(1)] :]
                touching = sum(i.startswith(memory) for i in body)
                if touching and (touching, len(body)) > (most, len(best)):
                    best, most = body, touching
    return Counter(best)


def _name(text: str) -> str:
    name = text.split()[0]
    if name.startswith("HGMMA"):
        operands = text.split(None, 1)[1].split(",")
        return name + (".SS" if "gdesc" in operands[1] else ".RS")
    return name


def width(instruction: str) -> int:
    """Bytes per lane that a load or store moves."""
    if instruction.startswith(("LDSM", "STSM")):
        return 4 * int(instruction[-1]) if instruction[-1] in "124" else 4
    if instruction.startswith(("global", "buffer")):
        found = re.search(r"_(?:dword|b)(?:x)?(\d+)?", instruction)
        if "dword" in instruction:
            return 4 * int(found.group(1) or 1) if found else 4
        return 2 if re.search(r"short|16", instruction) else 1 if re.search(r"byte|8", instruction) else 4
    found = re.search(r"\.(?:U|S)?(8|16|64|128)\b", instruction)
    return int(found.group(1)) // 8 if found else 4


def widths(loop: Counter, *names: str) -> dict[int, int]:
    """Bytes per lane -> how many, of the loop's instructions that begin with one of these names."""
    out: Counter[int] = Counter()
    for instruction, count in loop.items():
        if instruction.startswith(names):
            out[width(instruction)] += count
    return dict(sorted(out.items()))
