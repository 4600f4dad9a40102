"""Words of packed int4 weights to floats, inside a kernel: see `qvl_kernels.layouts.gpu` for the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.layouts import gpu as gpu_weight
from qvl_kernels.layouts import interleave as gpu_words

TILE = tl.constexpr(gpu_weight.TILE)
WORDS = tl.constexpr(gpu_words.WORDS)


@triton.jit
def magic(FLOAT: tl.constexpr):
    """The bits that make a level, 3 bits up, a normal number: 128 + level in float16, 16 + level in bfloat16."""
    return 0x58005800 if FLOAT == tl.float16 else 0x41804180


@triton.jit
def magic_base(FLOAT: tl.constexpr):
    """What `magic` adds to each level."""
    return 128 if FLOAT == tl.float16 else 16


@triton.jit
def held(BITS: tl.constexpr, words_ptr, rows):
    """BITS as uint32 [1, 1, 1] in a register: what a load gives that is never done, since no launch has rows below 0.

    To the compiler it is no constant. Of two constants in a row, a mask and an exponent, the assembler for A100 makes
    two instructions for each pair of weights, with one of them in a register it makes one: 0.47 of memory time at one
    row of bfloat16 where it was 0.67. A load may stand between words and dot where a scalar may not: see `floats`.
    """
    nowhere = tl.zeros([1, 1, 1], tl.int32)
    return tl.load(words_ptr + nowhere, nowhere > rows, BITS).to(tl.uint32, bitcast=True)


@triton.jit
def floats(words, FLOAT: tl.constexpr, exponent, FIRST: tl.constexpr, CHUNKS: tl.constexpr):
    """uint32 words [16, BN] of a tile to [32 * CHUNKS, BN] of its inputs from 32 * FIRST on: base + level by `magic`.

    exponent: the bits of `magic`, best `held`. With 0 a float16 is level * 2^-21, a subnormal, which tensor cores
    multiply exactly (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"); no base has to cancel.

    Two inputs an instruction, with no conversion: turn, mask and put the exponent there. Only constants and loads meet
    the words before the dot: one run-time scalar among them sends the weights through shared memory.
    """
    turn = ((tl.arange(0, CHUNKS) + FIRST) * 4)[:, None, None].to(tl.uint32)
    turned = (words[None] >> turn) | (words[None] << ((32 - turn) & 31))
    pairs = (turned & 0x00780078) | exponent
    half = (tl.arange(0, 2) * 16)[None, None, :, None].to(tl.uint32)
    halves = (pairs[:, :, None, :] >> half).to(tl.uint16).to(FLOAT, bitcast=True)
    return halves.reshape(32 * CHUNKS, words.shape[1])
