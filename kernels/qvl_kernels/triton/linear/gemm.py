"""Int4 GPTQ linear, 33 to about a thousand rows, without wgmma: each program unpacks its tile, then multiplies.

This kernel is bound by the tensor cores, so arithmetic on weights is affordable: each weight is rounded once to x's
dtype, as in the reference, and one accumulator suffices where the small-M kernel has two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, capability
from qvl_kernels.triton.linear.configs import Config, config
from qvl_kernels.triton.linear.int4_tile import (
    BASE_BF16,
    BASE_FP16,
    EXPONENT_BF16,
    EXPONENT_FP16,
    TILE_INT4,
    WORDS,
    keep_in_register,
    unpack_int4,
)
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.published_shapes import DECODER, example, weight_bytes
from qvl_kernels.util import cdiv


@triton.jit(do_not_specialize=["rows"])  # one binary for every batch size
def int4_gemm_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over the inputs k of split s: x[m, k] * round(scale[g, n] * (q[k, n] - zero[g, n])).

    Shapes as in `int4_small_m_kernel`; each split has TILES tiles. Neighboring programs share columns, whose words
    the L2 then holds. Scales of another dtype than x's are rounded to it first.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BASE: tl.constexpr = BASE_FP16 if FLOAT == tl.float16 else BASE_BF16
    EXPONENT: tl.constexpr = EXPONENT_FP16 if FLOAT == tl.float16 else EXPONENT_BF16
    PARTS: tl.constexpr = TILE_INT4 // GROUP if GROUP < TILE_INT4 else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE_INT4 // PARTS
    RAGGED: tl.constexpr = (INPUTS + TILE_INT4 - 1) // TILE_INT4 * TILE_INT4 != INPUTS
    split = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    exponent = keep_in_register(EXPONENT, words_ptr, rows)
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(TILES):
        tile = split * TILES + i
        words = tl.load(words_ptr + (tile * PADDED + n[:, None]) * WORDS + r[None, :])
        words = tl.trans(words).to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            first = tile * TILE_INT4 + part * SPAN
            inside = m[:, None] < rows
            if RAGGED:
                inside &= first + k[None, :] < INPUTS
            x = tl.load(x_ptr + m[:, None] * INPUTS + first + k[None, :], inside, 0.0)
            weight = unpack_int4(words, FLOAT, exponent, part * 4 // PARTS, 4 // PARTS)
            group = (tl.minimum(first, INPUTS - 1) if RAGGED else first) // GROUP * PADDED + n
            scale = tl.load(scales_ptr + group).to(FLOAT)[None, :]
            if zeros_ptr is None:
                weight -= BASE + 8
            else:
                weight -= (tl.load(zeros_ptr + group).to(tl.float32) + BASE).to(FLOAT)[None, :]
            acc = tl.dot(x, (weight * scale).to(FLOAT), acc)
    if bias_ptr is not None and split == 0:
        acc += tl.load(bias_ptr + n, n < OUTPUTS, 0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < OUTPUTS)
    out = out_ptr + (split * rows + m[:, None]) * OUTPUTS + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)


def gemm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """x [rows, K] to [rows, N] in x's dtype, or split-K partial sums [S, rows, N] if M is too small to fill the GPU."""
    return plan_gemm(x, weight, bias)(x)


def plan_gemm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 8-row blocks."""
    checks.tensor("int4_gemm", "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device("int4_gemm", x, bias, *weight.tensors().values())
    rows, padded = len(x), weight.words.shape[1]
    return _plan(rows, weight, bias, config(capability(x.device), "gemm", rows, weight.inputs, padded))


def _plan(rows: int, weight: PackedInt4 | PackedInt8, bias: Tensor | None, chosen: Config) -> MatmulPlan:
    tiles, padded, _ = weight.words.shape
    if tiles % chosen.splits:
        raise ValueError(f"int4_gemm: {tiles} tiles do not divide into {chosen.splits} splits")
    launch = Launch(
        int4_gemm_kernel,
        (cdiv(rows, chosen.rows), cdiv(padded, chosen.columns), chosen.splits),
        {"words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros, "bias_ptr": bias},
        {"INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded, "GROUP": weight.group,
         "TILES": tiles // chosen.splits, "BM": chosen.rows, "BN": chosen.columns},
        chosen.warps,
        chosen.stages,
    )  # fmt: skip
    return MatmulPlan(launch, chosen.splits, weight.outputs)


def aot_specs(capability: int) -> list[Spec]:
    """The four linears of a decoder layer at 64 and 512 rows."""
    specs = []
    for name in DECODER:
        for rows in (64, 512):
            x, weight, bias = example(4, name, rows, torch.float16)
            chosen = config(capability, "gemm", rows, weight.inputs, weight.outputs)
            launch, out = _plan(rows, weight, bias, chosen).prepare(x)
            specs.append(
                Spec(
                    f"int4_gemm {name}, {rows} rows",
                    launch,
                    x.nbytes + weight_bytes(weight, bias) + out.nbytes,
                    loop_trips=cdiv(weight.inputs, weight.TILE) / chosen.splits,
                    flops=2 * rows * weight.inputs * weight.outputs,
                )
            )
    return specs
