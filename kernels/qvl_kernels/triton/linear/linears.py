"""Linears bound to their weights: which kernel runs for how many rows, and what runs instead where none can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts import repack
from qvl_kernels.layouts.gpu import LAYOUTS, PackedInt4, PackedInt8, kind_of
from qvl_kernels.layouts.repack import gptq_words, pack_gptq
from qvl_kernels.reference import Bound, Packed, Precision, linear
from qvl_kernels.triton.linear.configs import regime
from qvl_kernels.triton.linear.int4_dequantize import int4_dequantize
from qvl_kernels.triton.linear.int4_gemm import int4_gemm
from qvl_kernels.triton.linear.int4_small_m import int4_small_m
from qvl_kernels.triton.linear.int8_dequantize import int8_dequantize
from qvl_kernels.triton.linear.int8_small_m import FEW as FEW_INT8
from qvl_kernels.triton.linear.int8_small_m import int8_small_m
from qvl_kernels.triton.linear.split_sum import summed

__all__ = ["LAYOUTS", "bind", "gptq_words", "linear", "pack_gptq", "prepare_gptq", "prepare_linear"]

_log = logging.getLogger("qvl_kernels")

STEP = 128  # outputs: whole programs of the kernels that unpack
UNPACKED_AT_ONCE = 16 << 20  # bytes: up_gate of the published model would be 172 MiB, beside all that a prompt holds


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A packed weight and its bias, and the choice of kernel by the number of rows."""

    weight: PackedInt4 | PackedInt8
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        y = summed(self.partial(x.reshape(-1, self.weight.inputs)), x.dtype)
        return y.view(*x.shape[:-1], self.weight.outputs)

    def partial(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out] in x's dtype, or to float32 partial sums [S, n, out]."""
        if self.weight.order is not None:
            x = x.index_select(-1, self.weight.order)
        x = x.contiguous()
        if not len(x):
            return x.new_empty(0, self.weight.outputs)
        if isinstance(self.weight, PackedInt8):
            return self._int8(x, self.weight)
        return self._int4(x, self.weight)

    def _int4(self, x: Tensor, weight: PackedInt4) -> Tensor:
        kind = "dequantize" if x.dtype == torch.float32 else regime(len(x))
        if kind == "small_m":
            return int4_small_m(x, weight, self.bias)
        if kind == "gemm":
            return int4_gemm(x, weight, self.bias)
        return self._unpacked(x, partial(int4_dequantize, weight, x.dtype))

    def _int8(self, x: Tensor, weight: PackedInt8) -> Tensor:
        if len(x) <= FEW_INT8 and x.dtype != torch.float32:
            return int8_small_m(x, weight, self.bias)
        return self._unpacked(x, partial(int8_dequantize, weight, x.dtype))

    def _unpacked(self, x: Tensor, dequantize: Callable[[int, int], Tensor]) -> Tensor:
        """dequantize: outputs `first` to `first + count` as floats; torch multiplies them while the L2 holds them."""
        outputs = self.weight.outputs
        step = max(STEP, UNPACKED_AT_ONCE // (self.weight.inputs * x.element_size()) // STEP * STEP)
        y = x.new_empty(len(x), outputs)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        for first in range(0, outputs, step):
            weight, part = dequantize(first, step).t(), slice(first, first + step)
            if bias is None:
                torch.mm(x, weight, out=y[:, part])
            else:
                torch.addmm(bias[part], x, weight, out=y[:, part])
        return y


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> Bound:
    """`reference.prepare_linear`: dense weights go through torch's own product (cuBLAS), in either precision."""
    return reference.prepare_linear(weight, bias, precision)


def prepare_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None, precision: Precision = "exact",
) -> Bound:  # fmt: skip
    """`reference.prepare_gptq` in the kernels' layout. What it cannot hold runs as in the reference, with a warning."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def bind(packed: Packed, precision: Precision = "exact") -> Bound:
    """A packed linear bound to its kernels, in this layout or as published: that is laid out now, if it can be."""
    if packed.layout == "gptq":
        again = pack_gptq(**_published(packed), **packed.fields)  # type: ignore[arg-type]
        return _plain(again, precision) if again.layout == "gptq" else bind(again, precision)
    weight, bias = kind_of(packed).from_packed(packed), packed.tensors.get("bias")
    details = f"groups of {weight.group}{'' if weight.zeros is None else ', zero points'}"
    details += "" if weight.order is None else ", act-order: x is gathered first"
    packed_linear = PackedLinear(weight, bias)
    return Bound(packed_linear, f"int{weight.BITS}, {details}", weight.nbytes, packed_linear.partial)


def _plain(packed: Packed, precision: Precision) -> Bound:
    """What the kernels cannot hold, in plain torch, said aloud."""
    given, bits = packed.tensors, packed.fields["bits"]
    zeros = repack.zero_points(given["qzeros"], bits, packed.fields["zero_offset"])
    reason = repack.unsupported(given["qweight"], given["scales"], given.get("g_idx"), bits, zeros)
    outputs = given["scales"].shape[1]
    _log.warning("a linear of %d outputs runs in plain torch, unpacked on each use: %s", outputs, reason)
    slow = reference.bind(packed, precision)
    return slow._replace(kernel=f"{slow.kernel} ({reason})")


def _published(packed: Packed) -> dict[str, Tensor | None]:
    return {name: packed.tensors.get(name) for name in ("qweight", "qzeros", "scales", "g_idx", "bias")}
