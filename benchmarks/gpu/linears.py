"""The four linears of a decoder layer, alone and in a row, and the head, against torch's tinygemm and dense cuBLAS.

Weights rotate, so that each product finds a cold L2. Every result is checked against float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.place import Place
from qvl_kernels.util import cdiv, dtype_name

if TYPE_CHECKING:
    from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8

    Weight = PackedInt4 | PackedInt8

Row = dict[str, Any]
Product = Callable[[Tensor], Tensor]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
MANY = 64  # rows from which several ways are timed
IN_A_ROW = 3  # layers whose four linears follow one another; 303 MB in 4 bits
WRONG = 2**-6  # of the largest output: eight roundings of bfloat16
GROUP = 128
INNER_TILES = 8  # of tinygemm's layout, the fastest one
HEAD_ROWS = (1, 4, 8, 16, 64)
FEW = 64  # rows up to which a decode step's linears are compared in a row


class Contender(NamedTuple):
    """A product with one weight, made from the packed one; it multiplies activations of `dtype`."""

    name: str
    dtype: torch.dtype
    make: Callable[[Weight], Product]
    bits: int  # of its weight
    packed: int = 4  # bits of the packed weight that it is made of
    least: int = 1  # rows that it is timed with


def contenders(place: Place) -> tuple[Contender, ...]:
    """The package's int4 kernels in both dtypes, those of many rows by themselves, tinygemm and cuBLAS."""
    from qvl_kernels.triton.launch import capability
    from qvl_kernels.triton.linear.configs import WGMMA_CAPABILITY

    found = (
        Contender("int4, float16", torch.float16, _packed, 4),
        Contender("int4, bfloat16", torch.bfloat16, _packed, 4),
        Contender("int4 by wgmma, float16", torch.float16, _by_wgmma, 4, least=MANY),
        Contender("int4 unpacked in tiles, float16", torch.float16, _by_tiles, 4, least=MANY),
        Contender("tinygemm, bfloat16", torch.bfloat16, _tinygemm, 4),
        Contender("dense, bfloat16", torch.bfloat16, _dense, 16),
        Contender("dense by this package, bfloat16", torch.bfloat16, _own_dense, 16),
    )
    has_wgmma = place.tiny or capability(place.device) == WGMMA_CAPABILITY
    return tuple(contender for contender in found if has_wgmma or contender.make is not _by_wgmma)


def heads(place: Place) -> tuple[Contender, ...]:
    """What the head can be: in 16 bits by cuBLAS or by this package, in 8 bits as converted, in 4 bits."""
    int4, *_, dense, own_dense = contenders(place)
    int8 = (Contender(f"int8, {dtype_name(dtype)}", dtype, _packed, 8, 8) for dtype in (torch.float16, torch.bfloat16))
    return (dense, own_dense, *int8, int4)


def head(place: Place, ceiling: float) -> Iterator[Row]:
    """A row for each kind of head and number of rows."""
    from qvl_kernels.triton.linear.published_shapes import SHAPES

    shapes = {"head": (256, 128) if place.tiny else SHAPES["head"]}
    for contender in heads(place):
        if place.tiny and contender.dtype == torch.bfloat16:
            continue  # the interpreter computes bfloat16 wrongly
        yield from _of_contender(place, contender, shapes, ceiling, HEAD_ROWS)
        place.settle()


def own(contender: Contender) -> bool:
    """Whether the product is one of this package's kernels."""
    return contender.make in (_packed, _own_dense, _by_wgmma, _by_tiles)


def linears(place: Place, ceiling: float) -> Iterator[Row]:
    """A row for each contender, linear and number of rows, and one for the four linears in a row."""
    from qvl_kernels.triton.linear.published_shapes import DECODER, SHAPES

    shapes = {"qkv": (256, 128)} if place.tiny else {name: SHAPES[name] for name in DECODER}
    for contender in contenders(place):
        if place.tiny and contender.dtype == torch.bfloat16 and contender.bits == 4 and contender.make is _packed:
            continue  # the interpreter computes bfloat16 wrongly
        try:
            yield from _of_contender(place, contender, shapes, ceiling, ROWS)
        except (RuntimeError, NotImplementedError, AttributeError) as fault:
            if own(contender):
                raise
            yield {"contender": contender.name, "note": f"does not run here: {str(fault).splitlines()[0][:120]}"}
        place.settle()


def _of_contender(
    place: Place, contender: Contender, shapes: dict[str, tuple[int, int]], ceiling: float, all_rows: tuple[int, ...]
) -> Iterator[Row]:
    products: dict[str, list[Product]] = {}
    weights: dict[str, Weight] = {}
    for name, (inputs, outputs) in shapes.items():
        nbytes = inputs * outputs * contender.bits // 8
        weights[name] = random_weight(inputs, outputs, place.device, contender.packed)
        copies = max(place.copies(nbytes), 1 if place.tiny else IN_A_ROW)
        products[name] = [contender.make(weights[name]) for _ in range(copies)]
    for rows in (max(2, contender.least),) if place.tiny else [n for n in all_rows if n >= contender.least]:
        xs = {
            name: torch.randn(rows, inputs, device=place.device, dtype=contender.dtype)
            for name, (inputs, _) in shapes.items()
        }
        for name, (inputs, outputs) in shapes.items():
            error = _error(products[name][0](xs[name]), xs[name], weights[name])
            taken = place.seconds(*(_call(product, xs[name]) for product in products[name]))
            nbytes = inputs * outputs * contender.bits // 8
            yield {
                "contender": contender.name,
                "linear": name,
                "rows": rows,
                "us": taken * 1e6,
                "of_read": nbytes / taken / ceiling,
                "tflops": 2 * rows * inputs * outputs / taken / 1e12,
                "error": error,
                "right": error <= WRONG,
            }
        if rows <= FEW and len(shapes) > 1:
            order = [
                _call(products[name][layer], xs[name])
                for layer in range(1 if place.tiny else IN_A_ROW)
                for name in shapes
            ]
            taken = place.seconds(*order) * len(shapes)
            nbytes = sum(inputs * outputs for inputs, outputs in shapes.values()) * contender.bits // 8
            yield {
                "contender": contender.name,
                "linear": "all of a layer in a row",
                "rows": rows,
                "us": taken * 1e6,
                "of_read": nbytes / taken / ceiling,
            }


def random_weight(inputs: int, outputs: int, device: torch.device, bits: int = 4) -> Weight:
    """A symmetric weight of random values in groups of 128."""
    from qvl_kernels.layouts.gpu import KINDS, OUTPUTS
    from qvl_kernels.layouts.interleave import WORDS

    kind, padded, groups = KINDS[bits], cdiv(outputs, OUTPUTS) * OUTPUTS, inputs // GROUP
    words = torch.randint(-(2**31), 2**31, (inputs // kind.TILE, padded, WORDS), device=device).to(torch.int32)
    scales: Tensor = torch.full((groups, padded), 0.01, dtype=torch.float16, device=device)
    return kind(words, scales, zeros=None, perm=None, inputs=inputs, outputs=outputs, group=GROUP)


def _call(product: Product, x: Tensor) -> Callable[[], Tensor]:
    return lambda: product(x)


def _error(y: Tensor, x: Tensor, weight: Weight) -> float:
    from qvl_kernels.layouts.repack import dequantize

    want = x.float() @ dequantize(weight).T.float()
    got = y.sum(0) if y.dim() == 3 else y.float()
    return float((got - want).abs().max() / want.abs().max())


def _packed(weight: Weight) -> Product:
    from qvl_kernels.triton.linear.linears import PackedLinear

    copy = replace(weight, words=weight.words.clone(), scales=weight.scales.clone())
    return PackedLinear(copy, None).forward_partial_sums


def _by_wgmma(weight: Weight) -> Product:
    from qvl_kernels.triton.linear.wgmma import wgmma

    return _planned(wgmma, weight)


def _by_tiles(weight: Weight) -> Product:
    from qvl_kernels.triton.linear.gemm import gemm

    return _planned(gemm, weight)


def _planned(multiply: Callable[[Tensor, Any], Tensor], weight: Weight) -> Product:
    copy = replace(weight, words=weight.words.clone(), scales=weight.scales.clone())
    return lambda x: multiply(x, copy)


def _dense(weight: Weight) -> Product:
    from qvl_kernels.layouts.repack import dequantize

    dense = dequantize(weight).to(torch.bfloat16)
    return lambda x: F.linear(x, dense)


def _own_dense(weight: Weight) -> Product:
    from qvl_kernels.layouts.repack import dequantize
    from qvl_kernels.triton.linear.dense_linear import DenseLinear

    return DenseLinear(dequantize(weight).to(torch.bfloat16).contiguous(), None).forward_partial_sums


def _tinygemm(weight: Weight) -> Product:
    """torch's `_weight_int4pack_mm`: codes of 4 bits, (code - 8) * scale + zero, as bfloat16."""
    from qvl_kernels.layouts.repack import dequantize

    scales = weight.scales[:, : weight.outputs]
    per_input = scales.float().repeat_interleave(weight.group, 0).T  # [outputs, inputs]
    codes = (dequantize(weight).float() / per_input).round().to(torch.int32) + 8
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).to(torch.bfloat16).contiguous()
    if codes.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales_and_zeros)
