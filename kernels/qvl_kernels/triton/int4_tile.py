"""Words of packed int4 weights to floats, inside a kernel: see `qvl_kernels.repack` for the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels import repack

TILE = tl.constexpr(repack.TILE)
WORDS = tl.constexpr(repack.WORDS)


@triton.jit
def magic(FLOAT: tl.constexpr):
    """The bits that make a level, 3 bits up, a normal number: 128 + level in float16, 16 + level in bfloat16."""
    return 0x58005800 if FLOAT == tl.float16 else 0x41804180


@triton.jit
def magic_base(FLOAT: tl.constexpr):
    """What `magic` adds to each level."""
    return 128 if FLOAT == tl.float16 else 16


@triton.jit
def floats(words, FLOAT: tl.constexpr, MAGIC: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to [32 * CHUNKS, BN] of its inputs from 32 * FIRST on: base + level by `magic`.

    With MAGIC 0 a float16 is level * 2^-21, a subnormal, which tensor cores multiply exactly (Fasi et al. 2021,
    "Numerical behavior of NVIDIA tensor cores"): one instruction less for each pair where it counts, on A100.

    Two inputs an instruction, with no conversion: turn, mask and put the exponent there. Only constants meet the
    words between their load and the dot: one run-time scalar among them sends the weights through shared memory.
    """
    turn = ((tl.arange(0, CHUNKS) + FIRST) * 4)[:, None, None].to(tl.uint32)
    turned = (words[None] >> turn) | (words[None] << ((32 - turn) & 31))
    pairs = (turned & 0x00780078) | MAGIC
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    halves = (pairs[:, :, None, :] >> half).to(tl.uint16).to(FLOAT, bitcast=True)
    return halves.reshape(32 * CHUNKS, words.shape[1])
