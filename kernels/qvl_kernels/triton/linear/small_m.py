"""Int4 and int8 linears with few rows (small M): memory-bound, every weight is read once.

Int4 takes 1 to 16 rows, int8 1 to 64; `configs` holds the limits. Tensor cores multiply even a single row: a dot takes
0.25 instructions a weight, CUDA cores one for each weight and row. Budget at 0.6 of memory time, everything included:
2.9 instructions an int4 weight on A100 and 2.6 on H100. An int8 weight has twice the bytes, so 5.8 and 5.2: values
become exact 16-bit floats (`int8_tile`), and the scale is applied to the accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, capability, counted
from qvl_kernels.triton.linear.configs import SMALL_M, Config, config
from qvl_kernels.triton.linear.int4_tile import (
    BASE_BF16,
    EXPONENT_BF16,
    TILE_INT4,
    WORDS,
    keep_in_register,
    unpack_int4,
)
from qvl_kernels.triton.linear.int8_tile import TILE_INT8, unpack_int8
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.published_shapes import DECODER, example, weight_bytes
from qvl_kernels.util import cdiv

MOST_RATIO, LEAST_WIDE = 0.6, 0.9  # bars of the kernel report


@triton.jit(do_not_specialize=["rows"])  # one binary for every batch size
def int4_small_m_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over groups g of split s: scale[g, n] * (sum over k of g: x[m, k] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 8); bias [OUTPUTS]
    or None, added by split 0; out [splits, rows, OUTPUTS].

    The dot multiplies x by UNIT * (BASE + q). UNIT * (BASE + zero) times the group's sum of x is subtracted from its
    result, and the scale is applied to it: once per output and group, not per weight.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BASE: tl.constexpr = 0 if FLOAT == tl.float16 else BASE_BF16
    UNIT: tl.constexpr = 2.0**-21 if FLOAT == tl.float16 else 1.0
    PARTS: tl.constexpr = TILE_INT4 // GROUP if GROUP < TILE_INT4 else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE_INT4 // PARTS
    RAGGED: tl.constexpr = (INPUTS + TILE_INT4 - 1) // TILE_INT4 * TILE_INT4 != INPUTS
    TILES: tl.constexpr = (INPUTS + TILE_INT4 - 1) // TILE_INT4
    split, splits = tl.program_id(1), tl.num_programs(1)
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    exponent = 0 if FLOAT == tl.float16 else keep_in_register(EXPONENT_BF16, words_ptr, rows)
    acc = tl.zeros([BM, BN], tl.float32)
    for tile in range(split * TILES // splits, (split + 1) * TILES // splits):
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
            scale = tl.load(scales_ptr + group).to(tl.float32)
            total = tl.sum(x.to(tl.float32), 1)[:, None] * UNIT
            if zeros_ptr is None:
                zero = total * (BASE + 8)
            else:
                zero = total * (tl.load(zeros_ptr + group).to(tl.float32) + BASE)[None, :]
            acc += (tl.dot(x, weight) - zero) * scale[None, :]
    acc *= 1 / UNIT
    if bias_ptr is not None and split == 0:
        acc += tl.load(bias_ptr + n, n < OUTPUTS, 0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < OUTPUTS)
    out = out_ptr + (split * rows + m[:, None]) * OUTPUTS + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])  # one binary for every batch size
def int8_small_m_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over groups g of split s: scale[g, n] * (sum over k of g: x[m, k] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 128); bias [OUTPUTS]
    or None, added by split 0; out [splits, rows, OUTPUTS].
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE_INT8 // GROUP if GROUP < TILE_INT8 else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE_INT8 // PARTS
    RAGGED: tl.constexpr = (INPUTS + TILE_INT8 - 1) // TILE_INT8 * TILE_INT8 != INPUTS
    TILES: tl.constexpr = (INPUTS + TILE_INT8 - 1) // TILE_INT8
    split, splits = tl.program_id(2), tl.num_programs(2)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    acc = tl.zeros([BM, BN], tl.float32)
    for tile in range(split * TILES // splits, (split + 1) * TILES // splits):
        words = tl.load(words_ptr + (tile * PADDED + n[:, None]) * WORDS + r[None, :])
        words = tl.trans(words).to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            first = tile * TILE_INT8 + part * SPAN
            inside = m[:, None] < rows
            if RAGGED:
                inside &= first + k[None, :] < INPUTS
            x = tl.load(x_ptr + m[:, None] * INPUTS + first + k[None, :], inside, 0.0)
            group = (tl.minimum(first, INPUTS - 1) if RAGGED else first) // GROUP * PADDED + n
            zero = None if zeros_ptr is None else tl.load(zeros_ptr + group).to(tl.float32)
            weight = unpack_int8(words, zero, FLOAT, part * 2 // PARTS, 2 // PARTS)
            acc += tl.dot(x, weight) * tl.load(scales_ptr + group).to(tl.float32)[None, :]
    if bias_ptr is not None and split == 0:
        acc += tl.load(bias_ptr + n, n < OUTPUTS, 0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < OUTPUTS)
    out = out_ptr + (split * rows + m[:, None]).to(tl.int64) * OUTPUTS + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)


def small_m(
    x: Tensor, weight: PackedInt4 | PackedInt8, bias: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """x [rows, K] to split-K partial sums float32 [S, rows, N], or with one split to [rows, N] in x's dtype.

    S comes from the configuration if `splits` is None. Raises ValueError for more rows than `SMALL_M`.
    """
    return plan_small_m(x, weight, bias, splits)(x)


def plan_small_m(
    x: Tensor, weight: PackedInt4 | PackedInt8, bias: Tensor | None = None, splits: int | None = None
) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 16-row blocks."""
    op, rows, most = f"int{weight.BITS}_small_m", len(x), SMALL_M[weight.BITS]
    checks.tensor(op, "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device(op, x, bias, *weight.tensors().values())
    if not 0 < rows <= most:
        raise ValueError(f"{op}: x has {rows} rows; expected 1 to {most}")
    padded = weight.words.shape[1]
    chosen = config(capability(x.device), "small_m", rows, weight.inputs, padded, weight.BITS)
    return _plan(rows, weight, bias, chosen if splits is None else chosen._replace(splits=splits))


def _plan(rows: int, weight: PackedInt4 | PackedInt8, bias: Tensor | None, chosen: Config) -> MatmulPlan:
    padded, int8 = weight.words.shape[1], weight.BITS == 8
    grid = (cdiv(padded, chosen.columns), chosen.splits)
    launch = Launch(
        int8_small_m_kernel if int8 else int4_small_m_kernel,
        (cdiv(rows, chosen.rows), *grid) if int8 else grid,
        {"words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros, "bias_ptr": bias},
        {"INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded, "GROUP": weight.group,
         "BM": chosen.rows, "BN": chosen.columns},
        chosen.warps,
        chosen.stages,
    )  # fmt: skip
    return MatmulPlan(launch, chosen.splits, weight.outputs)


def aot_specs(capability: int) -> list[Spec]:
    """Int4: a decoder layer in both dtypes at the fewest and most rows. Int8: the head, the deepest linear, 64 rows.

    One case of each has zero points.
    """
    fp16, bf16 = torch.float16, torch.bfloat16
    cases = [(4, name, rows, fp16, True) for name in DECODER for rows in (1, 4, 16)]
    cases += [(4, name, rows, bf16, True) for name in DECODER for rows in (1, 16)]
    cases += [(4, "qkv", 16, dtype, False) for dtype in (fp16, bf16)]
    cases += [(8, "head", rows, dtype, True) for rows in (1, 16) for dtype in (fp16, bf16)]
    cases += [(8, "head", 64, fp16, True), (8, "down", 1, fp16, True), (8, "down", 1, bf16, True)]
    cases += [(8, "down", 16, fp16, False)]
    return [_spec(capability, *case) for case in cases]


def _spec(capability: int, bits: int, name: str, rows: int, dtype: torch.dtype, symmetric: bool) -> Spec:
    x, weight, bias = example(bits, name, rows, dtype, symmetric)
    chosen = config(capability, "small_m", rows, weight.inputs, weight.words.shape[1], bits)
    launch, out = _plan(rows, weight, bias, chosen).prepare(x)
    label = f"int{bits}_small_m {name}, {counted(rows, 'row')}{'' if dtype == torch.float16 else ', bf16'}"
    return Spec(
        label + ("" if symmetric else ", zero points"),
        launch,
        x.nbytes + weight_bytes(weight, bias) + out.nbytes,
        max_ratio=MOST_RATIO if rows <= 16 else None,
        min_wide=LEAST_WIDE,
        loop_trips=cdiv(weight.inputs, weight.TILE) / chosen.splits,
        flops=2 * rows * weight.inputs * weight.outputs,
        per_layer=int(bits == 4 and dtype == torch.float16 and symmetric),
        least_bytes=weight_bytes(weight, bias),
    )
