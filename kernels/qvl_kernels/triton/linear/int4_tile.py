"""Unpack words of int4 weights to floats inside a kernel; `qvl_kernels.layouts.gpu` defines the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.layouts import gpu as gpu_layout
from qvl_kernels.layouts import interleave

TILE_INT4 = tl.constexpr(gpu_layout.TILE)
WORDS = tl.constexpr(interleave.WORDS)
# An exponent makes a value, shifted left by 3 bits, a normal number, BASE + value. Constants, not functions: Triton 3.6
# to 3.8 do not take the result of a jit function as a constexpr.
EXPONENT_FP16, BASE_FP16 = tl.constexpr(0x58005800), tl.constexpr(128)
EXPONENT_BF16, BASE_BF16 = tl.constexpr(0x41804180), tl.constexpr(16)


@triton.jit
def keep_in_register(BITS: tl.constexpr, words_ptr, rows):
    """BITS as uint32 [1, 1, 1] in a register: the default of a load that never happens, as no launch has negative rows.

    The compiler does not see a constant. For two constants in sequence, a mask and an exponent, the assembler for A100
    emits two instructions per pair of weights; with one of them in a register it emits one: 0.47 of memory time at one
    row of bfloat16 instead of 0.67. A load may stand between words and dot, a scalar may not: see `unpack_int4`.
    """
    nowhere = tl.zeros([1, 1, 1], tl.int32)
    return tl.load(words_ptr + nowhere, nowhere > rows, BITS).to(tl.uint32, bitcast=True)


@triton.jit
def unpack_int4(words, FLOAT: tl.constexpr, exponent, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to BASE + value [32 * CHUNKS, BN] of its inputs from 32 * FIRST on.

    exponent: EXPONENT_FP16 or EXPONENT_BF16, best through `keep_in_register`. With 0 a float16 is value * 2^-21, a
    subnormal, which tensor cores multiply exactly (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"); then
    no base has to cancel.

    Two inputs an instruction, with no conversion: rotate, mask, set the exponent. Only constants and loads meet the
    words before the dot: one run-time scalar among them sends the weights through shared memory.
    """
    shift = ((tl.arange(0, CHUNKS) + FIRST) * 4)[:, None, None].to(tl.uint32)
    rotated = (words[None] >> shift) | (words[None] << ((32 - shift) & 31))
    pairs = (rotated & 0x00780078) | exponent
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    halves = (pairs[:, :, None, :] >> half).to(tl.uint16).to(FLOAT, bitcast=True)
    return halves.reshape(32 * CHUNKS, words.shape[1])
