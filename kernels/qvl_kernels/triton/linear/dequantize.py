"""Dequantize a packed int4 or int8 weight for torch's own matrix product, which pays off with many rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.triton.linear.int4_tile import (
    BASE_BF16,
    BASE_FP16,
    EXPONENT_BF16,
    EXPONENT_FP16,
    TILE_INT4,
    WORDS,
    unpack_int4,
)
from qvl_kernels.triton.linear.int8_tile import TILE_INT8, unpack_int8
from qvl_kernels.triton.linear.published_shapes import example
from qvl_kernels.util import cdiv

COLUMNS = {4: 64, 8: 128}  # outputs of a program, by bits: 8192 weights, 64 a thread
WARPS = 4


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
    BASE: tl.constexpr = BASE_FP16 if FLOAT == tl.float16 else BASE_BF16
    EXPONENT: tl.constexpr = EXPONENT_FP16 if FLOAT == tl.float16 else EXPONENT_BF16
    PARTS: tl.constexpr = TILE_INT4 // GROUP if GROUP < TILE_INT4 else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE_INT4 // PARTS
    tile, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    at = (tile * PADDED + n).to(tl.int64)
    words = tl.trans(tl.load(words_ptr + at[:, None] * WORDS + r[None, :])).to(tl.uint32, bitcast=True)
    for part in tl.static_range(PARTS):
        first = tile * TILE_INT4 + part * SPAN
        group = tl.minimum(first, INPUTS - 1) // GROUP * PADDED + n
        scale = tl.load(scales_ptr + group).to(tl.float32)[:, None]
        level = tl.trans(unpack_int4(words, FLOAT, EXPONENT, part * 4 // PARTS, 4 // PARTS)).to(tl.float32)
        if zeros_ptr is None:
            weight = (level - (BASE + 8)) * scale
        else:
            weight = (level - (tl.load(zeros_ptr + group).to(tl.float32) + BASE)[:, None]) * scale
        inside = (n[:, None] < OUTPUTS) & (first + k[None, :] < INPUTS)
        tl.store(out_ptr + n.to(tl.int64)[:, None] * INPUTS + first + k[None, :], weight.to(OUT), inside)


@triton.jit
def int8_dequantize_kernel(
    words_ptr, scales_ptr, zeros_ptr, out_ptr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n, k] = round(scale[g, n] * (q[k, n] - zero[g, n])): one tile of inputs and BN outputs a program.

    words int32 [tiles, PADDED, 16]; scales, zeros [groups, PADDED] (zeros None: 128); out [OUTPUTS, INPUTS].
    """
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    PARTS: tl.constexpr = TILE_INT8 // GROUP if GROUP < TILE_INT8 else 1  # of a tile, each in one group
    SPAN: tl.constexpr = TILE_INT8 // PARTS
    tile, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, SPAN), tl.arange(0, WORDS)
    at = (tile * PADDED + n).to(tl.int64)
    words = tl.trans(tl.load(words_ptr + at[:, None] * WORDS + r[None, :])).to(tl.uint32, bitcast=True)
    for part in tl.static_range(PARTS):
        first = tile * TILE_INT8 + part * SPAN
        group = tl.minimum(first, INPUTS - 1) // GROUP * PADDED + n
        zero = None if zeros_ptr is None else tl.load(zeros_ptr + group).to(tl.float32)
        level = tl.trans(unpack_int8(words, zero, part * 2 // PARTS, 2 // PARTS)).to(tl.float32)
        weight = level * tl.load(scales_ptr + group).to(tl.float32)[:, None]
        inside = (n[:, None] < OUTPUTS) & (first + k[None, :] < INPUTS)
        tl.store(out_ptr + n.to(tl.int64)[:, None] * INPUTS + first + k[None, :], weight.to(OUT), inside)


class DequantizePlan(NamedTuple):
    """The resolved launch for some outputs of a weight; a call allocates their floats and fills them."""

    launch: Launch  # without the output
    scales: Tensor  # on the device of the output
    shape: tuple[int, int]  # outputs, inputs
    dtype: torch.dtype

    def __call__(self, out: Tensor | None = None) -> Tensor:
        """The weight [outputs, inputs] in `dtype`, in `out` if that is given: contiguous, of this shape and dtype."""
        if out is None:
            out = self.scales.new_empty(self.shape, dtype=self.dtype)
        self.launch.with_arguments(out_ptr=out).run()
        return out


def dequantize(weight: PackedInt4 | PackedInt8, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weight [N, K] in `dtype`, its inputs in the packed order, each rounded once: `repack.dequantize`.

    Of `count` outputs from `first` on, a multiple of `COLUMNS`; None: all that follow.
    """
    return plan_dequantize(weight, dtype, first, count)()


def plan_dequantize(
    weight: PackedInt4 | PackedInt8, dtype: torch.dtype, first: int = 0, count: int | None = None
) -> DequantizePlan:
    """Check the arguments of `dequantize` and resolve its launch."""
    op, columns = f"int{weight.BITS}_dequantize", COLUMNS[weight.BITS]
    checks.device(op, *weight.tensors().values())
    checks.dtype(op, dtype)
    left = weight.outputs - first
    if first % columns or left < 1:
        raise ValueError(f"{op}: first is {first}; expected a multiple of {columns} below {weight.outputs}")
    return _plan(weight, dtype, first, left if count is None else min(count, left))


def _plan(weight: PackedInt4 | PackedInt8, dtype: torch.dtype, first: int, count: int) -> DequantizePlan:
    tiles, padded, _ = weight.words.shape
    columns = COLUMNS[weight.BITS]
    launch = Launch(
        int4_dequantize_kernel if weight.BITS == 4 else int8_dequantize_kernel,
        (tiles, cdiv(count, columns)),
        {"words_ptr": weight.words[:, first:], "scales_ptr": weight.scales[:, first:],
         "zeros_ptr": None if weight.zeros is None else weight.zeros[:, first:]},
        {"INPUTS": weight.inputs, "OUTPUTS": count, "PADDED": padded, "GROUP": weight.group, "BN": columns},
        WARPS,
    )  # fmt: skip
    return DequantizePlan(launch, weight.scales, (count, weight.inputs), dtype)


def aot_specs(capability: int) -> list[Spec]:
    """Int4: a decoder layer's largest and deepest weight. Int8: the vision encoder's widest, in both dtypes."""
    fp16 = torch.float16
    cases = [(4, "up_gate", fp16), (4, "down", fp16), (8, "fc", fp16), (8, "fc", torch.bfloat16)]
    specs = []
    for bits, name, dtype in cases:
        _, weight, _ = example(bits, name, 1, dtype)
        out = torch.empty(weight.outputs, weight.inputs, dtype=dtype, device="meta")
        launch = _plan(weight, dtype, 0, weight.outputs).launch.with_arguments(out_ptr=out)
        label = f"int{bits}_dequantize {name}{'' if dtype == fp16 else ', bf16'}"
        specs.append(Spec(label, launch, weight.nbytes + out.nbytes, max_ratio=0.6 if bits == 8 else None))
    return specs
