"""Linears whose weights of 4 or 8 bits are packed for the CPU kernels, and the choice of kernel by rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import memory as huge_pages
from qvl_kernels import reference
from qvl_kernels.cpu.dense import in_steps, linear
from qvl_kernels.cpu.library import CODES, library, pointer
from qvl_kernels.cpu.memory import empty
from qvl_kernels.reference import BoundLinear, Packed, Precision

_log = logging.getLogger("qvl_kernels")

LAYOUT = "cpu-1"  # of packed weights in files; another number when csrc/linear_int8.inl reads them differently
LAYOUTS = (LAYOUT, *reference.LAYOUTS)
BLOCK = 16  # outputs that lie side by side in a packed weight
GROUPS = (128, 64, 32)  # inputs that share a scale, as kernels know them
FEW_EXACT = 96  # without AMX, rows up to which packed weights meet float activations in registers: 0.8 ms a row at
# 4096 x 11008, where unpacking for torch takes 100 ms before the first
UNPACKED_AT_ONCE = 8 << 20  # bytes of a weight that is unpacked for torch's GEMM: fits the caches
OUTPUTS_AT_ONCE = 1024  # outputs: 45 MB of floats at 11008 inputs


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight of 4 or 8 bits in the layout of csrc/linear_int8.inl."""

    lines: Tensor  # uint8
    scales: Tensor  # float16 [blocks, groups, 16]
    zeros: Tensor | None  # uint8 [blocks, groups, 16]; None: the middle
    perm: Tensor | None  # int32 [padded], the input at each place, -1 for none; None: in order, then padding
    bias: Tensor | None  # float32 [outputs]
    bits: int
    group: int
    inputs: int
    padded: int
    outputs: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.lines, self.scales, self.zeros, self.perm) if t is not None)

    def as_packed(self) -> Packed:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return Packed(LAYOUT, tensors, {name: value for name, value in values.items() if isinstance(value, int)})

    @classmethod
    def from_packed(cls, packed: Packed) -> PackedWeight:
        """Raises `ValueError` for another layout, or another version of this one."""
        if packed.layout != LAYOUT:
            raise ValueError(f"these CPU kernels read the layout {LAYOUT!r}; found {packed.layout!r}")
        absent = dict.fromkeys(("zeros", "perm", "bias"))
        return cls(**(absent | packed.tensors), **packed.fields)  # type: ignore[arg-type]

    def int8(self, x: Tensor) -> Tensor:
        """Activations rounded to int8, for each row and group."""
        return self._run(library().ready().linear_int8, x)

    def exact(self, x: Tensor) -> Tensor:
        """Activations as they are. Without AMX, many rows go through torch's GEMM, some outputs at a time."""
        rows = x.numel() // self.inputs
        if rows <= FEW_EXACT or library().instruction_set == "amx":
            return self._run(library().ready().linear_exact, x)
        step = max(BLOCK, UNPACKED_AT_ONCE // (self.inputs * x.element_size()) // BLOCK * BLOCK)
        y = empty((*x.shape[:-1], self.outputs), x.dtype)
        for first in range(0, self.outputs, step):
            part = self.unpacked(first, min(step, self.padded_outputs - first), x.dtype)
            y[..., first : first + step] = in_steps(x, part.shape[1], partial(_product, part=part))[
                ..., : self.outputs - first
            ]
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @property
    def padded_outputs(self) -> int:
        return _up(self.outputs, BLOCK)

    def unpacked(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Outputs first to first + count as columns, [inputs, count]; both are multiples of 16."""
        part = empty((self.inputs, count), dtype)
        library().ready().dequantize(
            self.lines.data_ptr(), self.scales.data_ptr(), pointer(self.zeros), self.bits, self.group, self.outputs,
            self.inputs, self.padded, pointer(self.perm), first, count, CODES[dtype], part.data_ptr(),
        )  # fmt: skip
        return part

    def _run(self, kernel: object, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = empty((*x.shape[:-1], self.outputs), x.dtype)
        kernel(  # type: ignore[operator]
            x.data_ptr(), CODES[x.dtype], x.numel() // self.inputs, self.inputs, self.padded, pointer(self.perm),
            self.lines.data_ptr(), self.scales.data_ptr(), pointer(self.zeros), self.bits, self.group, self.outputs,
            pointer(self.bias), y.data_ptr(),
        )  # fmt: skip
        return y


def _product(x: Tensor, y: Tensor, part: Tensor) -> None:
    torch.mm(x, part, out=y)


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """A dense linear; fast: its weight rounded to 8 bits, for each output and group of inputs."""
    if precision == "exact":
        weight = weight.contiguous()
        return BoundLinear(lambda x: linear(x, weight, bias), str(weight.dtype).removeprefix("torch."), weight.nbytes)
    packed = pack_dense(weight, bias)
    return BoundLinear(packed.int8, f"int8 W8A8, groups of {packed.group}", packed.nbytes)


def pack_dense(weight: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """A dense weight rounded to 8 bits, for each output and group: `int8` of it is W8A8, `exact` W8A16."""
    outputs, inputs = weight.shape
    group = GROUPS[0] if inputs >= GROUPS[0] else GROUPS[-1]
    padded = _up(inputs, group)
    lines = huge_pages.buffer(_up(outputs, BLOCK) * padded)
    scales = torch.empty(_up(outputs, BLOCK) // BLOCK, padded // group, BLOCK, dtype=torch.float16)
    weight = weight.contiguous()
    library().ready().pack_dense(
        weight.data_ptr(), CODES[weight.dtype], outputs, inputs, padded, group, lines.data_ptr(), scales.data_ptr()
    )
    return PackedWeight(lines, scales, None, None, _float(bias), 8, group, inputs, padded, outputs)


def prepare_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None, precision: Precision = "exact",
) -> BoundLinear:  # fmt: skip
    """A GPTQ linear in the kernels' layout. What they cannot hold runs as in the reference, with a warning."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def pack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:  # fmt: skip
    """A GPTQ linear in the kernels' layout, or as published where they cannot hold it."""
    zeros = reference.unpack_rows(qzeros.t(), bits).t() + zero_offset
    if _unsupported(qweight, scales, zeros, bits) is not None:
        return reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    inputs, outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    order = _order(inputs, len(scales), g_idx)
    lines = huge_pages.buffer(outputs * len(order.groups) * order.size * bits // 8)
    words, padded = qweight.contiguous(), len(order.groups) * order.size
    library().ready().pack_gptq(words.data_ptr(), inputs, padded, outputs, bits, pointer(order.perm), lines.data_ptr())
    middle = bool((zeros == 1 << (bits - 1)).all())
    return PackedWeight(
        lines, _by_block(scales.half(), order.groups),
        None if middle else _by_block(zeros.to(torch.uint8), order.groups), order.perm, _float(bias), bits, order.size,
        inputs, padded, outputs,
    ).as_packed()  # fmt: skip


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """A packed linear bound to its kernel, in this layout or as published: that is laid out now, if it can be."""
    if packed.layout == "gptq":
        given = {name: packed.tensors.get(name) for name in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        again = pack_gptq(**given, **packed.fields)  # type: ignore[arg-type]
        return _plain(again, precision) if again.layout == "gptq" else bind(again, precision)
    w = PackedWeight.from_packed(packed)
    details = f"groups of {w.group}{', zero points' if w.zeros is not None else ''}"
    details += "" if w.perm is None else ", act-order"
    if precision == "fast":
        return BoundLinear(w.int8, f"int{w.bits} W{w.bits}A8, {details}", w.nbytes)
    return BoundLinear(w.exact, f"int{w.bits}, float activations, {details}", w.nbytes)


def unpack_to_qweight(packed: Packed) -> Tensor:
    """`reference.unpack_to_qweight`, of either layout."""
    if packed.layout == "gptq":
        return reference.unpack_to_qweight(packed)
    w = PackedWeight.from_packed(packed)
    plain = replace(w, scales=torch.ones_like(w.scales), zeros=None)  # dequantized, a level is itself minus the middle
    middle, words = 1 << (w.bits - 1), torch.empty(w.inputs * w.bits // 32, w.outputs, dtype=torch.int32)
    for first in range(0, w.outputs, OUTPUTS_AT_ONCE):
        levels = plain.unpacked(first, min(OUTPUTS_AT_ONCE, w.padded_outputs - first), torch.float32)
        levels += middle
        words[:, first : first + OUTPUTS_AT_ONCE] = reference.pack_rows(levels[:, : w.outputs - first], w.bits)
    return words


def _plain(packed: Packed, precision: Precision) -> BoundLinear:
    """What the kernels cannot hold, in plain torch, said aloud."""
    qzeros, bits = packed.tensors["qzeros"], packed.fields["bits"]
    zeros = reference.unpack_rows(qzeros.t(), bits).t() + packed.fields["zero_offset"]
    reason = _unsupported(packed.tensors["qweight"], packed.tensors["scales"], zeros, bits)
    outputs = packed.tensors["scales"].shape[1]
    _log.warning("a linear of %d outputs runs in plain torch, unpacked on each use: %s", outputs, reason)
    slow = reference.bind(packed, precision)
    return slow._replace(kernel=f"{slow.kernel} ({reason})")


class _Order(NamedTuple):
    """How inputs stand in a packed weight."""

    size: int  # inputs a group
    groups: Tensor  # int64, the checkpoint's group of each
    perm: Tensor | None  # int32 [size * groups], -1: padding; None: in order


def _order(inputs: int, groups: int, g_idx: Tensor | None) -> _Order:
    """Inputs sorted by their group (act-order), each group padded to whole groups of the largest size that fits."""
    if g_idx is None:
        g_idx = torch.arange(inputs) // -(-inputs // groups)
    counts = torch.bincount(g_idx.long(), minlength=groups)
    largest = int(counts.max())
    size = next((s for s in GROUPS if largest % s == 0), GROUPS[-1])
    wholes = (counts + size - 1) // size
    by_group = torch.arange(groups).repeat_interleave(wholes)
    perm = torch.full((len(by_group) * size,), -1, dtype=torch.int32)
    sorted_inputs = torch.argsort(g_idx.long(), stable=True)
    starts = (wholes * size).cumsum(0) - wholes * size  # of each group in perm
    ranks = torch.arange(inputs) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    perm[starts.repeat_interleave(counts) + ranks] = sorted_inputs.to(torch.int32)
    in_order = torch.equal(perm[:inputs], torch.arange(inputs, dtype=torch.int32))
    return _Order(size, by_group, None if in_order else perm)


def _unsupported(qweight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> str | None:
    if bits not in (4, 8):
        return f"{bits} bits"
    if qweight.shape[1] % BLOCK:
        return f"{qweight.shape[1]} outputs are no multiple of {BLOCK}"
    if not torch.equal(scales.half().to(scales.dtype), scales):
        return "its scales do not fit float16"
    if int(zeros.max()) > 255:
        return "a zero point is 256"
    return None


def _by_block(table: Tensor, groups: Tensor) -> Tensor:
    """[G, outputs] to [blocks, groups, 16]."""
    return table[groups].view(len(groups), -1, BLOCK).transpose(0, 1).contiguous()


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
