"""Int8 linear, 1 to 64 rows in 16 bits: the weights are read once, at the speed of memory. The head, above all.

A weight is a byte here and half of one in int4, so that there are twice the instructions for it: 5.8 on A100 and 5.2 on
H100 at 0.6 of memory time. Levels are made exact 16-bit floats (`int8_tile`), and the scale is put on the accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, blocks, capability, counted
from qvl_kernels.triton.linear.configs import Config, config
from qvl_kernels.triton.linear.int8_shapes import example
from qvl_kernels.triton.linear.int8_tile import TILE, WORDS, levels

FEW = 64  # rows; beyond, the weight is unpacked once for torch's product, three passes over what is read here
TALL = 32  # rows of a program where there are more than 16: programs of the same columns read them from the L2
MOST_RATIO, LEAST_WIDE = 0.6, 0.9


@triton.jit(do_not_specialize=["rows"])  # one binary for every batch size
def int8_small_m_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over groups g of split s: scale[g, n] * (sum over k of g: x[m, k] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 128); bias [OUTPUTS]
    or None, which split 0 adds; out [splits, rows, OUTPUTS].
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE // GROUP if GROUP < TILE else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE // PARTS
    RAGGED: tl.constexpr = (INPUTS + TILE - 1) // TILE * TILE != INPUTS
    TILES: tl.constexpr = (INPUTS + TILE - 1) // TILE
    split, splits = tl.program_id(2), tl.num_programs(2)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    acc = tl.zeros([BM, BN], tl.float32)
    for tile in range(split * TILES // splits, (split + 1) * TILES // splits):
        words = tl.load(words_ptr + (tile * PADDED + n[:, None]) * WORDS + r[None, :])
        words = tl.trans(words).to(tl.uint32, bitcast=True)
        for part in tl.static_range(PARTS):
            first = tile * TILE + part * SPAN
            inside = m[:, None] < rows
            if RAGGED:
                inside &= first + k[None, :] < INPUTS
            x = tl.load(x_ptr + m[:, None] * INPUTS + first + k[None, :], inside, 0.0)
            group = (tl.minimum(first, INPUTS - 1) if RAGGED else first) // GROUP * PADDED + n
            zero = None if zeros_ptr is None else tl.load(zeros_ptr + group).to(tl.float32)
            weight = levels(words, zero, FLOAT, part * 2 // PARTS, 2 // PARTS)
            acc += tl.dot(x, weight) * tl.load(scales_ptr + group).to(tl.float32)[None, :]
    if bias_ptr is not None and split == 0:
        acc += tl.load(bias_ptr + n, n < OUTPUTS, 0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < OUTPUTS)
    out = out_ptr + (split * rows + m[:, None]).to(tl.int64) * OUTPUTS + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), inside)


def int8_small_m(x: Tensor, weight: PackedInt8, bias: Tensor | None = None, splits: int | None = None) -> Tensor:
    """x [rows, K] of 1 to 64 rows to float32 partial sums [S, rows, N], or with one split to [rows, N] in x's dtype.

    S is the configuration's where `splits` is None.
    """
    op = "int8_small_m"
    checks.tensor(op, "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device(op, x, bias, *weight.tensors().values())
    if not 0 < len(x) <= FEW:
        raise ValueError(f"{op}: x has {len(x)} rows; expected 1 to {FEW}")
    chosen = _config(capability(x.device), len(x), weight)
    if splits is not None:
        chosen = chosen._replace(splits=splits)
    shape = (chosen.splits, len(x), weight.outputs)
    out = x.new_empty(shape, dtype=x.dtype if chosen.splits == 1 else torch.float32)
    _plan(x, weight, bias, out, chosen).run()
    return out[0] if chosen.splits == 1 else out


def _config(capability: int, rows: int, weight: PackedInt8) -> Config:
    """That of int4's few rows: as many bytes a tile, and the same parts of the inputs."""
    chosen = config(capability, "small_m", rows, weight.inputs, weight.words.shape[1])
    return chosen if rows <= chosen.rows else chosen._replace(rows=TALL)


def _plan(x: Tensor, weight: PackedInt8, bias: Tensor | None, out: Tensor, chosen: Config) -> Launch:
    padded = weight.words.shape[1]
    return Launch(
        int8_small_m_kernel,
        (blocks(len(x), chosen.rows), blocks(padded, chosen.columns), chosen.splits),
        {"x_ptr": x, "words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros,
         "bias_ptr": bias, "out_ptr": out, "rows": len(x)},
        {"INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded, "GROUP": weight.group,
         "BM": chosen.rows, "BN": chosen.columns},
        chosen.warps,
        chosen.stages,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """The head at 1, 16 and 64 rows in both floats, the linear of a block with the most inputs, and zero points."""
    half, brain = torch.float16, torch.bfloat16
    cases = [("head", rows, dtype, True) for rows in (1, 16) for dtype in (half, brain)]
    cases += [("head", 64, half, True), ("down", 1, half, True), ("down", 1, brain, True), ("down", 16, half, False)]
    specs = []
    for name, rows, dtype, symmetric in cases:
        x, weight = example(name, rows, dtype, symmetric)
        chosen = _config(capability, rows, weight)
        out = x.new_empty((chosen.splits, rows, weight.outputs), dtype=dtype if chosen.splits == 1 else torch.float32)
        label = f"int8_small_m {name}, {counted(rows, 'row')}{'' if dtype == half else ', bf16'}"
        specs.append(
            Spec(
                label + ("" if symmetric else ", zero points"),
                _plan(x, weight, None, out, chosen),
                x.nbytes + weight.nbytes + out.nbytes,
                max_ratio=MOST_RATIO if rows <= chosen.rows else None,
                min_wide=LEAST_WIDE,
                loop_trips=blocks(weight.inputs, TILE.value) / chosen.splits,
                flops=2 * rows * weight.inputs * weight.outputs,
                least_bytes=weight.nbytes,
            )
        )
    return specs
