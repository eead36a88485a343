"""What a compiled GPU kernel consists of, read from its assembly: instructions, loops, registers, spills.

NVIDIA's assembly (SASS) says for every instruction how long the warp waits before the next one and which earlier
results it waits for, so that the time of a lone warp in a loop follows from the text; AMD's does not.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

# Kinds of instructions, by how their names begin.
_KINDS = {
    "load": ("LDG", "buffer_load", "global_load"),
    "store": ("STG", "buffer_store", "global_store"),
    "atomic": ("ATOM", "RED.", "REDG", "buffer_atomic", "global_atomic"),
    "shuffle": ("SHFL", "ds_bpermute", "ds_swizzle", "v_permlane"),
    "shared": ("LDS", "STS", "ds_"),
    "barrier": ("BAR.", "s_barrier"),
    # exp2, log2, reciprocal, square root: a quarter or less of the rate of a multiplication
    "special": ("MUFU", "v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_"),
}
# Cycles until a result that the hardware tracks is there, measured by others on A100 and H100; rounded.
_LATENCY = {"load": 500, "store": 20, "atomic": 500, "shared": 30, "shuffle": 25, "special": 20}
_OTHER_LATENCY = 15
_NUM_SCOREBOARDS = 6


class Instruction(NamedTuple):
    """One instruction; the last four fields are NVIDIA's.

    Attributes:
        name: with its suffixes.
        jump: place in the code that it may jump to, if any.
        stall: cycles until the warp issues its next instruction.
        waits: bit mask of the scoreboards that must be free before.
        result: scoreboard that is free when the result is there.
        operands: scoreboard that is free when the operands have been read.
    """

    name: str
    jump: int | None
    stall: int = 1
    waits: int = 0
    result: int | None = None
    operands: int | None = None

    @property
    def kind(self) -> str:
        return next((kind for kind, names in _KINDS.items() if self.name.startswith(names)), "other")


@dataclass(frozen=True)
class Loop:
    """The body of an innermost loop, or of a kernel without loops.

    Attributes:
        instructions: those of one pass, of a warp.
        counts: how many there are of each kind in `_KINDS`.
        cycles: time of a lone warp for one pass, memory in the second-level cache or behind it; None for AMD.
    """

    instructions: int
    counts: dict[str, int]
    cycles: int | None


@dataclass(frozen=True)
class Assembly:
    """What the compiler made of a kernel.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory of a thread, for registers that it lacks.
        has_loops: whether there are any.
        loops: the innermost ones in the order of the code; the whole kernel if there is none.
    """

    registers: int
    spills: int
    has_loops: bool
    loops: list[Loop]


def assembly_of(kernel: Any) -> Assembly:
    """Take a `triton.compiler.CompiledKernel` apart.

    Raises:
        ValueError: if it is neither for NVIDIA nor for AMD.
    """
    if "cubin" in kernel.asm:
        registers, spills = _nvidia_resources(kernel.asm["cubin"])
        return Assembly(registers, spills, *_loops(_nvidia_code(kernel.asm["sass"]), timed=True))
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        spills = _amd_number("private_segment_fixed_size", text)
        return Assembly(_amd_number("vgpr_count", text), spills, *_loops(_amd_code(text), timed=False))
    raise ValueError(f"a kernel of {sorted(kernel.asm)}: expected a cubin or amdgcn")


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd_number(name: str, text: str) -> int:
    return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])


# ---- text to instructions ----

# waits:operands:result:yield:stall<tab>@predicate NAME operands
_NVIDIA = re.compile(r"(--|\d\d):(-|\d):(-|\d):[-Y]:(\w)\s+(?:@!?\w+\s+)?([\w.]+)(.*)")
_NVIDIA_BYTES = 16  # of an instruction


def _nvidia_code(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.startswith("LBB") or _NVIDIA.match(line)]
    places = _places(lines, re.compile(r"(LBB\d+):"))
    code = []
    for line in lines:
        if match := _NVIDIA.match(line):
            waits, operands, result, stall, name, rest = match.groups()
            jump = None
            # Triton names the targets of plain jumps only
            if name.startswith("BRA") and (target := re.search(r"LBB\d+|0x[0-9a-f]+", rest)):
                jump = places[target[0]] if target[0] in places else int(target[0], 16) // _NVIDIA_BYTES
            code.append(
                Instruction(
                    name,
                    jump,
                    int(stall, 16),
                    0 if waits == "--" else int(waits),
                    None if result == "-" else int(result),
                    None if operands == "-" else int(operands),
                )
            )
    return code


def _amd_code(text: str) -> list[Instruction]:
    body = text.partition("\n.Lfunc_end")[0]
    instruction = re.compile(r"\t([a-z]\w+)(.*)")
    lines = [line for line in body.splitlines() if line.startswith(".LBB") or instruction.match(line)]
    places = _places(lines, re.compile(r"(\.LBB\w+):"))
    code = []
    for line in lines:
        if match := instruction.match(line):
            target = re.search(r"\.LBB\w+", match[2]) if "branch" in match[1] else None
            code.append(Instruction(match[1], target and places[target[0]]))
    return code


def _places(lines: list[str], label: re.Pattern) -> dict[str, int]:
    """How many instructions stand before each label."""
    places: dict[str, int] = {}
    instructions = 0
    for line in lines:
        if match := label.match(line):
            places[match[1]] = instructions
        else:
            instructions += 1
    return places


# ---- loops ----


def _loops(code: list[Instruction], timed: bool) -> tuple[bool, list[Loop]]:
    """Whether there are loops, and the innermost ones: what lies between an instruction and a jump back to it."""
    ends: dict[int, int] = {}  # by first instruction; several jumps to one place are one loop
    for place, instruction in enumerate(code):
        # One that jumps to itself is a trap behind the end of the code
        if instruction.jump is not None and instruction.jump < place:
            ends[instruction.jump] = place + 1
    innermost = [
        (first, end)
        for first, end in sorted(ends.items())
        if not any(first <= other and ends[other] <= end for other in ends if other != first)
    ]
    return bool(innermost), [_loop(code[first:end], timed) for first, end in innermost or [(0, len(code))]]


def _loop(body: list[Instruction], timed: bool) -> Loop:
    kinds = [instruction.kind for instruction in body]
    counts = {kind: kinds.count(kind) for kind in _KINDS}
    return Loop(len(body), counts, _cycles(body) if timed else None)


def _cycles(body: list[Instruction]) -> int:
    """Cycles of one pass of a lone warp once the loop runs, by the waits that the compiler wrote down."""
    now, free = 0, [0] * _NUM_SCOREBOARDS
    for _ in range(3):
        start = now
        for instruction in body:
            now = max([now] + [free[board] for board in range(_NUM_SCOREBOARDS) if instruction.waits >> board & 1])
            done = now + _LATENCY.get(instruction.kind, _OTHER_LATENCY)
            if instruction.result is not None:
                free[instruction.result] = max(free[instruction.result], done)
            if instruction.operands is not None:
                free[instruction.operands] = max(free[instruction.operands], now + _OTHER_LATENCY)
            now += max(1, instruction.stall)
    return now - start
