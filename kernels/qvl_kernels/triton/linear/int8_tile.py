"""Unpack words of int8 weights to floats inside a kernel; `qvl_kernels.layouts.gpu` defines the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.layouts import gpu as gpu_layout

TILE_INT8 = tl.constexpr(gpu_layout.TILE_INT8)
MIDDLE = tl.constexpr(gpu_layout.symmetric_zero_point(8))


@triton.jit
def unpack_int8(words, zero, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to value - zero [32 * CHUNKS, BN] of its inputs from 32 * FIRST on, exactly.

    In float16; zero: float32 [BN], or None for the middle. Two inputs an instruction, 1024 + value by the exponent's
    bits, and one subtraction for both. An integer conversion would use a pipe of 16 lanes a clock.
    """
    byte = ((tl.arange(0, CHUNKS) + FIRST) * 8)[:, None, None].to(tl.uint32)
    pairs = (words[None] >> byte) & 0x00FF00FF
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    floats = ((pairs | 0x64006400)[:, :, None, :] >> half).to(tl.uint16).to(tl.float16, bitcast=True)
    floats = floats.reshape(32 * CHUNKS, words.shape[1])
    return floats - (1024 + MIDDLE if zero is None else (zero + 1024).to(tl.float16)[None, :])
