"""Unpack words of int8 weights to floats inside a kernel; `qvl_kernels.layouts.gpu` defines the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.layouts import gpu as gpu_layout

TILE_INT8 = tl.constexpr(gpu_layout.TILE_INT8)
MIDDLE = tl.constexpr(gpu_layout.symmetric_zero_point(8))


@triton.jit
def unpack_int8(words, zero, FLOAT: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to value - zero [32 * CHUNKS, BN] of its inputs from 32 * FIRST on, exactly.

    zero: float32 [BN], or None for the middle. float16: two inputs an instruction, 1024 + value by the exponent's
    bits, and one subtraction for both. bfloat16 has 8 bits of mantissa, too few for that: each value is put into a
    float32 as 2^23 + value, and the difference fits into 8 bits. An integer conversion would use a pipe of 16 lanes a
    clock.
    """
    byte = ((tl.arange(0, CHUNKS) + FIRST) * 8)[:, None, None].to(tl.uint32)
    pairs = (words[None] >> byte) & 0x00FF00FF
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    if FLOAT == tl.float16:
        floats = ((pairs | 0x64006400)[:, :, None, :] >> half).to(tl.uint16).to(FLOAT, bitcast=True)
        floats = floats.reshape(32 * CHUNKS, words.shape[1])
        return floats - (1024 + MIDDLE if zero is None else (zero + 1024).to(FLOAT)[None, :])
    wide = (((pairs[:, :, None, :] >> half) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True)
    wide = wide.reshape(32 * CHUNKS, words.shape[1])
    return (wide - (8388608 + MIDDLE if zero is None else (zero + 8388608)[None, :])).to(FLOAT)
