"""Linears in plain torch, and the forms in which a model holds one: packed for its kernel, bound to it."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = ("gptq",)  # of packed linears that these ops read
Precision = Literal["exact", "fast"]  # fast: kernels may round activations and dense weights to int8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., in] times weight [out, in] transposed, plus bias [out]."""
    return F.linear(x, weight, bias)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 words [rows, columns] to integers [rows * 32 / bits, columns], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
    values: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)  # the mask removes what the signed shift drags in
    return values.reshape(-1, words.shape[1])


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits, [rows, columns], into int32 words [rows * bits / 32, columns], first row lowest.

    In bytes: a column's are joined two by two until they are full, and four of them are a word as they lie (words are
    little-endian in files, and on every machine that torch runs on). Summing shifted int64 took 9 to 21 times as long.
    """
    fields, held = values.t().to(torch.uint8).contiguous(), bits
    while held < 8:
        fields, held = fields[:, ::2] | (fields[:, 1::2] << held), 2 * held
    words: Tensor = fields.view(-1).view(torch.int32).view(values.shape[1], len(values) * bits // 32)
    return words.t().contiguous()


def gptq_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int
) -> Tensor:
    """The float32 weight [out, in] of a GPTQ linear: scales * (q - (zeros + zero_offset)).

    qweight int32 [in * bits / 32, out]; qzeros int32 [G, out * bits / 32]; scales float [G, out]; g_idx int32 [in] is
    the group of each input, or None for groups of equal size one after another.
    """
    q = unpack_rows(qweight, bits)
    zeros = unpack_rows(qzeros.t(), bits).t() + zero_offset
    if g_idx is None:
        size = -(-q.shape[0] // scales.shape[0])
        g_idx = torch.arange(q.shape[0], device=q.device) // size
    group = g_idx.long()
    return (scales.float()[group] * (q - zeros[group])).t()


def gptq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [.., in] times a GPTQ linear, its weight rounded once, to x's dtype."""
    weight = gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class BoundLinear(NamedTuple):
    """A linear with its weights laid out as its kernel wants them."""

    call: Linear
    kernel: str  # what runs, for the report
    nbytes: int  # of the weights as they are held
    split_k: Linear | None = None  # where the kernel splits the inputs: x to float32 partial sums [S, n, out]

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        return self.call(x)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out], or to float32 partial sums [S, n, out] for an op that adds them as it reads."""
        return self.call(x) if self.split_k is None else self.split_k(x)


class Linear(Protocol):
    def __call__(self, x: Tensor, /) -> Tensor: ...


class Packed(NamedTuple):
    """A linear laid out for its kernel, not yet bound to it: what a converted checkpoint holds of it."""

    layout: str  # such as "gptq": who can read it
    tensors: dict[str, Tensor]
    fields: dict[str, int]  # what the tensors do not say of themselves


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """`linear` bound to its weights, once, at load. Here they stay as they are; a kernel may lay them out anew."""
    return BoundLinear(partial(linear, weight=weight, bias=bias), _name(weight), weight.nbytes)


def pack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:  # fmt: skip
    """The weights of `gptq_linear` in the layout of these ops' kernels. Here they stay as published."""
    found = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx, "bias": bias}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return Packed("gptq", tensors, {"bits": bits, "zero_offset": zero_offset})


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """A packed linear bound to its kernel; nothing is copied. Raises `ValueError` for a layout that is not its own."""
    if packed.layout != "gptq":
        raise ValueError(f"the reference ops read the layout 'gptq'; found {packed.layout!r}")
    found, bits = packed.tensors, packed.fields["bits"]
    call = partial(
        gptq_linear, qweight=found["qweight"], qzeros=found["qzeros"], scales=found["scales"], g_idx=found.get("g_idx"),
        bits=bits, zero_offset=packed.fields["zero_offset"], bias=found.get("bias"),
    )  # fmt: skip
    nbytes = sum(tensor.nbytes for name, tensor in found.items() if name != "bias")
    return BoundLinear(call, f"int{bits}, unpacked on use", nbytes)


def prepare_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None, precision: Precision = "exact",
) -> BoundLinear:  # fmt: skip
    """`gptq_linear` bound to its weights, once, at load: see `prepare_linear`."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def unpack_to_qweight(packed: Packed) -> Tensor:
    """What `pack_gptq` was given as `qweight`, int32 [in * bits / 32, out]."""
    return packed.tensors["qweight"]


def _name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
