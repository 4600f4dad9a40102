"""Int4 GPTQ linear, 1 to 16 rows: the weights are read once, at the speed of memory.

Tensor cores even for one row: a dot takes 0.25 instructions a weight, CUDA cores one for each weight and row. Budget
at 0.6 of memory time, everything included: 2.9 instructions a weight on A100, 2.6 on H100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, blocks, capability
from qvl_kernels.triton.linear.configs import FEW, Config, config
from qvl_kernels.triton.linear.int4_shapes import DECODER, example, weight_bytes
from qvl_kernels.triton.linear.int4_tile import TILE, WORDS, floats, held, magic, magic_base

MOST_RATIO, LEAST_WIDE = 0.6, 0.9


@triton.jit(do_not_specialize=["rows"])  # one binary for every batch size
def int4_small_m_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over groups g of split s: scale[g, n] * (sum over k of g: x[m, k] * (q[k, n] - zero[g, n])).

    x [rows, INPUTS]; words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 8); bias [OUTPUTS]
    or None, which split 0 adds; out [splits, rows, OUTPUTS].

    The dot multiplies x by UNIT * (BASE + q); UNIT * (BASE + zero) times the group's sum of x is taken off its result,
    as the scale is put on it: per output and group, not per weight.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    BASE: tl.constexpr = 0 if FLOAT == tl.float16 else magic_base(FLOAT)
    UNIT: tl.constexpr = 2.0**-21 if FLOAT == tl.float16 else 1.0
    PARTS: tl.constexpr = TILE // GROUP if GROUP < TILE else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE // PARTS
    RAGGED: tl.constexpr = (INPUTS + TILE - 1) // TILE * TILE != INPUTS
    TILES: tl.constexpr = (INPUTS + TILE - 1) // TILE
    split, splits = tl.program_id(1), tl.num_programs(1)
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    exponent = 0 if FLOAT == tl.float16 else held(magic(FLOAT), words_ptr, rows)
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
            weight = floats(words, FLOAT, exponent, part * 4 // PARTS, 4 // PARTS)
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


def int4_small_m(x: Tensor, weight: PackedInt4, bias: Tensor | None = None, splits: int | None = None) -> Tensor:
    """x [rows, K] of 1 to 16 rows to float32 partial sums [S, rows, N], or with one split to [rows, N] in x's dtype.

    S is the configuration's where `splits` is None.
    """
    op, padded = "int4_small_m", weight.words.shape[1]
    checks.tensor(op, "x", x, (None, weight.inputs), torch.float16, torch.bfloat16)
    checks.device(op, x, bias, *weight.tensors().values())
    if not 0 < len(x) <= FEW:
        raise ValueError(f"{op}: x has {len(x)} rows; expected 1 to {FEW}")
    chosen = config(capability(x.device), "small_m", len(x), weight.inputs, padded)
    if splits is not None:
        chosen = chosen._replace(splits=splits)
    shape = (chosen.splits, len(x), weight.outputs)
    out = x.new_empty(shape, dtype=x.dtype if chosen.splits == 1 else torch.float32)
    _plan(x, weight, bias, out, chosen).run()
    return out[0] if chosen.splits == 1 else out


def _plan(x: Tensor, weight: PackedInt4, bias: Tensor | None, out: Tensor, chosen: Config) -> Launch:
    padded = weight.words.shape[1]
    return Launch(
        int4_small_m_kernel,
        (blocks(padded, chosen.columns), chosen.splits),
        {"x_ptr": x, "words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros,
         "bias_ptr": bias, "out_ptr": out, "rows": len(x)},
        {"INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded, "GROUP": weight.group,
         "BM": chosen.rows, "BN": chosen.columns},
        chosen.warps,
        chosen.stages,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """The four linears of a decoder layer in float16 and bfloat16, at the fewest and most rows; one has zero points."""
    cases = [(name, rows, torch.float16, True) for name in DECODER for rows in (1, 4, 16)]
    cases += [(name, rows, torch.bfloat16, True) for name in DECODER for rows in (1, 16)]
    cases += [("qkv", 16, dtype, False) for dtype in (torch.float16, torch.bfloat16)]
    specs = []
    for name, rows, dtype, symmetric in cases:
        x, weight, bias = example(name, rows, dtype, symmetric)
        chosen = config(capability, "small_m", rows, weight.inputs, weight.outputs)
        out = x.new_empty((chosen.splits, rows, weight.outputs), dtype=torch.float32)
        label = f"int4_small_m {name}, {rows} row{'s'[: rows > 1]}"
        label += "" if dtype == torch.float16 else ", bf16"
        label += "" if symmetric else ", zero points"
        specs.append(
            Spec(
                label,
                _plan(x, weight, bias, out, chosen),
                x.nbytes + weight_bytes(weight, bias) + out.nbytes,
                max_ratio=MOST_RATIO,
                min_wide=LEAST_WIDE,
                loop_trips=blocks(weight.inputs, TILE.value) / chosen.splits,
                flops=2 * rows * weight.inputs * weight.outputs,
                per_layer=int(dtype == torch.float16 and symmetric),
                least_bytes=weight_bytes(weight, bias),
            )
        )
    return specs
