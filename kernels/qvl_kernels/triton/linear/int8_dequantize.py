"""A packed int8 weight to floats, once, for a matrix product of so many rows that torch's own is worth the pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, blocks
from qvl_kernels.triton.linear.int8_shapes import example
from qvl_kernels.triton.linear.int8_tile import TILE, WORDS, levels

COLUMNS, WARPS = 128, 4  # of a program: 8192 weights, 64 a thread


@triton.jit
def int8_dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n, k] = round(scale[g, n] * (q[k, n] - zero[g, n])): one tile of inputs and BN outputs a program.

    words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 128); out [OUTPUTS, INPUTS].
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE // GROUP if GROUP < TILE else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE // PARTS
    tile, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    at = (tile * PADDED + n).to(tl.int64)
    words = tl.trans(tl.load(words_ptr + at[:, None] * WORDS + r[None, :])).to(tl.uint32, bitcast=True)
    for part in tl.static_range(PARTS):
        first = tile * TILE + part * SPAN
        group = tl.minimum(first, INPUTS - 1) // GROUP * PADDED + n
        zero = None if zeros_ptr is None else tl.load(zeros_ptr + group).to(tl.float32)
        level = tl.trans(levels(words, zero, tl.float16, part * 2 // PARTS, 2 // PARTS)).to(tl.float32)
        weight = level * tl.load(scales_ptr + group).to(tl.float32)[:, None]
        inside = (n[:, None] < OUTPUTS) & (first + k[None, :] < INPUTS)
        tl.store(out_ptr + n.to(tl.int64)[:, None] * INPUTS + first + k[None, :], weight.to(OUT), inside)


def int8_dequantize(weight: PackedInt8, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weight [N, K] in `dtype`, its inputs in the packed order, each rounded once: `repack.dequantize`.

    Of `count` outputs from `first` on, a multiple of `COLUMNS`; None: all that follow.
    """
    checks.device("int8_dequantize", *weight.tensors().values())
    left = weight.outputs - first
    out = weight.scales.new_empty((left if count is None else min(count, left), weight.inputs), dtype=dtype)
    checks.tensor("int8_dequantize", "out", out, tuple(out.shape))
    if first % COLUMNS or left < 1:
        raise ValueError(f"int8_dequantize: first is {first}; expected a multiple of {COLUMNS} below {weight.outputs}")
    _plan(weight, out, first).run()
    return out


def _plan(weight: PackedInt8, out: Tensor, first: int = 0) -> Launch:
    tiles, padded, _ = weight.words.shape
    zeros = None if weight.zeros is None else weight.zeros[:, first:]
    return Launch(
        int8_dequantize_kernel,
        (tiles, blocks(len(out), COLUMNS)),
        {"words_ptr": weight.words[:, first:], "scales_ptr": weight.scales[:, first:], "zeros_ptr": zeros,
         "out_ptr": out},
        {"INPUTS": weight.inputs, "OUTPUTS": len(out), "PADDED": padded, "GROUP": weight.group, "BN": COLUMNS},
        WARPS,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """The tower's widest linear, in both floats."""
    specs = []
    for dtype in (torch.float16, torch.bfloat16):
        _, weight = example("fc", 1, dtype)
        out = torch.empty((weight.outputs, weight.inputs), dtype=dtype, device="meta")
        label = f"int8_dequantize fc{'' if dtype == torch.float16 else ', bf16'}"
        specs.append(Spec(label, _plan(weight, out), weight.nbytes + out.nbytes, max_ratio=0.6))
    return specs
