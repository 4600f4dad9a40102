"""Operands of mma.sync.m16n8k16 that are in place when they are loaded: packed words as A, activations as B.

The product is out^T = W x^T. Its inputs are taken in another order than they are stored in, the same for words and x:
input 32 j + 8 t + 4 u + 2 v + e of a tile is the MMA's input (j, u, v, t, e). So thread t of a row needs the words 4 t
to 4 t + 3 of an output, one load of 128 bits, for operand A, and 8 neighboring inputs of x for a quarter of operand B;
no data moves between threads, and nothing is written to shared memory.
"""

from __future__ import annotations

import triton.language as tl

from qvl_kernels.triton.gluon import gl, gluon
from qvl_kernels.triton.linear.code_pairs import code_pair


@gluon.constexpr_function
def powers_of_two(first: int, end: int) -> list[int]:
    """The powers of two from `first`, itself one, to below `end`."""
    return [first << i for i in range(20) if first << i < end]


@gluon.constexpr_function
def words_layout(W: int, BN: int) -> object:
    """[W, BN, 16]: warp w has tile w; a thread has 4 words of every eighth output."""
    registers = [[0, 0, 1], [0, 0, 2], *([0, b, 0] for b in powers_of_two(8, BN))]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0, 0] for b in powers_of_two(1, W)], [], [W, BN, 16])


@gluon.constexpr_function
def x_layout(W: int, BM: int) -> object:
    """[W, 32, BM]: a quarter of tile w; a thread has 8 neighboring inputs of every eighth row."""
    registers = [[0, 1, 0], [0, 2, 0], [0, 4, 0], *([0, 0, b] for b in powers_of_two(8, BM))]
    lanes = [[0, 8, 0], [0, 16, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0, 0] for b in powers_of_two(1, W)], [], [W, 32, BM])


@gluon.constexpr_function
def dense_layout(W: int, BN: int) -> object:
    """[W, BN, 32]: a part of tile w; a thread has 8 neighboring inputs of every eighth output."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], *([0, b, 0] for b in powers_of_two(8, BN))]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[b, 0, 0] for b in powers_of_two(1, W)], [], [W, BN, 32])


@gluon.jit
def index(SIZE: tl.constexpr, DIM: tl.constexpr, LAYOUT: tl.constexpr):
    """0 to SIZE - 1 along dimension DIM of three."""
    if DIM == 0:
        flat = gl.arange(0, SIZE, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(flat, 1), 2)
    elif DIM == 1:
        flat = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(flat, 0), 2)
    else:
        flat = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
        return gl.expand_dims(gl.expand_dims(flat, 0), 1)


@gluon.jit
def weight_operand(words, exponent, FLOAT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, A: tl.constexpr):
    """Words [W, BN, 16] to the floats of 32 inputs of a tile, 32 * CHUNK and on, as operand A [W, BN, 32]."""
    W: tl.constexpr = words.shape[0]
    BN: tl.constexpr = words.shape[1]
    low, high = code_pair(words, exponent, FLOAT, BITS, CHUNK)
    inputs = gl.join(low, high).reshape(W, BN, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5)  # t u v e to u v t e
    return gl.convert_layout(inputs.reshape(W, BN, 32), A)


@gluon.jit
def dense_operand(weight, A: tl.constexpr):
    """32 inputs of weights [W, BN, 32] as operand A, in the order of `x_operand`."""
    W: tl.constexpr = weight.shape[0]
    BN: tl.constexpr = weight.shape[1]
    return gl.convert_layout(weight.reshape(W, BN, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(W, BN, 32), A)


@gluon.jit
def x_operand(x, B: tl.constexpr):
    """32 inputs of x [W, 32, BM] as operand B, in the same order."""
    W: tl.constexpr = x.shape[0]
    BM: tl.constexpr = x.shape[2]
    return gl.convert_layout(x.reshape(W, 4, 2, 2, 2, BM).permute(0, 2, 3, 1, 4, 5).reshape(W, 32, BM), B)


@gluon.jit
def repeat_rows(part, BN: tl.constexpr, MMA: tl.constexpr):
    """[W, 16, BM] to [W, BN, BM], the 16 rows of an MMA over and over."""
    W: tl.constexpr = part.shape[0]
    BM: tl.constexpr = part.shape[2]
    one = part.reshape(W, 1, 16, BM)
    many = gl.broadcast(one, gl.full([W, BN // 16, 16, BM], 0, gl.float32, one.type.layout))[0]
    return gl.convert_layout(many.reshape(W, BN, BM), MMA)
