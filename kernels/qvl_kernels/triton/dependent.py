"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits where it needs its data.

From capability 9.0 on, a launch with the attribute starts its programs as soon as all programs of the kernel before it
have announced it or ended. So the launch itself, and what does not depend on that kernel, overlap with it: a program of
a linear asks for its weights, which then stream into the L2 while a norm or a merge, all latency, is still at work.

A kernel with PDL calls `begin` or `begin_linear` first of all, and reads or writes nothing that an earlier kernel
writes or reads before it. Each waits for the whole kernel before it, and that one waited for its own: no chain of them
overtakes itself, and a kernel without PDL waits for all, as ever.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from qvl_kernels.triton.gluon import gl, gluon
from qvl_kernels.triton.launch import interpreted

FEW_ROWS = 128  # of a step, from which kernels run much longer than they take to launch
LAUNCH, WAIT = "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "griddepcontrol.wait; mov.b32 $0, 0;"


def dependent(capability: int, rows: int) -> bool:
    """Whether a launch for `rows` rows of a step overlaps with the one before it; QVL_DEPENDENT_LAUNCH=0: never."""
    asked = os.environ.get("QVL_DEPENDENT_LAUNCH") != "0"
    return asked and capability >= 90 and rows < FEW_ROWS and not interpreted()


@triton.constexpr_function
def ptx(what: str) -> str:
    """The PTX of an instruction by name."""
    return {"launch": LAUNCH, "wait": WAIT}[what]


@triton.constexpr_function
def prefetch_ptx(nbytes: int) -> str:
    """PTX that asks for `nbytes` from the address $1 on where $2 is not zero: no register waits for it."""
    ask = f"@p cp.async.bulk.prefetch.L2.global [$1], {nbytes};"
    return "{ .reg .pred p; setp.ne.b32 p, $2, 0; " + ask + " mov.b32 $0, 0; }"


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the one before; nothing without PDL. For kernels in Triton."""
    if PDL:
        tl.inline_asm_elementwise(ptx("launch"), "=r", [], tl.int32, False, 1)
        tl.inline_asm_elementwise(ptx("wait"), "=r", [], tl.int32, False, 1)


if interpreted():

    @triton.jit
    def announce(PDL: tl.constexpr):
        """Nothing: the interpreter runs one kernel after another."""

    @triton.jit
    def wait(PDL: tl.constexpr):
        """Nothing."""

    @triton.jit
    def prefetch(at, inside, BYTES: tl.constexpr):
        """Nothing: there is no L2."""

else:

    @gluon.jit
    def announce(PDL: tl.constexpr):
        """Let the next kernel start. For kernels in Gluon."""
        if PDL:
            gl.inline_asm_elementwise(ptx("launch"), "=r", [], gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def wait(PDL: tl.constexpr):
        """Wait for the kernel before."""
        if PDL:
            gl.inline_asm_elementwise(ptx("wait"), "=r", [], gl.int32, is_pure=False, pack=1)

    @gluon.jit
    def prefetch(at, inside, BYTES: tl.constexpr):
        """Ask for BYTES, a multiple of 16, from each pointer on where `inside`: the L2 gets them, and no register."""
        PTX: tl.constexpr = prefetch_ptx(BYTES)
        gl.inline_asm_elementwise(
            PTX, "=r,l,r", [at.to(gl.int64), inside.to(gl.int32)], gl.int32, is_pure=False, pack=1
        )
