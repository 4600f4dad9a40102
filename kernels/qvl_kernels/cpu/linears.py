"""Linears with 4-bit or 8-bit weights packed for the CPU kernels. A row's bits depend on no other row."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import memory as huge_pages
from qvl_kernels import reference
from qvl_kernels.cpu.dense import linear
from qvl_kernels.cpu.library import CODES, library, pointer
from qvl_kernels.cpu.memory import empty
from qvl_kernels.layouts.binding import bind_published
from qvl_kernels.layouts.gpu import symmetric_zero_point
from qvl_kernels.layouts.repack import zero_points
from qvl_kernels.packed_checks import Part, check_choice, check_fields, check_parts, check_permutation
from qvl_kernels.reference import BoundLinear, Packed, Precision
from qvl_kernels.util import cdiv, dtype_name

LAYOUT = "cpu-1"  # the layout id in files; increase the number when csrc/linear/int8.inl reads them differently
LAYOUTS = (LAYOUT, *reference.LAYOUTS)
_WHAT = "a packed linear of the CPU"
_TENSORS = ("lines", "scales", "zeros", "perm", "bias")
BLOCK = 16  # outputs that are interleaved in a packed weight
GROUPS = (128, 64, 32)  # group sizes (inputs that share a scale) that the kernels support
OUTPUTS_AT_ONCE = 1024  # 45 MB of floats at 11008 inputs


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight of 4 or 8 bits in the layout of csrc/linear/int8.inl."""

    lines: Tensor  # uint8
    scales: Tensor  # float16 [blocks, groups, 16]
    zeros: Tensor | None  # uint8 [blocks, groups, 16]; None: symmetric
    perm: Tensor | None  # int32 [padded], the input at each packed position, -1 for padding; None: in order
    bias: Tensor | None  # float32 [outputs]
    bits: int
    group: int
    inputs: int
    padded: int
    outputs: int

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, without the bias."""
        return sum(t.nbytes for t in (self.lines, self.scales, self.zeros, self.perm) if t is not None)

    def as_packed(self) -> Packed:
        """Convert to the form stored in files."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return Packed(LAYOUT, tensors, {name: value for name, value in values.items() if isinstance(value, int)})

    @classmethod
    def from_packed(cls, packed: Packed) -> PackedWeight:
        """Check and wrap a packed linear; raises `ValueError` for another layout, and for parts that do not fit."""
        if packed.layout != LAYOUT:
            raise ValueError(f"these CPU kernels read the layout {LAYOUT!r}; found {packed.layout!r}")
        names = [field.name for field in fields(cls) if field.name not in _TENSORS]
        check_fields(packed.fields, names, _WHAT)
        absent = dict.fromkeys(("zeros", "perm", "bias"))
        bits, group, inputs, padded, outputs = (packed.fields[name] for name in names)
        check_choice("bits", bits, (4, 8), _WHAT)
        check_choice("group", group, GROUPS, _WHAT)
        if not 0 < inputs <= padded or padded % group or not outputs:
            raise ValueError(f"{_WHAT} has {outputs} outputs and {inputs} inputs, padded to {padded}")
        blocks = _up(outputs, BLOCK) // BLOCK
        by_group = (blocks, padded // group, BLOCK)
        parts = {
            "lines": Part((blocks * BLOCK * padded * bits // 8,), (torch.uint8,)),
            "scales": Part(by_group, (torch.float16,)),
            "zeros": Part(by_group, (torch.uint8,), optional=True),
            "perm": Part((padded,), (torch.int32,), optional=True),
            "bias": Part((outputs,), (torch.float32,), optional=True),
        }
        check_parts(packed.tensors, parts, _WHAT)
        check_permutation(packed.tensors.get("perm"), inputs, _WHAT)
        return cls(**(absent | packed.tensors), **packed.fields)  # type: ignore[arg-type]  # checked above

    def int8(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out] with activations rounded to int8 for each row and group."""
        return self._run(library().ready().linear_int8, x)

    def exact(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out] with float activations, each row as it would be alone."""
        return self._run(library().ready().linear_exact, x)

    @property
    def padded_outputs(self) -> int:
        """Outputs, rounded up to whole blocks."""
        return _up(self.outputs, BLOCK)

    def unpacked(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Dequantize outputs first to first + count to columns [inputs, count]; both are multiples of 16."""
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


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """Bind a dense linear; fast: its weight is rounded to 8 bits for each output and group of inputs."""
    if precision == "exact":
        weight = weight.contiguous()
        return BoundLinear(lambda x: linear(x, weight, bias), dtype_name(weight.dtype), weight.nbytes)
    packed = pack_dense(weight, bias)
    return BoundLinear(packed.int8, f"int8 W8A8, groups of {packed.group}", packed.nbytes)


def pack_dense(weight: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Round a dense weight to 8 bits for each output and group; its `int8` is W8A8, its `exact` W8A16."""
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
    """Bind a GPTQ linear in the kernels' layout, or fall back to the reference ops, with a warning."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def pack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:  # fmt: skip
    """Pack a GPTQ linear in the kernels' layout, or as published if that cannot hold it."""
    zeros = zero_points(qzeros, bits, zero_offset)
    if _unsupported(qweight, scales, g_idx, bits, zeros) is not None:
        return reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    inputs, outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    grouping = _group_inputs(inputs, len(scales), g_idx)
    padded = len(grouping.groups) * grouping.size
    lines, qweight = huge_pages.buffer(outputs * padded * bits // 8), qweight.contiguous()
    library().ready().pack_gptq(
        qweight.data_ptr(), inputs, padded, outputs, bits, pointer(grouping.perm), lines.data_ptr()
    )
    symmetric = bool((zeros == symmetric_zero_point(bits)).all())
    return PackedWeight(
        lines,
        _by_block(scales.half(), grouping.groups),
        None if symmetric else _by_block(zeros.to(torch.uint8), grouping.groups),
        grouping.perm,
        _float(bias),
        bits,
        grouping.size,
        inputs,
        padded,
        outputs,
    ).as_packed()


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """Bind a packed linear to its kernel; a published one is repacked first, or falls back with a warning."""
    if packed.layout == "gptq":
        return bind_published(packed, precision, pack_gptq, bind, _unsupported)
    w = PackedWeight.from_packed(packed)
    details = f"groups of {w.group}{', zero points' if w.zeros is not None else ''}"
    details += "" if w.perm is None else ", act-order"
    if precision == "fast":
        return BoundLinear(w.int8, f"int{w.bits} W{w.bits}A8, {details}", w.nbytes)
    return BoundLinear(w.exact, f"int{w.bits}, float activations, {details}", w.nbytes)


def unpack_to_qweight(packed: Packed) -> Tensor:
    """`reference.unpack_to_qweight`, for the CPU layout and "gptq"."""
    if packed.layout == "gptq":
        return reference.unpack_to_qweight(packed)
    w = PackedWeight.from_packed(packed)
    unscaled = replace(w, scales=torch.ones_like(w.scales), zeros=None)  # dequantizes to code - symmetric zero point
    qweight = torch.empty(w.inputs * w.bits // 32, w.outputs, dtype=torch.int32)
    for first in range(0, w.outputs, OUTPUTS_AT_ONCE):
        codes = unscaled.unpacked(first, min(OUTPUTS_AT_ONCE, w.padded_outputs - first), torch.float32)
        codes += symmetric_zero_point(w.bits)
        qweight[:, first : first + OUTPUTS_AT_ONCE] = reference.pack_rows(codes[:, : w.outputs - first], w.bits)
    return qweight


class _Grouping(NamedTuple):
    """The order of inputs in a packed weight."""

    size: int  # inputs in a group
    groups: Tensor  # int64, the checkpoint's group of each packed group
    perm: Tensor | None  # int32 [size * groups], -1: padding; None: in order


def _group_inputs(inputs: int, groups: int, g_idx: Tensor | None) -> _Grouping:
    """Sort inputs by group (act-order), each group padded to whole groups of the largest size that fits."""
    if g_idx is None:
        g_idx = torch.arange(inputs) // cdiv(inputs, groups)
    counts = torch.bincount(g_idx.long(), minlength=groups)
    largest = int(counts.max())
    size = next((s for s in GROUPS if largest % s == 0), GROUPS[-1])
    wholes = (counts + size - 1) // size
    by_group = torch.arange(groups).repeat_interleave(wholes)
    perm = torch.full((len(by_group) * size,), -1, dtype=torch.int32)
    sorted_inputs = torch.argsort(g_idx.long(), stable=True)
    starts = (wholes * size).cumsum(0) - wholes * size  # the start of each group in perm
    ranks = torch.arange(inputs) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    perm[starts.repeat_interleave(counts) + ranks] = sorted_inputs.to(torch.int32)
    in_order = torch.equal(perm[:inputs], torch.arange(inputs, dtype=torch.int32))
    return _Grouping(size, by_group, None if in_order else perm)


def _unsupported(qweight: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zeros: Tensor) -> str | None:
    """Return why the layout cannot hold a GPTQ linear, or None; any `g_idx` is supported."""
    if bits not in (4, 8):
        return f"{bits} bits"
    if qweight.shape[1] % BLOCK:
        return f"{qweight.shape[1]} outputs are not a multiple of {BLOCK}"
    if not torch.equal(scales.half().to(scales.dtype), scales):
        return "its scales do not fit float16"
    if int(zeros.max()) > 255:
        return "a zero point is 256"
    return None


def _by_block(table: Tensor, groups: Tensor) -> Tensor:
    """Rearrange [G, outputs] to [blocks, groups, 16]."""
    return table[groups].view(len(groups), -1, BLOCK).transpose(0, 1).contiguous()


def _up(n: int, to: int) -> int:
    return cdiv(n, to) * to


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
