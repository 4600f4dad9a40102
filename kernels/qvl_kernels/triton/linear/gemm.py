"""Int4 linears with 33 to about a thousand rows, where there is no wgmma: by mma.sync, from registers.

out^T = W x^T with the weight as operand A (`int4_operand`), and x as operand B, from shared memory. Words and x arrive
by asynchronous copies, a tile or two ahead. By machine code the tensor cores are the busiest pipe from some 40 rows on,
and all other instructions take half of their time.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4
from qvl_kernels.triton import checks
from qvl_kernels.triton.gluon import gl, gluon, mma, wait_group
from qvl_kernels.triton.launch import Spec, capability
from qvl_kernels.triton.linear.configs import config
from qvl_kernels.triton.linear.int4_operand import a_words_layout, copy_tile, scale_and_zero, scaled_pair
from qvl_kernels.triton.linear.int4_tile import BASE_BF16, BASE_FP16, EXPONENT_BF16, EXPONENT_FP16, TILE_INT4
from qvl_kernels.triton.linear.many_rows import store_sums, tile_pointers, tiled_plan, tiled_spec
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.published_shapes import DECODER


@gluon.jit(do_not_specialize=["rows"])  # one binary for every number of rows
def int4_gemm_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over the inputs k of split s: x[m, k] * round(scale[g, n] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 8); bias [OUTPUTS] or
    None, added by split 0; out [splits, rows, OUTPUTS]. A program: BM rows, BN outputs, W warps, S buffers. Scales of
    another dtype than x's are rounded to it first. Neighboring programs share words, which the L2 then holds.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BASE: tl.constexpr = BASE_FP16 if FLOAT == gl.float16 else BASE_BF16
    EXPONENT: tl.constexpr = EXPONENT_FP16 if FLOAT == gl.float16 else EXPONENT_BF16
    TILES: tl.constexpr = (INPUTS + TILE_INT4 - 1) // TILE_INT4
    RAGGED: tl.constexpr = TILES * TILE_INT4 != INPUTS
    PARTS: tl.constexpr = TILE_INT4 // GROUP if GROUP < TILE_INT4 else 1  # of a tile, each in one group
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1], [16, 8])
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: tl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    WORDS: tl.constexpr = a_words_layout(W, BN)
    n0, m0 = gl.program_id(1) * BN, gl.program_id(0) * BM
    split, splits = gl.program_id(2), gl.num_programs(2)
    first, last = split * TILES // splits, (split + 1) * TILES // splits
    x_to = gl.allocate_shared_memory(FLOAT, [S, BM, 128], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    words_to = gl.allocate_shared_memory(gl.int32, [S, BN, 16], gl.SwizzledSharedLayout(4, 1, 4, [1, 0]))
    x_at, k, words_at = tile_pointers(x_ptr, words_ptr, m0, n0, rows, INPUTS, BM, BN, W)
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, WORDS))
    for tile in range(S - 1):
        copy_tile(x_to, words_to, x_at, words_at, k, first + tile, tile, last, INPUTS, PADDED, RAGGED)
    exponent = gl.load(words_ptr, rows < 0, EXPONENT)  # never loaded: a constant that stays in a register
    scale, zero = scale_and_zero(scales_ptr, zeros_ptr, n, first * TILE_INT4, INPUTS, PADDED, GROUP, BASE, FLOAT)
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    for i in range(0, last - first):
        begin, ahead = (first + i) * TILE_INT4, i + S - 1
        wait_group(S - 2)  # this tile is there, and every warp is done with the one before, whose buffer is next
        copy_tile(x_to, words_to, x_at, words_at, k, first + ahead, ahead % S, last, INPUTS, PADDED, RAGGED)
        words = words_to.index(i % S).load(WORDS)
        x = x_to.index(i % S)
        for part in gl.static_range(PARTS):
            if part > 0:
                at = begin + part * GROUP
                scale, zero = scale_and_zero(scales_ptr, zeros_ptr, n, at, INPUTS, PADDED, GROUP, BASE, FLOAT)
            for chunk in gl.static_range(part * (4 // PARTS), (part + 1) * (4 // PARTS)):
                low, high = scaled_pair(words, exponent, zero, scale, FLOAT, chunk)
                weight = gl.convert_layout(gl.join(low, high).reshape(BN, 32), A)
                acc = mma(weight, x.slice(32 * chunk, 32, 1).permute([1, 0]).load(B), acc)
        at = begin + TILE_INT4
        scale, zero = scale_and_zero(scales_ptr, zeros_ptr, n, at, INPUTS, PADDED, GROUP, BASE, FLOAT)
    wait_group(0)
    store_sums(acc, bias_ptr, out_ptr, split, m0, n0, rows, OUTPUTS, BM, BN, W, MMA)


def gemm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """x [rows, K] to [rows, N] in x's dtype, or split-K partial sums [S, rows, N] if M is too small to fill the GPU."""
    return plan_gemm(x, weight, bias)(x)


def plan_gemm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 8-row blocks."""
    checks.tensor("int4_gemm", "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device("int4_gemm", x, bias, *weight.tensors().values())
    rows, padded = len(x), weight.words.shape[1]
    chosen = config(capability(x.device), "gemm", rows, weight.inputs, padded)
    return tiled_plan(int4_gemm_kernel, rows, weight, bias, chosen)


def aot_specs(capability: int) -> list[Spec]:
    """The four linears of a decoder layer at 64 and 512 rows, one in bfloat16, one with zero points."""
    fp16, bf16 = torch.float16, torch.bfloat16
    cases = [(name, rows, fp16, True) for name in DECODER for rows in (64, 512)]
    cases += [("qkv", 64, dtype, dtype == bf16) for dtype in (bf16, fp16)]
    return [tiled_spec(int4_gemm_kernel, "gemm", capability, *case) for case in cases]
