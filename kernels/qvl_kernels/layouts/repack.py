"""Repack GPTQ linears to the layouts of `layouts.gpu` and back, bit for bit, in plain torch: no GPU is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts.gpu import (
    KINDS,
    LAYOUTS,
    OUTPUTS,
    TILE,
    Kind,
    PackedInt4,
    PackedWeight,
    kind_of,
    symmetric_zero_point,
)
from qvl_kernels.layouts.interleave import from_tiles, permute_inputs, to_tiles
from qvl_kernels.reference import Packed, pack_rows, unpack_rows
from qvl_kernels.util import cdiv

__all__ = [
    "LAYOUTS",
    "dequantize",
    "pack_gptq",
    "packed",
    "packed_int4",
    "unpack_gptq",
    "unpack_to_qweight",
    "unsupported",
    "zero_points",
]


def unsupported(
    qweight: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zeros: Tensor | None = None
) -> str | None:
    """Return why no layout can hold a GPTQ linear, or None; `zeros` are its zero points, if known."""
    if bits not in KINDS:
        return f"{bits} bits"
    inputs = qweight.shape[0] * (32 // bits)
    group, _, even = _grouping(inputs, len(scales), g_idx)
    if not even:
        return "groups of unequal size"
    if len(scales) > 1 and group % TILE and group not in (32, 64):
        return f"groups of {group}"
    if zeros is not None and int(zeros.max()) > torch.iinfo(torch.uint8).max:
        return f"a zero point of {int(zeros.max())}"
    return None


def pack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:
    """`reference.pack_gptq` in the GPU layout for `bits`, or as published if that cannot hold the linear."""
    zeros = zero_points(qzeros, bits, zero_offset)
    if unsupported(qweight, scales, g_idx, bits, zeros):
        return reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    return _laid_out(KINDS[bits], qweight, zeros, scales, g_idx).as_packed(zero_offset, bias)


def packed_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int) -> PackedInt4:
    """`packed` for 4 bits."""
    return packed(PackedInt4, qweight, qzeros, scales, g_idx, zero_offset)


def packed(
    kind: type[Kind], qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int
) -> Kind:
    """Repack a GPTQ linear, a tile at a time; raises `ValueError` if the layout cannot hold it."""
    zeros = zero_points(qzeros, kind.BITS, zero_offset)
    if fault := unsupported(qweight, scales, g_idx, kind.BITS, zeros):
        raise ValueError(
            f"a GPTQ linear with {fault} has no packed form; expected equal groups of 32, 64 or a multiple of 128"
        )
    return _laid_out(kind, qweight, zeros, scales, g_idx)


def _laid_out(kind: type[Kind], qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> Kind:
    bits = kind.BITS
    inputs, outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    group, perm, _ = _grouping(inputs, len(scales), g_idx)
    padding = -outputs % OUTPUTS
    padded_zeros = None
    if not bool((zeros == symmetric_zero_point(bits)).all()):
        padded_zeros = F.pad(zeros.to(torch.uint8), (0, padding), value=symmetric_zero_point(bits)).contiguous()
    return kind(
        words=to_tiles(qweight if perm is None else permute_inputs(qweight, bits, perm), bits, outputs + padding),
        scales=F.pad(scales, (0, padding)).contiguous(),
        zeros=padded_zeros,
        perm=perm,
        inputs=inputs,
        outputs=outputs,
        group=group,
    )


def unpack_gptq(packed: Packed) -> Packed:
    """Restore the published tensors, in layout "gptq"; `g_idx` is absent if the groups are in order."""
    w, zero_offset = kind_of(packed).from_packed(packed), packed.fields["zero_offset"]
    qweight, g_idx = _in_packed_order(w), None
    if w.perm is not None:
        inverse = torch.argsort(w.perm)
        qweight, g_idx = permute_inputs(qweight, w.BITS, inverse), (inverse // w.group).to(torch.int32)
    scales = w.scales[:, : w.outputs].contiguous()
    zeros = torch.full(scales.shape, symmetric_zero_point(w.BITS), dtype=torch.uint8, device=scales.device)
    if w.zeros is not None:
        zeros = w.zeros[:, : w.outputs]
    qzeros = pack_rows(zeros.t().int() - zero_offset, w.BITS).t().contiguous()
    bias = packed.tensors.get("bias")
    return reference.pack_gptq(qweight, qzeros, scales, g_idx, w.BITS, zero_offset, bias)


def unpack_to_qweight(packed: Packed) -> Tensor:
    """`reference.unpack_to_qweight`, for any layout of the GPU and "gptq"."""
    return reference.unpack_to_qweight(packed if packed.layout == "gptq" else unpack_gptq(packed))


def dequantize(w: PackedWeight) -> Tensor:
    """Return the float32 weight [N, K] that the kernels compute with, its inputs in the packed order."""
    codes = unpack_rows(_in_packed_order(w), w.BITS)
    group = torch.arange(w.inputs, device=codes.device) // w.group
    zeros = symmetric_zero_point(w.BITS) if w.zeros is None else w.zeros[:, : w.outputs].int()[group]
    weight: Tensor = w.scales[:, : w.outputs].float()[group] * (codes - zeros)
    return weight.t()


def zero_points(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Unpack zero points to int32 [G, N] and add `zero_offset`."""
    return unpack_rows(qzeros.t().contiguous(), bits).t() + zero_offset


def _grouping(inputs: int, groups: int, g_idx: Tensor | None) -> tuple[int, Tensor | None, bool]:
    """Return the group size, the permutation that sorts inputs by group (None: sorted), and whether groups are equal.

    The last group may be smaller.
    """
    if g_idx is None:
        return cdiv(inputs, groups), None, True
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    group = int(sizes[0])
    by_group, perm = torch.sort(g_idx.long(), stable=True)
    positions = torch.arange(inputs, device=g_idx.device)
    even = group > 0 and torch.equal(by_group, positions // group)
    return group, None if torch.equal(perm, positions) else perm.to(torch.int32), even


def _in_packed_order(w: PackedWeight) -> Tensor:
    """Return `qweight` with the inputs in the packed order."""
    return from_tiles(w.words, w.BITS, w.outputs)[: w.inputs * w.BITS // 32]
