"""Tiles of int4 weights as operand A of the tensor cores, dequantized in the registers that it is read from.

A product of many rows is out^T = W x^T. A thread needs words t, t + 4, t + 8 and t + 12 of its outputs: their pairs of
inputs are what thread t of operand A has, of mma.sync.m16n8k16 as of wgmma, in the order in which x is stored. Each
weight is rounded once to x's dtype, as in the reference. Words and x arrive by asynchronous copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.gluon import async_load, commit_group, gl, gluon
from qvl_kernels.triton.launch import interpreted
from qvl_kernels.triton.linear.int4_tile import TILE_INT4
from qvl_kernels.triton.linear.mma_operands import powers_of_two


@gluon.constexpr_function
def a_words_layout(W: int, BN: int) -> object:
    """[BN, 16]: a thread has every fourth word of two outputs of each 16 W, as operand A has their inputs."""
    registers = [[0, 4], [0, 8], [8, 0], *([b, 0] for b in powers_of_two(16 * W, BN))]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 << b, 0] for b in range(W.bit_length() - 1)], [], [BN, 16])


@triton.constexpr_function
def scaled_ptx(half: bool, chunk: int) -> str:
    """PTX from a word ($2), the exponents ($3), two zero points with their base ($4) and two scales ($5) to two floats.

    They are those of codes `chunk` and `chunk + 4`, $0 and $1. In bfloat16 a difference and a product are sums of
    products, t - 1 zero and t scale - 0: capability 8.0 has no others.
    """
    level = f"shf.r.wrap.b32 t, $2, $2, {4 * chunk};" if chunk else "mov.b32 t, $2;"
    level += " lop3.b32 t, t, 0x00780078, $3, 0xEA;"
    if half:
        level += " sub.f16x2 t, t, $4; mul.f16x2 t, t, $5;"
    else:
        level += " mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 t, $4, c, t; mov.b32 c, 0x80008000; fma.rn.bf16x2 t, t, $5, c;"
    return "{.reg .b32 t, c; " + level + " mov.b32 {$0, $1}, t;}"


if interpreted():

    @triton.jit
    def scaled_pair(words, exponent, zero, scale, FLOAT: tl.constexpr, CHUNK: tl.constexpr):
        """Both weights of codes CHUNK of the words [BN, 16], as two tensors of FLOAT."""
        word = words.to(tl.uint32, bitcast=True)
        word = ((word >> (4 * CHUNK)) | (word << ((32 - 4 * CHUNK) & 31))) & 0x00780078
        word = word | exponent
        low = (word & 0xFFFF).to(tl.uint16).to(FLOAT, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.uint16).to(FLOAT, bitcast=True).to(tl.float32)
        zero, scale = zero.to(tl.float32), scale.to(tl.float32)
        return ((low - zero) * scale).to(FLOAT), ((high - zero) * scale).to(FLOAT)

else:

    @gluon.jit
    def scaled_pair(words, exponent, zero, scale, FLOAT: tl.constexpr, CHUNK: tl.constexpr):
        """Both weights of codes CHUNK of the words [BN, 16], as two tensors of FLOAT."""
        PTX: tl.constexpr = scaled_ptx(FLOAT == gl.float16, CHUNK)
        zero_bits = zero.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        scale_bits = scale.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        low, high = gl.inline_asm_elementwise(
            PTX,
            "=h,=h,r,r,r,r",
            [words, exponent, zero_bits | (zero_bits << 16), scale_bits | (scale_bits << 16)],
            (gl.int16, gl.int16),
            is_pure=True,
            pack=1,
        )
        return low.to(FLOAT, bitcast=True), high.to(FLOAT, bitcast=True)


@gluon.jit
def scale_and_zero(
    scales_ptr, zeros_ptr, n, first,
    INPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, BASE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Scales, and zero points with their base, of outputs n for input `first`, [BN, 1]; past the end, the last."""
    group = gl.minimum(first, INPUTS - 1) // GROUP * PADDED + n
    scale = gl.load(scales_ptr + group).to(FLOAT)
    if zeros_ptr is None:
        zero = gl.full([n.shape[0]], BASE + 8, FLOAT, n.type.layout)
    else:
        zero = (gl.load(zeros_ptr + group).to(gl.float32) + BASE).to(FLOAT)
    return gl.expand_dims(scale, 1), gl.expand_dims(zero, 1)


@gluon.jit
def copy_tile(
    x_to, words_to, x_at, words_at, k, tile, slot, last,
    INPUTS: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Start the copies of a tile of x and words into buffer `slot`; from tile `last` on nothing is copied."""
    start = tile * TILE_INT4
    if RAGGED:
        async_load(x_to.index(slot), x_at + start, (start + k < INPUTS) & (tile < last))
    else:
        async_load(x_to.index(slot), x_at + start, tile < last)
    async_load(words_to.index(slot), words_at + tile * (PADDED * 16), tile < last)
    commit_group()
