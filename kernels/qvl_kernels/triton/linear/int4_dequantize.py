"""A packed int4 weight to 16 bits, once, for a matrix product of so many rows that torch's own is worth the pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, blocks
from qvl_kernels.triton.linear.int4_shapes import DECODER, example
from qvl_kernels.triton.linear.int4_tile import TILE, WORDS, floats, magic, magic_base

COLUMNS, WARPS = 64, 4  # of a program: 8192 weights, 64 a thread


@triton.jit
def int4_dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n, k] = round(scale[g, n] * (q[k, n] - zero[g, n])): one tile of inputs and BN outputs a program.

    words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 8); out [OUTPUTS, INPUTS].
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    FLOAT: tl.constexpr = tl.bfloat16 if OUT == tl.bfloat16 else tl.float16
    BASE: tl.constexpr = magic_base(FLOAT)
    PARTS: tl.constexpr = TILE // GROUP if GROUP < TILE else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE // PARTS
    tile, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    at = (tile * PADDED + n).to(tl.int64)
    words = tl.trans(tl.load(words_ptr + at[:, None] * WORDS + r[None, :])).to(tl.uint32, bitcast=True)
    for part in tl.static_range(PARTS):
        first = tile * TILE + part * SPAN
        group = tl.minimum(first, INPUTS - 1) // GROUP * PADDED + n
        scale = tl.load(scales_ptr + group).to(tl.float32)[:, None]
        level = tl.trans(floats(words, FLOAT, magic(FLOAT), part * 4 // PARTS, 4 // PARTS)).to(tl.float32)
        if zeros_ptr is None:
            weight = (level - (BASE + 8)) * scale
        else:
            weight = (level - (tl.load(zeros_ptr + group).to(tl.float32) + BASE)[:, None]) * scale
        inside = (n[:, None] < OUTPUTS) & (first + k[None, :] < INPUTS)
        tl.store(out_ptr + n.to(tl.int64)[:, None] * INPUTS + first + k[None, :], weight.to(OUT), inside)


def int4_dequantize(weight: PackedInt4, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weight [N, K] in `dtype`, its inputs in the packed order, each rounded once: `repack.dequantize`.

    Of `count` outputs from `first` on, a multiple of `COLUMNS`; None: all that follow.
    """
    checks.device("int4_dequantize", *weight.tensors().values())
    left = weight.outputs - first
    out = weight.scales.new_empty((left if count is None else min(count, left), weight.inputs), dtype=dtype)
    checks.tensor("int4_dequantize", "out", out, tuple(out.shape))
    if first % COLUMNS or left < 1:
        raise ValueError(f"int4_dequantize: first is {first}; expected a multiple of {COLUMNS} below {weight.outputs}")
    _plan(weight, out, first).run()
    return out


def _plan(weight: PackedInt4, out: Tensor, first: int = 0) -> Launch:
    tiles, padded, _ = weight.words.shape
    zeros = None if weight.zeros is None else weight.zeros[:, first:]
    return Launch(
        int4_dequantize_kernel,
        (tiles, blocks(len(out), COLUMNS)),
        {"words_ptr": weight.words[:, first:], "scales_ptr": weight.scales[:, first:], "zeros_ptr": zeros,
         "out_ptr": out},
        {"INPUTS": weight.inputs, "OUTPUTS": len(out), "PADDED": padded, "GROUP": weight.group, "BN": COLUMNS},
        WARPS,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """The largest and the deepest weight of a decoder layer."""
    specs = []
    for name in ("up_gate", "down"):
        _, weight, _ = example(name, 1, torch.float16)
        out = torch.empty(DECODER[name][::-1], dtype=torch.float16, device="meta")
        specs.append(Spec(f"int4_dequantize {name}", _plan(weight, out), weight.nbytes + out.nbytes))
    return specs
