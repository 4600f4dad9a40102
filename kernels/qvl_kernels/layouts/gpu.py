"""The layouts that the GPU's int4 and int8 kernels read.

A word holds 8 levels of 4 bits or 4 of 8, an output has 16 words of a tile, so that a tile is 128 inputs or 64. Word r
(0 to 15) holds the inputs 32 j + 2 r + h (h 0 to 1), of 4 bits (j 0 to 3) in nibble j + 4 h and then turned left by 3
bits, of 8 (j 0 to 1) in byte j + 2 h. Memory order is [tiles, outputs, 16 words]. Why:

- a tile of many outputs is one contiguous run, so it is copied 128 bits at a time;
- `turn_right(word, 4 j) & 0x00780078 | MAGIC` is two neighboring inputs as 16-bit floats, which is what a tensor core
  takes: no conversion. MAGIC 0x5800 makes float16 128 + q, 0x4180 makes bfloat16 16 + q: one packing for both;
- of 8 bits `word >> 8 j & 0x00FF00FF | 0x64006400` is the pair, float16 1024 + q. bfloat16 has no room for this.

Inputs of act-order checkpoints are sorted by group first; x is gathered in that order. Outputs are padded to 128 with
scales of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.layouts.interleave import WORDS
from qvl_kernels.reference import Packed

LAYOUT = "gpu-1"  # of packed weights in files; another number when the kernels read them differently
LAYOUT_INT8 = "gpu-int8-1"
LAYOUTS = (LAYOUT, LAYOUT_INT8, *reference.LAYOUTS)
TILE = 128  # inputs of 4 bits
TILE_INT8 = 64
OUTPUTS = 128  # outputs are padded to a multiple
Kind = TypeVar("Kind", bound="PackedWeight")


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight of N outputs padded to N', K inputs in T tiles and G groups."""

    words: Tensor  # int32 [T, N', 16]
    scales: Tensor  # float [G, N'], in the checkpoint's dtype
    zeros: Tensor | None  # uint8 [G, N'], zero points; None: the middle everywhere
    perm: Tensor | None  # int32 [K], the input at each place; None: in order
    inputs: int
    outputs: int
    group: int  # inputs that share a scale: 32, 64, a multiple of 128, or all

    BITS: ClassVar[int]
    LAYOUT: ClassVar[str]
    TILE: ClassVar[int]  # inputs

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by field; `inputs`, `outputs` and `group` go beside it."""
        named = {"words": self.words, "scales": self.scales, "zeros": self.zeros, "order": self.perm}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def as_packed(self, zero_offset: int, bias: Tensor | None = None) -> Packed:
        """For a file; `zero_offset` is what the published zero points lacked."""
        fields = {"inputs": self.inputs, "outputs": self.outputs, "group": self.group, "zero_offset": zero_offset}
        return Packed(self.LAYOUT, self.tensors() | ({} if bias is None else {"bias": bias}), fields)

    @classmethod
    def from_packed(cls: type[Kind], packed: Packed) -> Kind:
        """Raises ValueError for another layout, or another version of this one, or a shape or dtype that is not its."""
        if packed.layout != cls.LAYOUT:
            raise ValueError(f"these GPU kernels read the layout {cls.LAYOUT!r}; found {packed.layout!r}")
        inputs, outputs, group = (packed.fields[name] for name in ("inputs", "outputs", "group"))
        tiles, padded, groups = -(-inputs // cls.TILE), -(-outputs // OUTPUTS) * OUTPUTS, -(-inputs // group)
        wanted = {
            "words": ((tiles, padded, WORDS), torch.int32),
            "scales": ((groups, padded), None),
            "zeros": ((groups, padded), torch.uint8),
            "order": ((inputs,), torch.int32),
        }
        if missing := {"words", "scales"} - set(packed.tensors):
            raise ValueError(f"packed int{cls.BITS} linear lacks {' and '.join(sorted(missing))}")
        for name, (shape, dtype) in wanted.items():
            found = packed.tensors.get(name)
            if found is not None and (tuple(found.shape) != shape or dtype not in (None, found.dtype)):
                raise ValueError(f"packed {name} is {found.dtype} {tuple(found.shape)}; expected {dtype} {shape}")
        words, scales, zeros, order = (packed.tensors.get(name) for name in wanted)
        return cls(words, scales, zeros, order, inputs, outputs, group)  # type: ignore[arg-type]  # checked above


class PackedInt4(PackedWeight):
    """A weight of 4 bits; zero points are 0 to 16."""

    __slots__ = ()
    BITS, LAYOUT, TILE = 4, LAYOUT, TILE


class PackedInt8(PackedWeight):
    """A weight of 8 bits; zero points are 0 to 255."""

    __slots__ = ()
    BITS, LAYOUT, TILE = 8, LAYOUT_INT8, TILE_INT8


KINDS: dict[int, type[PackedInt4] | type[PackedInt8]] = {4: PackedInt4, 8: PackedInt8}  # by bits


def symmetric_zero_point(bits: int) -> int:
    """The zero point of every symmetric checkpoint."""
    return 1 << (bits - 1)


def kind_of(packed: Packed) -> type[PackedInt4] | type[PackedInt8]:
    """Which of the layouts a packed linear has; raises ValueError for any other."""
    for kind in KINDS.values():
        if packed.layout == kind.LAYOUT:
            return kind
    raise ValueError(f"these GPU kernels read the layouts {LAYOUT!r} and {LAYOUT_INT8!r}; found {packed.layout!r}")
