"""Linears in plain torch, and the two forms of a linear in a model: `Packed` for its kernel, and `BoundLinear`."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.util import cdiv, dtype_name

LAYOUTS = ("gptq",)  # layouts of packed linears that these ops read
Precision = Literal["exact", "fast"]  # fast: kernels may round activations and dense weights to int8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [.., in] times weight [out, in] transposed, plus bias [out]."""
    return F.linear(x, weight, bias)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 [rows, columns] to integers below 2^bits, [rows * 32 / bits, columns], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device).view(1, -1, 1)
    values: Tensor = (packed.unsqueeze(1) >> shifts) & (2**bits - 1)  # the mask removes the shifted-in sign bits
    return values.reshape(-1, packed.shape[1])


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits, [rows, columns], into int32 [rows * bits / 32, columns], lowest bits first.

    Works on bytes: neighboring fields of a column are merged until each fills a byte, and four bytes are viewed as one
    int32 (little-endian, as in files and on every machine that torch runs on). Summing shifted int64 took 9 to 21 times
    as long.
    """
    fields, field_bits = values.t().to(torch.uint8).contiguous(), bits
    while field_bits < 8:
        fields, field_bits = fields[:, ::2] | (fields[:, 1::2] << field_bits), 2 * field_bits
    packed: Tensor = fields.view(-1).view(torch.int32).view(values.shape[1], len(values) * bits // 32)
    return packed.t().contiguous()


def gptq_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int
) -> Tensor:
    """Return the float32 weight [out, in] of a GPTQ linear: scales * (q - (zeros + zero_offset)).

    qweight int32 [in * bits / 32, out]; qzeros int32 [G, out * bits / 32]; scales float [G, out]; g_idx int32 [in] is
    the group of each input, or None for consecutive groups of equal size.
    """
    q = unpack_rows(qweight, bits)
    zeros = unpack_rows(qzeros.t(), bits).t() + zero_offset
    if g_idx is None:
        size = cdiv(q.shape[0], scales.shape[0])
        g_idx = torch.arange(q.shape[0], device=q.device) // size
    group = g_idx.long()
    return (scales.float()[group] * (q - zeros[group])).t()


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply x [.., in] by the weight of a GPTQ linear, which is rounded once, to x's dtype."""
    weight = gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class BoundLinear(NamedTuple):
    """A linear whose weights are in the layout of its kernel."""

    call: Linear
    kernel: str  # the kernel's description, for the report
    nbytes: int  # of the weights in this layout
    split_k: Linear | None = None  # if the kernel splits the inputs: x to float32 partial sums [S, n, out]
    gated: Linear | None = None  # if the kernel can: x [n, in] to the SwiGLU [n, out / 2] of the outputs up | gate

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in x's dtype."""
        return self.call(x)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """Map x [n, in] to [n, out], or to float32 partial sums [S, n, out] for an op that adds them as it reads."""
        return self.call(x) if self.split_k is None else self.split_k(x)


class Linear(Protocol):
    """A callable that maps x [.., in] to [.., out]."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Map x [.., in] to [.., out]."""
        ...


class Packed(NamedTuple):
    """A linear in the layout of its kernel, not yet bound to it: the form stored in a converted checkpoint."""

    layout: str  # such as "gptq" or "cpu-1": the kernels that can read it
    tensors: dict[str, Tensor]
    fields: dict[str, int]  # sizes and offsets that the tensors' shapes do not tell


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """Bind `linear` to its weights, once, at load. Here they are unchanged; other ops may repack them."""
    return BoundLinear(partial(linear, weight=weight, bias=bias), _name(weight), weight.nbytes)


def pack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:
    """Pack the weights of `gptq_linear` in the layout of these ops' kernels. Here they stay as published."""
    published = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx, "bias": bias}
    tensors = {name: tensor for name, tensor in published.items() if tensor is not None}
    return Packed("gptq", tensors, {"bits": bits, "zero_offset": zero_offset})


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """Bind a packed linear to its kernel, without a copy. Raises `ValueError` for a layout other than "gptq"."""
    if packed.layout != "gptq":
        raise ValueError(f"the reference ops read the layout 'gptq'; found {packed.layout!r}")
    tensors, bits = packed.tensors, packed.fields["bits"]
    call = partial(
        gptq_linear,
        qweight=tensors["qweight"],
        qzeros=tensors["qzeros"],
        scales=tensors["scales"],
        g_idx=tensors.get("g_idx"),
        bits=bits,
        zero_offset=packed.fields["zero_offset"],
        bias=tensors.get("bias"),
    )
    nbytes = sum(tensor.nbytes for name, tensor in tensors.items() if name != "bias")
    return BoundLinear(call, f"int{bits}, unpacked on use", nbytes)


def prepare_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
    precision: Precision = "exact",
) -> BoundLinear:
    """Bind `gptq_linear` to its weights, once, at load: see `prepare_linear`."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def unpack_to_qweight(packed: Packed) -> Tensor:
    """Return the `qweight` that `pack_gptq` packed, int32 [in * bits / 32, out]."""
    return packed.tensors["qweight"]


def _name(weight: Tensor) -> str:
    return dtype_name(weight.dtype)
