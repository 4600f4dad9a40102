"""The weight layouts of the GPU's int4 and int8 kernels.

A word is an int32 that packs 8 codes of 4 bits or 4 codes of 8 bits. A tile has 16 words of each output: 128 inputs
at 4 bits, 64 at 8 bits. Word r (0 to 15) holds the inputs 32 j + 2 r + h (h 0 to 1). At 4 bits (j 0 to 3) input
32 j + 2 r + h is in nibble j + 4 h, and the word is then rotated left by 3 bits; at 8 bits (j 0 to 1) it is in byte
j + 2 h. The memory order is [tiles, outputs, 16 words]. Reasons:

- a tile of many outputs is contiguous, so it is copied 128 bits at a time;
- at 4 bits `rotate_right(word, 4 j) & 0x00780078 | MAGIC` is two neighboring inputs as 16-bit floats, the operand of a
  tensor core, without a conversion. MAGIC 0x5800 makes float16 128 + q, 0x4180 makes bfloat16 16 + q: one packing for
  both;
- at 8 bits `word >> 8 j & 0x00FF00FF | 0x64006400` is the pair, float16 1024 + q. bfloat16 has too few bits for this.

Inputs of act-order checkpoints are sorted by group first, and x is gathered in the same order. Outputs are padded to
128 with scales of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts.interleave import WORDS
from qvl_kernels.packed_checks import FLOATS, Part, check_fields, check_parts, check_permutation
from qvl_kernels.reference import Packed
from qvl_kernels.util import cdiv

LAYOUT = "gpu-1"  # the layout id in files; increase the number when the kernels read them differently
LAYOUT_INT8 = "gpu-int8-1"
LAYOUTS = (LAYOUT, LAYOUT_INT8, *reference.LAYOUTS)
TILE = 128  # inputs in a tile at 4 bits
TILE_INT8 = 64
OUTPUTS = 128  # outputs are padded to a multiple of it
Kind = TypeVar("Kind", bound="PackedWeight")


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight of N outputs padded to N', and K inputs in T tiles and G groups."""

    words: Tensor  # int32 [T, N', 16]
    scales: Tensor  # float [G, N'], in the checkpoint's dtype
    zeros: Tensor | None  # uint8 [G, N'], zero points; None: symmetric
    perm: Tensor | None  # int32 [K], the input at each packed position; None: in order
    inputs: int
    outputs: int
    group: int  # inputs that share a scale: 32, 64, a multiple of 128, or all

    BITS: ClassVar[int]
    LAYOUT: ClassVar[str]
    TILE: ClassVar[int]  # inputs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by their names in files; `Packed.fields` stores the sizes."""
        tensors = {"words": self.words, "scales": self.scales, "zeros": self.zeros, "order": self.perm}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def as_packed(self, zero_offset: int, bias: Tensor | None = None) -> Packed:
        """Convert to the form stored in files; `zero_offset` was added to the published zero points."""
        fields = {"inputs": self.inputs, "outputs": self.outputs, "group": self.group, "zero_offset": zero_offset}
        return Packed(self.LAYOUT, self.tensors() | ({} if bias is None else {"bias": bias}), fields)

    @classmethod
    def from_packed(cls: type[Kind], packed: Packed) -> Kind:
        """Check and wrap a packed linear; raises `ValueError` for another layout, and for parts that do not fit."""
        if packed.layout != cls.LAYOUT:
            raise ValueError(f"these GPU kernels read the layout {cls.LAYOUT!r}; found {packed.layout!r}")
        what = f"a packed int{cls.BITS} linear of a GPU"
        check_fields(packed.fields, ("inputs", "outputs", "group", "zero_offset"), what)
        inputs, outputs, group = (packed.fields[name] for name in ("inputs", "outputs", "group"))
        if not inputs or not outputs or not group:
            raise ValueError(f"{what} has {outputs} outputs and {inputs} inputs in groups of {group}")
        tiles, padded, groups = cdiv(inputs, cls.TILE), cdiv(outputs, OUTPUTS) * OUTPUTS, cdiv(inputs, group)
        if groups > 1 and group % TILE and group not in (32, 64):
            raise ValueError(f"{what} has groups of {group}; expected 32, 64, a multiple of {TILE}, or one group")
        parts = {
            "words": Part((tiles, padded, WORDS), (torch.int32,)),
            "scales": Part((groups, padded), FLOATS),
            "zeros": Part((groups, padded), (torch.uint8,), optional=True),
            "order": Part((inputs,), (torch.int32,), optional=True),
            "bias": Part((outputs,), FLOATS, optional=True),
        }
        check_parts(packed.tensors, parts, what)
        words, scales, zeros, perm = (packed.tensors.get(name) for name in ("words", "scales", "zeros", "order"))
        check_permutation(perm, inputs, what)
        return cls(words, scales, zeros, perm, inputs, outputs, group)  # type: ignore[arg-type]  # checked above


class PackedInt4(PackedWeight):
    """A 4-bit weight; zero points are 0 to 16."""

    __slots__ = ()
    BITS, LAYOUT, TILE = 4, LAYOUT, TILE


class PackedInt8(PackedWeight):
    """An 8-bit weight; zero points are 0 to 255."""

    __slots__ = ()
    BITS, LAYOUT, TILE = 8, LAYOUT_INT8, TILE_INT8


KINDS: dict[int, type[PackedInt4] | type[PackedInt8]] = {4: PackedInt4, 8: PackedInt8}  # by bits


def symmetric_zero_point(bits: int) -> int:
    """Return the zero point of every symmetric checkpoint, 2^(bits - 1)."""
    return 1 << (bits - 1)


def kind_of(packed: Packed) -> type[PackedInt4] | type[PackedInt8]:
    """Return the class for a packed linear's layout; raises `ValueError` for a layout that is not the GPU's."""
    for kind in KINDS.values():
        if packed.layout == kind.LAYOUT:
            return kind
    raise ValueError(f"these GPU kernels read the layouts {LAYOUT!r} and {LAYOUT_INT8!r}; found {packed.layout!r}")
