"""Around the loop of the linears of few rows: which outputs a program has, their SwiGLU, and what it asks for early."""

from __future__ import annotations

import triton.language as tl

from qvl_kernels.triton.dependent import prefetch
from qvl_kernels.triton.gluon import gl, gluon

PREFETCHED = tl.constexpr(4)  # trips of a program's loop whose weights it asks for before it waits for its inputs
MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
LOWEST = tl.constexpr(-40.0)  # silu(-40) is -2e-16


@gluon.constexpr_function
def lanes_layout(W: int) -> object:
    """[W, 32]: warp w has row w, a lane has one element."""
    lanes = [[0, 1 << b] for b in range(5)]
    return gl.DistributedLinearLayout([], lanes, [[1 << b, 0] for b in range(W.bit_length() - 1)], [], [W, 32])


@gluon.jit
def output_of(n0, at, OUTPUTS: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr):
    """The output of a weight at place `at` (0 to BN - 1) of the program whose results start at n0.

    GATED: of outputs up | gate, the first half of the places are of up and the second of gate, at the same results.
    Results past the last are the last.
    """
    if GATED:
        F: tl.constexpr = OUTPUTS // 2
        HALF: tl.constexpr = BN // 2
        result = n0 + at % HALF
        if F % HALF != 0:
            result = gl.minimum(result, F - 1)
        return result + at // HALF * F
    else:
        return n0 + at


@gluon.jit
def gated(y, FLOAT: tl.constexpr):
    """up * silu(gate) [BN / 2, BM] of y [BN, BM], its first half up; rounded to FLOAT where the separate ops round."""
    BN: tl.constexpr = y.shape[0]
    BM: tl.constexpr = y.shape[1]
    up, gate = gl.split(y.to(FLOAT).to(gl.float32).reshape(2, BN // 2, BM).permute(1, 2, 0))
    silu = gate / (1.0 + gl.exp2(gl.maximum(gate, LOWEST) * MINUS_LOG2E))
    return up * silu.to(FLOAT).to(gl.float32)


@gluon.jit
def ask_for_words(words_ptr, first, last, PADDED: tl.constexpr, OUTPUTS: tl.constexpr, W: tl.constexpr):
    """Ask for the first tiles of words of OUTPUTS outputs, from `words_ptr` in tile 0: a lane asks for a tile."""
    LANES: tl.constexpr = lanes_layout(W)
    w = gl.expand_dims(gl.arange(0, W, gl.SliceLayout(1, LANES)), 1)
    trip = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, LANES)), 0)
    tile = first + trip * W + w
    prefetch(words_ptr + tile * (PADDED * 16), (trip < PREFETCHED) & (tile < last), OUTPUTS * 64)
