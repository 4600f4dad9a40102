"""Int4 and int8 linears with few rows (small M): memory-bound, every weight is read once.

Tensor cores multiply even a single row: a dot takes 0.25 instructions a weight, CUDA cores one for each weight and row.
The product is out^T = W x^T by mma.sync with the weights as operand A, straight from the registers that they are
unpacked in (`mma_operands`, `code_pairs`). Budget at 0.6 of memory time, everything included: 2.9 instructions an int4
weight on A100 and 2.6 on H100; an int8 weight has twice the bytes, so 5.8 and 5.2.

The warps of a program take different tiles of K, and their sums meet in shared memory once, at the end. Which warp and
split a tile belongs to depends on the weight alone, and a row's products meet in the same order for any number of rows:
a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.dependent import announce, dependent, wait
from qvl_kernels.triton.gluon import gl, gluon, mma
from qvl_kernels.triton.launch import Launch, Spec, capability, counted
from qvl_kernels.triton.linear.code_pairs import EXPONENT, base, unit
from qvl_kernels.triton.linear.configs import SMALL_M, Config, config
from qvl_kernels.triton.linear.epilogue import ask_for_words, gated, output_of
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.mma_operands import (
    index,
    repeat_rows,
    weight_operand,
    words_layout,
    x_layout,
    x_operand,
)
from qvl_kernels.triton.linear.published_shapes import DECODER, example, weight_bytes
from qvl_kernels.util import cdiv

# Bars of the kernel report. With 9 to 16 rows the operand of x doubles, and so do its MMAs: an H100 took 15.5 us for
# qkv, whose weight it reads in 8.5, at a ratio of 0.65, and no configuration of a lower ratio was faster.
MOST_RATIO, MOST_RATIO_16, LEAST_WIDE = 0.6, 0.7, 0.9
SHORT_LOOP, ENDS = 4, 0.02  # up to this many trips, the code around the loop adds this to a ratio
ZERO_POINTS = 0.02  # and they do


@gluon.jit(do_not_specialize=["rows"])  # one binary for every batch size of a tile
def small_m_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    BITS: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over groups g of split s: scale[g, n] * (sum over k of g: x[m, k] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: the middle code);
    bias [OUTPUTS] or None, added by split 0; out [splits, rows, OUTPUTS]. A program: BM rows, BN outputs, W warps.
    GATED: the outputs are up | gate, a program has half of its outputs from each, and out [1, rows, OUTPUTS // 2] is
    their SwiGLU.

    The dot multiplies x by UNIT * (BASE + q). UNIT * (BASE + zero) times the group's sum of x, which an MMA of
    constants makes, is subtracted from its result, and the scale is applied to it: once per output and group.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    UNIT: tl.constexpr = unit(BITS, FLOAT == gl.float16)
    BASE: tl.constexpr = base(BITS, FLOAT == gl.float16)
    TILE: tl.constexpr = 512 // BITS  # inputs of 16 words
    CHUNKS: tl.constexpr = TILE // 32
    PARTS: tl.constexpr = TILE // GROUP if GROUP < TILE else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE // PARTS
    TILES: tl.constexpr = (INPUTS + TILE - 1) // TILE
    RAGGED: tl.constexpr = TILES * TILE != INPUTS
    MIDDLE: tl.constexpr = BASE + (1 << (BITS - 1))
    SUMMED: tl.constexpr = 1.0 if zeros_ptr is not None else -MIDDLE * UNIT  # what the sum of x is multiplied by
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: tl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    L: tl.constexpr = words_layout(W, BN)
    X: tl.constexpr = x_layout(W, BM)
    S: tl.constexpr = gl.SliceLayout(2, MMA)
    split, splits = gl.program_id(1), gl.num_programs(1)
    first, last = split * TILES // splits, (split + 1) * TILES // splits
    HALF: tl.constexpr = BN // 2 if GATED else BN
    n0, m0 = gl.program_id(0) * HALF, gl.program_id(2) * BM
    announce(PDL)
    if PDL and BITS == 4:  # with 8 bits a register spills
        ask_for_words(words_ptr + n0 * 16, first, last, PADDED, HALF, W)
        if GATED:
            ask_for_words(words_ptr + (n0 + OUTPUTS // 2) * 16, first, last, PADDED, HALF, W)
    wait(PDL)
    w, w_x = index(W, 0, L), index(W, 0, X)  # [W, 1, 1]
    w_s = gl.expand_dims(gl.arange(0, W, gl.SliceLayout(1, S)), 1)  # [W, 1]
    n_w = output_of(n0, index(BN, 1, L), OUTPUTS, BN, GATED)  # [1, BN, 1]
    words_at = words_ptr + n_w * 16 + index(16, 2, L)
    n_s = output_of(n0, gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, S)), 0), OUTPUTS, BN, GATED)  # [1, BN]
    k = index(32, 1, X)
    x_at = x_ptr + gl.minimum(m0 + index(BM, 2, X), rows - 1) * INPUTS + k  # rows past the last are the last
    exponent = 0
    if BITS == 4 and FLOAT != gl.float16:
        exponent = gl.load(words_ptr, rows < 0, EXPONENT)  # never loaded: a constant that stays in a register
    summed = gl.full([W, 16, 32], SUMMED, FLOAT, A)
    acc = gl.zeros([W, BN, BM], gl.float32, MMA)
    for i in range(first, last, W):
        if W == 1:
            words = gl.load(words_at + i * (PADDED * 16))
        else:
            words = gl.load(words_at + (i + w) * (PADDED * 16), i + w < last)
        for part in gl.static_range(PARTS):
            total = gl.zeros([W, 16, BM], gl.float32, MMA)
            dot = gl.zeros([W, BN, BM], gl.float32, MMA)
            for chunk in gl.static_range(part * (CHUNKS // PARTS), (part + 1) * (CHUNKS // PARTS)):
                start = gl.minimum(i + w_x, last - 1) * TILE + 32 * chunk  # past the end the last tile once more
                if RAGGED:
                    x = x_operand(gl.load(x_at + start, start + k < INPUTS, 0.0), B)
                else:
                    x = x_operand(gl.load(x_at + start), B)
                if SUMMED != 0:
                    total = mma(summed, x, total)
                dot = mma(weight_operand(words, exponent, FLOAT, BITS, chunk, A), x, dot)
            group = gl.minimum((i + w_s) * TILE + part * SPAN, INPUTS - 1) // GROUP * PADDED + n_s  # [W, BN]
            inside = (i + w_s < last) & (n_s >= 0)
            scale = gl.load(scales_ptr + group, inside, 0.0).to(gl.float32)
            if zeros_ptr is not None:
                zero = (gl.load(zeros_ptr + group, inside, 0).to(gl.float32) + BASE) * UNIT
                dot -= repeat_rows(total, BN, MMA) * gl.expand_dims(zero, 2)
            elif SUMMED != 0:
                dot += repeat_rows(total, BN, MMA)
            acc += dot * gl.expand_dims(scale, 2)
    y = gl.sum(acc, 0) * (1 / UNIT)  # [BN, BM]
    if bias_ptr is not None and split == 0:
        at = output_of(n0, gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, y.type.layout)), 1), OUTPUTS, BN, GATED)
        y += gl.load(bias_ptr + at, at < OUTPUTS, 0.0).to(gl.float32)
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    if GATED:
        y = gated(y, FLOAT)
    n = n0 + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, y.type.layout)), 1)
    m = m0 + gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, y.type.layout)), 0)
    out = out_ptr + (split * rows + m) * WIDTH + n
    gl.store(out, y.to(out_ptr.dtype.element_ty), (n < WIDTH) & (m < rows))


def small_m(
    x: Tensor, weight: PackedInt4 | PackedInt8, bias: Tensor | None = None, splits: int | None = None
) -> Tensor:
    """x [rows, K] to split-K partial sums float32 [S, rows, N], or with one split to [rows, N] in x's dtype.

    S comes from the configuration if `splits` is None. Raises ValueError for more rows than `SMALL_M`.
    """
    return plan_small_m(x, weight, bias, splits)(x)


def plan_small_m(
    x: Tensor,
    weight: PackedInt4 | PackedInt8,
    bias: Tensor | None = None,
    splits: int | None = None,
    gated: bool = False,
) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 8-row blocks.

    gated: the outputs are up | gate, and what is returned is their SwiGLU [rows, N / 2], always of one split.
    """
    op, rows, most = f"int{weight.BITS}_small_m", len(x), SMALL_M[weight.BITS]
    checks.tensor(op, "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device(op, x, bias, *weight.tensors().values())
    if not 0 < rows <= most:
        raise ValueError(f"{op}: x has {rows} rows; expected 1 to {most}")
    if gated and weight.outputs % 2:
        raise ValueError(f"{op}: {weight.outputs} outputs; expected as many of up as of gate")
    here = capability(x.device)
    chosen = config(here, "small_m", rows, weight.inputs, weight.words.shape[1], weight.BITS)
    splits = 1 if gated else chosen.splits if splits is None else splits
    return _plan(rows, weight, bias, chosen._replace(splits=splits), gated, dependent(here, rows))


def gates_in_one_split(weight: PackedInt4 | PackedInt8, capability: int) -> bool:
    """Whether few rows of a weight take one split by its configuration, so that its SwiGLU can be taken on the way."""
    return config(capability, "small_m", 1, weight.inputs, weight.words.shape[1], weight.BITS).splits == 1


def _plan(
    rows: int,
    weight: PackedInt4 | PackedInt8,
    bias: Tensor | None,
    chosen: Config,
    gated: bool = False,
    pdl: bool = False,
) -> MatmulPlan:
    padded = weight.words.shape[1]
    programs = cdiv(weight.outputs, chosen.columns) if gated else cdiv(padded, chosen.columns)
    launch = Launch(
        small_m_kernel,
        (programs, chosen.splits, cdiv(rows, chosen.rows)),
        {"words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros, "bias_ptr": bias},
        {"BITS": weight.BITS, "INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded,
         "GROUP": weight.group, "BM": chosen.rows, "BN": chosen.columns, "W": chosen.warps, "GATED": gated, "PDL": pdl},
        chosen.warps,
        chosen.stages,
    )  # fmt: skip
    return MatmulPlan(launch, chosen.splits, weight.outputs // 2 if gated else weight.outputs)


def aot_specs(capability: int) -> list[Spec]:
    """Int4: a decoder layer in both dtypes at the fewest and most rows. Int8: the head, the deepest linear, 64 rows.

    One case of each has zero points.
    """
    fp16, bf16 = torch.float16, torch.bfloat16
    cases = [(4, name, rows, fp16, True) for name in DECODER for rows in (1, 4, 16, 32)]
    cases += [(4, name, rows, bf16, True) for name in DECODER for rows in (1, 16)]
    cases += [(4, "qkv", 16, dtype, False) for dtype in (fp16, bf16)]
    cases += [(8, "head", rows, dtype, True) for rows in (1, 16) for dtype in (fp16, bf16)]
    cases += [(8, "head", 64, fp16, True), (8, "down", 1, fp16, True), (8, "down", 1, bf16, True)]
    cases += [(8, "down", 16, fp16, False)]
    return [_spec(capability, *case) for case in cases]


def _spec(capability: int, bits: int, name: str, rows: int, dtype: torch.dtype, symmetric: bool) -> Spec:
    x, weight, bias = example(bits, name, rows, dtype, symmetric)
    chosen = config(capability, "small_m", rows, weight.inputs, weight.words.shape[1], bits)
    gated = name == "up_gate" and gates_in_one_split(weight, capability)
    launch, out = _plan(rows, weight, bias, chosen, gated, capability >= 90).prepare(x)
    trips = cdiv(weight.inputs, weight.TILE) / chosen.splits / chosen.warps
    around = (ENDS if trips <= SHORT_LOOP else 0.0) + (0.0 if symmetric else ZERO_POINTS)
    bar = MOST_RATIO if rows <= 8 or bits == 8 else MOST_RATIO_16
    name += " swiglu" if gated else ""
    label = f"int{bits}_small_m {name}, {counted(rows, 'row')}{'' if dtype == torch.float16 else ', bf16'}"
    return Spec(
        label + ("" if symmetric else ", zero points"),
        launch,
        x.nbytes + weight_bytes(weight, bias) + out.nbytes,
        max_ratio=None if rows > 16 else round(bar + around, 2),
        min_wide=LEAST_WIDE,
        from_registers=True,
        loop_trips=trips,
        flops=2 * rows * weight.inputs * weight.outputs,
        per_layer=int(bits == 4 and dtype == torch.float16 and symmetric),
        least_bytes=weight_bytes(weight, bias),
    )
