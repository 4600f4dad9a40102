"""Parse NVIDIA machine code (SASS): instructions, loops, the pipe of each instruction and the bytes it moves."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from tools.kernel_report.machines import Machine


class Class(NamedTuple):
    """A class of instructions that occupy the same pipe."""

    name: str  # as the report shows it
    pipe: str | None  # occupied besides an issue slot
    stem: re.Pattern[str]


# First match wins.
CLASSES = [
    Class(name, pipe, re.compile(rf"(?:{stem})\b"))
    for name, pipe, stem in (
        ("mma", "mma", r"[HIBD]MMA|QMMA|H?GMMA|[QI]GMMA|UTC\w*MMA"),
        ("ldg", "lsu", r"LDGSTS|LDG|LD$|UTMALDG|UBLKCP|TLD|TEX"),
        ("stg", "lsu", r"STG|ST$|RED|ATOMG?|UTMASTG|UTMAREDG"),
        ("spill", "lsu", r"LDL|STL"),
        ("smem", "lsu", r"LDSM|LDS|STSM|STS|ATOMS"),
        ("shfl", "lsu", r"SHFL"),
        ("half2", "half", r"HFMA2|HADD2|HMUL2|HMNMX2|HSET2|HSETP2"),
        ("mufu", "mufu", r"MUFU"),
        ("cvt", "convert", r"I2FP?|F2I|F2FP?|I2I|I2IP|FRND"),
        ("imad", "fma", r"IMAD|IDP"),
        ("fp32", "fma", r"FFMA|FADD|FMUL"),
        ("fcmp", "alu", r"FMNMX|FSETP?|FSEL|FCHK"),
        ("bits", "alu", r"LOP3|SHF|SHL|SHR|PRMT|BFI|BFE|SGXT|BMSK|FLO|POPC"),
        ("int", "alu", r"IADD3?|VIADDMNMX|VIADD|LEA|ISETP|IMNMX|VIMNMX|SEL|IABS|PLOP3|P2R|R2P|MOV|ISCADD"),
        ("sync", None, r"BAR|DEPBAR|LDGDEPBAR|SYNCS|WARPSYNC|BSSY|BSYNC|MEMBAR|ERRBAR|CCTL|FENCE|WARPGROUP"),
        ("ctl", None, r"BRA|EXIT|CALL|RET|BRX|JMP|NOP|BREAK|KILL"),
        ("unif", None, r"U[A-Z0-9]+|R2UR|S2UR|VOTEU?|REDUX"),
        ("const", None, r"LDCU?|S2R|CS2R|ELECT|ACQBULK|NANOSLEEP"),
    )
]
WAIT = "ACQBULK"  # griddepcontrol.wait
OTHER = Class("other", "alu", re.compile(""))
# Of a thread. "88.4" are the four matrices of LDSM and STSM, 512 bytes a warp.
WIDTHS = ((".128", 16), (".64", 8), ("88.4", 16), ("88.2", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))


class Code(NamedTuple):
    """The instructions of a kernel and the index ranges of its loops."""

    instructions: list[str]  # predicates left out
    loops: list[range]  # of indices


def parse(text: str) -> Code:
    """The instructions of a disassembly and its backward branches."""
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif line_match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", line):
            instruction = line_match[1].strip()
            if target := re.search(r"^BRA\b.*?(\.L_\w+)", instruction):
                branches.append((len(code), target[1]))
            code.append(instruction)
    loops = [range(labels[label], at + 1) for at, label in branches if labels.get(label, at) < at]
    while code and code[-1].startswith("NOP"):  # padding after the end
        code.pop()
    return Code(code, loops)


def classify(instruction: str) -> Class:
    """The first class whose pattern matches the opcode."""
    opcode = instruction.split()[0]
    return next((kind for kind in CLASSES if kind.stem.match(opcode)), OTHER)


def access_bytes(instruction: str) -> int:
    """Bytes that one thread moves with a memory instruction; a bulk copy of the TMA unit counts as 0, unknown."""
    opcode = instruction.split()[0]
    if opcode.startswith("U"):
        return 0
    return next((size for mark, size in WIDTHS if mark in opcode), 4)


def loads(instructions: Iterable[str]) -> list[int]:
    """Bytes a thread, of each load from global memory."""
    return [access_bytes(text) for text in instructions if classify(text).name == "ldg"]


def after_wait(instructions: list[str]) -> list[str]:
    """The instructions from the wait for the kernel before on, of a dependent launch; all of any other."""
    first = next((at for at, text in enumerate(instructions) if text.startswith(WAIT)), 0)
    return instructions[first:]


def spill_share(code: Code) -> float:
    """The share of a loop's instructions that move spilled registers, of the loop where it is largest."""
    shares = [sum(classify(code.instructions[at]).name == "spill" for at in loop) / len(loop) for loop in code.loops]
    return max(shares, default=0.0)


def main_loop(code: Code) -> list[str]:
    """The innermost loop that loads the most bytes from global memory; empty if there is no loop."""
    inner = [a for a in code.loops if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in code.loops)]
    bodies = [[code.instructions[i] for i in loop] for loop in inner]
    return max(bodies, key=lambda body: (sum(loads(body)), len(body)), default=[])


def pipe_cycles(machine: Machine, instructions: Iterable[str]) -> dict[str, float]:
    """Cycles of a quarter of an SM that each pipe needs for these warp instructions; "issue" is one of the pipes."""
    cycles: defaultdict[str, float] = defaultdict(float)
    for text in instructions:
        pipe = classify(text).pipe
        cycles["issue"] += 1
        if pipe == "mma":
            cycles["mma"] += machine.mma_cycles  # of an m16n8k16; a wgmma is longer
        elif pipe:
            cycles[pipe] += 32 * 4 / machine.lanes[pipe]
            if pipe == "lsu":  # a 128-bit access of a full warp takes four passes of 128 bytes
                cycles[pipe] += 4 * (max(access_bytes(text) // 4, 1) - 1)
    return cycles
