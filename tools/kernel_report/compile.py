"""Compile a launch to machine code without a GPU: Triton's wheel includes NVIDIA's assembler and disassembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl_kernels.triton.launch import Launch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]  # without this no load is 128 bits wide


@dataclass(frozen=True, slots=True)
class MachineCode:
    """A kernel's machine code and the resources it occupies."""

    sass: str
    registers: int  # a thread
    stack: int  # bytes a thread
    shared: int  # bytes a program
    warps: int


def compile_launch(launch: Launch, capability: int) -> MachineCode:
    """Compile as the JIT would for these arguments; the compiler's exceptions propagate."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kernel = launch.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError("interpreted kernels cannot be compiled: unset TRITON_INTERPRET before triton is imported")
    signature, constants, attributes = specialize(launch)
    source_type = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_type(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options())
    registers, stack, sass = disassemble(made.asm["cubin"])
    return MachineCode(sass, registers, stack, made.metadata.shared, made.metadata.num_warps)


def binary_of(launch: Launch) -> str:
    """The same text for launches that share a binary."""
    return repr((launch.kernel.__name__, specialize(launch), launch.options()))


def specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes by Triton's rules: 1 is a constant, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], Any] = {}
    for at, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            if name not in constants:
                constants[name] = parameter.default
            signature[name] = "constexpr"
            continue
        value, free = launch.arguments[name], parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(at,)] = ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(at,)] = ALIGNED
    return signature, constants, attributes


@lru_cache(maxsize=64)  # kernels that differ in their grid alone have one binary; a disassembly takes half a second
def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and the text of a binary."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run_tool(name: str, flag: str) -> str:
            done = subprocess.run([tools / name, flag, file.name], check=True, capture_output=True, text=True)
            return done.stdout

        usage, sass = run_tool("cuobjdump", "--dump-resource-usage"), run_tool("nvdisasm", "-c")
    registers, stack = (re.search(rf"{what}:(\d+)", usage) for what in ("REG", "STACK"))
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump reports no registers and stack: {usage[:200]!r}")
    return int(registers[1]), int(stack[1]), sass
