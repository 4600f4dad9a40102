"""Int4 linears with 33 to a thousand rows, on capability 9.0: each tile is dequantized in registers, for wgmma.

out^T = W x^T with the weight as operand A (`int4_operand`), and x as operand B, from shared memory. Words and x arrive
by asynchronous copies, two tiles ahead. The source dequantizes a tile while the one before is multiplied; ptxas moves
that behind the wait, so the tensor cores idle meanwhile, a quarter of the time.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.gluon import (
    fence_async_shared,
    gl,
    gluon,
    wait_group,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from qvl_kernels.triton.launch import Spec, capability
from qvl_kernels.triton.linear.configs import WGMMA_CAPABILITY, config
from qvl_kernels.triton.linear.int4_operand import a_words_layout, copy_tile, scale_and_zero, scaled_pair
from qvl_kernels.triton.linear.int4_tile import BASE_BF16, BASE_FP16, EXPONENT_BF16, EXPONENT_FP16, TILE_INT4
from qvl_kernels.triton.linear.many_rows import store_sums, tile_pointers, tiled_plan, tiled_spec
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.published_shapes import DECODER


@gluon.jit
def weights_of(words, exponent, zero, scale, FLOAT: tl.constexpr, A: tl.constexpr):
    """Words [BN, 16] of a tile, zero points with their base and scales [BN, 1], to weights [BN, 128] as operand A."""
    BN: tl.constexpr = words.shape[0]
    l0, h0 = scaled_pair(words, exponent, zero, scale, FLOAT, 0)
    l1, h1 = scaled_pair(words, exponent, zero, scale, FLOAT, 1)
    l2, h2 = scaled_pair(words, exponent, zero, scale, FLOAT, 2)
    l3, h3 = scaled_pair(words, exponent, zero, scale, FLOAT, 3)
    even = gl.join(gl.join(l0, h0), gl.join(l2, h2))  # [BN, 16, high, chunk / 2]
    odd = gl.join(gl.join(l1, h1), gl.join(l3, h3))
    all_of = gl.join(even, odd).permute(0, 3, 4, 1, 2)  # [BN, chunk / 2, chunk % 2, 16, high]
    return gl.convert_layout(all_of.reshape(BN, 128), A)


@gluon.jit(do_not_specialize=["rows"])  # one binary for every number of rows
def int4_wgmma_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over the inputs k of split s: x[m, k] * round(scale[g, n] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 8), groups of whole
    tiles; bias [OUTPUTS] or None, added by split 0; out [splits, rows, OUTPUTS]. A program: BM rows, BN outputs, W
    warps, S buffers. Scales of another dtype than x's are rounded to it first. Neighboring programs share words.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BASE: tl.constexpr = BASE_FP16 if FLOAT == gl.float16 else BASE_BF16
    EXPONENT: tl.constexpr = EXPONENT_FP16 if FLOAT == gl.float16 else EXPONENT_BF16
    TILES: tl.constexpr = (INPUTS + TILE_INT4 - 1) // TILE_INT4
    RAGGED: tl.constexpr = TILES * TILE_INT4 != INPUTS
    MMA: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BM, 16])
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WORDS: tl.constexpr = a_words_layout(W, BN)
    ROW: tl.constexpr = gl.SliceLayout(1, WORDS)
    n0, m0 = gl.program_id(1) * BN, gl.program_id(0) * BM
    split, splits = gl.program_id(2), gl.num_programs(2)
    first, last = split * TILES // splits, (split + 1) * TILES // splits
    x_to = gl.allocate_shared_memory(FLOAT, [S, BM, 128], gl.NVMMASharedLayout(128, 16, 2))
    words_to = gl.allocate_shared_memory(gl.int32, [S, BN, 16], gl.SwizzledSharedLayout(4, 1, 4, [1, 0]))
    x_at, k, words_at = tile_pointers(x_ptr, words_ptr, m0, n0, rows, INPUTS, BM, BN, W)
    n = n0 + gl.arange(0, BN, ROW)
    for tile in range(S - 1):
        copy_tile(x_to, words_to, x_at, words_at, k, first + tile, tile, last, INPUTS, PADDED, RAGGED)
    wait_group(S - 2)
    exponent = gl.load(words_ptr, rows < 0, EXPONENT)  # never loaded: a constant that stays in a register
    scale, zero = scale_and_zero(scales_ptr, zeros_ptr, n, first * TILE_INT4, INPUTS, PADDED, GROUP, BASE, FLOAT)
    weights = weights_of(words_to.index(0).load(WORDS), exponent, zero, scale, FLOAT, A)
    acc = gl.zeros([BN, BM], gl.float32, MMA)
    for i in range(0, last - first):
        then = (first + i + 1) * TILE_INT4
        wait_group(S - 3)  # x of this tile and the words of the next are there
        fence_async_shared()
        scale, zero = scale_and_zero(scales_ptr, zeros_ptr, n, then, INPUTS, PADDED, GROUP, BASE, FLOAT)
        sums = warpgroup_mma(weights, x_to.index(i % S).permute([1, 0]), acc, is_async=True)
        ahead = i + S - 1
        copy_tile(x_to, words_to, x_at, words_at, k, first + ahead, ahead % S, last, INPUTS, PADDED, RAGGED)
        following = weights_of(words_to.index((i + 1) % S).load(WORDS), exponent, zero, scale, FLOAT, A)
        acc, weights = warpgroup_mma_wait(0, [sums, weights])
        weights = following
    wait_group(0)
    store_sums(acc, bias_ptr, out_ptr, split, m0, n0, rows, OUTPUTS, BM, BN, W, MMA)


def wgmma(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """x [rows, K] to [rows, N] in x's dtype, or split-K partial sums [S, rows, N] if M is too small to fill the GPU."""
    return plan_wgmma(x, weight, bias)(x)


def takes(weight: PackedInt4 | PackedInt8) -> bool:
    """Whether the kernel multiplies by a weight: int4, with groups of whole tiles."""
    return weight.BITS == 4 and (weight.group % weight.TILE == 0 or weight.group >= weight.inputs)


def plan_wgmma(x: Tensor, weight: PackedInt4 | PackedInt8, bias: Tensor | None = None) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 8-row blocks."""
    checks.tensor("int4_wgmma", "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device("int4_wgmma", x, bias, *weight.tensors().values())
    if not takes(weight):
        raise ValueError(f"int4_wgmma: int{weight.BITS} in groups of {weight.group}; expected int4 in whole tiles")
    rows, padded = len(x), weight.words.shape[1]
    chosen = config(capability(x.device), "wgmma", rows, weight.inputs, padded)
    return tiled_plan(int4_wgmma_kernel, rows, weight, bias, chosen)


def aot_specs(capability: int) -> list[Spec]:
    """The four linears of a decoder layer at 64 to 512 rows, one in bfloat16, one with zero points; for 9.0 alone."""
    if capability != WGMMA_CAPABILITY:
        return []
    fp16, bf16 = torch.float16, torch.bfloat16
    cases = [(name, rows, fp16, True) for name in DECODER for rows in (64, 128, 512)]
    cases += [("qkv", rows, dtype, dtype == bf16) for rows in (64, 512) for dtype in (bf16, fp16)]
    return [tiled_spec(int4_wgmma_kernel, "wgmma", capability, *case) for case in cases]
