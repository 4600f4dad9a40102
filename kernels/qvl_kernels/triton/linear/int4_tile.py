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
def unpack_int4(words, FLOAT: tl.constexpr, exponent, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to BASE + value [32 * CHUNKS, BN] of its inputs from 32 * FIRST on.

    exponent: EXPONENT_FP16 or EXPONENT_BF16. Two inputs an instruction, with no conversion: rotate, mask, set it.
    """
    shift = ((tl.arange(0, CHUNKS) + FIRST) * 4)[:, None, None].to(tl.uint32)
    rotated = (words[None] >> shift) | (words[None] << ((32 - shift) & 31))
    pairs = (rotated & 0x00780078) | exponent
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    halves = (pairs[:, :, None, :] >> half).to(tl.uint16).to(FLOAT, bitcast=True)
    return halves.reshape(32 * CHUNKS, words.shape[1])
