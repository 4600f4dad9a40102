"""The layouts that the GPU's int4 and int8 kernels read, made of a GPTQ linear and turned back, bit for bit.

A word holds 8 levels of 4 bits or 4 of 8, an output has 16 words of a tile, so that a tile is 128 inputs or 64. Word r
(0 to 15) holds the inputs 32 j + 2 r + h (h 0 to 1), of 4 bits (j 0 to 3) in nibble j + 4 h and then turned left by 3
bits, of 8 (j 0 to 1) in byte j + 2 h. Memory order is [tiles, outputs, 16 words]. Why:

- a tile of many outputs is one contiguous run, so it is copied 128 bits at a time;
- `turn_right(word, 4 j) & 0x00780078 | MAGIC` is two neighbouring inputs as 16-bit floats, which is what a tensor core
  takes: no conversion. MAGIC 0x5800 makes float16 128 + q, 0x4180 makes bfloat16 16 + q: one packing for both;
- of 8 bits `word >> 8 j & 0x00FF00FF | 0x64006400` is the pair, float16 1024 + q. bfloat16 has no room for this.

Inputs of act-order checkpoints are sorted by group first; x is gathered in that order. Outputs are padded to 128 with
scales of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.reference import Packed, unpack_rows

LAYOUT = "gpu-1"  # of packed weights in files; another number when the kernels read them differently
LAYOUT_INT8 = "gpu-int8-1"
LAYOUTS = (LAYOUT, LAYOUT_INT8, *reference.LAYOUTS)
TILE = 128  # inputs of 4 bits
TILE_INT8 = 64
WORDS = 16  # of a tile, for each output
OUTPUTS = 128  # outputs are padded to a multiple
Kind = TypeVar("Kind", bound="PackedWeight")


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight of N outputs padded to N', K inputs in T tiles and G groups."""

    words: Tensor  # int32 [T, N', 16]
    scales: Tensor  # float [G, N'], in the checkpoint's dtype
    zeros: Tensor | None  # uint8 [G, N'], zero points; None: the middle everywhere
    order: Tensor | None  # int32 [K], the input at each place; None: in order
    inputs: int
    outputs: int
    group: int  # inputs that share a scale: 32, 64, a multiple of 128, or all

    BITS: ClassVar[int]
    LAYOUT: ClassVar[str]
    TILE: ClassVar[int]  # inputs
    TURN: ClassVar[int]  # bits that a word is turned left by

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by field; `inputs`, `outputs` and `group` go beside it."""
        named = {"words": self.words, "scales": self.scales, "zeros": self.zeros, "order": self.order}
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
    BITS, LAYOUT, TILE, TURN = 4, LAYOUT, TILE, 3


class PackedInt8(PackedWeight):
    """A weight of 8 bits; zero points are 0 to 255."""

    __slots__ = ()
    BITS, LAYOUT, TILE, TURN = 8, LAYOUT_INT8, TILE_INT8, 0


KINDS: dict[int, type[PackedInt4] | type[PackedInt8]] = {4: PackedInt4, 8: PackedInt8}  # by bits


def middle(bits: int) -> int:
    """The zero point of every symmetric checkpoint."""
    return 1 << (bits - 1)


def unsupported(
    qweight: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zeros: Tensor | None = None
) -> str | None:
    """Why no layout can hold a GPTQ linear, or None; `zeros` are its zero points, where they are known."""
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
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:  # fmt: skip
    """`reference.pack_gptq` in the layout of these bits, or as published where it cannot hold the linear."""
    zeros = zero_points(qzeros, bits, zero_offset)
    if unsupported(qweight, scales, g_idx, bits, zeros):
        return reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    return _laid_out(KINDS[bits], qweight, zeros, scales, g_idx).as_packed(zero_offset, bias)


def packed_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int) -> PackedInt4:
    """`packed` of 4 bits."""
    return packed(PackedInt4, qweight, qzeros, scales, g_idx, zero_offset)


def packed(
    kind: type[Kind], qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int
) -> Kind:
    """Lay a GPTQ linear out anew, a tile at a time; raises ValueError where the layout cannot hold it."""
    zeros = zero_points(qzeros, kind.BITS, zero_offset)
    if fault := unsupported(qweight, scales, g_idx, kind.BITS, zeros):
        raise ValueError(f"a GPTQ linear with {fault} has no packed form; expected equal groups of 32, 64 or 128 n")
    return _laid_out(kind, qweight, zeros, scales, g_idx)


def _laid_out(kind: type[Kind], qweight: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> Kind:
    bits = kind.BITS
    inputs, outputs = qweight.shape[0] * (32 // bits), qweight.shape[1]
    group, order, _ = _grouping(inputs, len(scales), g_idx)
    places = torch.arange(inputs, device=qweight.device) if order is None else order.long()
    padding = -outputs % OUTPUTS
    words = qweight.new_empty(-(-inputs // kind.TILE), outputs + padding, WORDS)
    for i, tile in enumerate(words):
        tile.copy_(_tile(kind, qweight, places[i * kind.TILE : (i + 1) * kind.TILE], padding))
    held = None
    if not bool((zeros == middle(bits)).all()):
        held = F.pad(zeros.to(torch.uint8), (0, padding), value=middle(bits)).contiguous()
    return kind(
        words=words,
        scales=F.pad(scales, (0, padding)).contiguous(),
        zeros=held,
        order=order,
        inputs=inputs,
        outputs=outputs,
        group=group,
    )


def kind_of(packed: Packed) -> type[PackedInt4] | type[PackedInt8]:
    """Which of the layouts a packed linear has; raises ValueError for any other."""
    for kind in KINDS.values():
        if packed.layout == kind.LAYOUT:
            return kind
    raise ValueError(f"these GPU kernels read the layouts {LAYOUT!r} and {LAYOUT_INT8!r}; found {packed.layout!r}")


def unpack_gptq(packed: Packed) -> Packed:
    """The published tensors again, in layout "gptq"; `g_idx` is absent where the groups follow one another."""
    w, zero_offset = kind_of(packed).from_packed(packed), packed.fields["zero_offset"]
    levels, g_idx = _levels(w)[: w.inputs, : w.outputs], None
    if w.order is not None:
        inverse = torch.argsort(w.order)
        levels, g_idx = levels[inverse], (inverse // w.group).to(torch.int32)
    scales = w.scales[:, : w.outputs].contiguous()
    zeros = torch.full(scales.shape, middle(w.BITS), dtype=torch.uint8, device=scales.device)
    if w.zeros is not None:
        zeros = w.zeros[:, : w.outputs]
    qzeros = _pack_rows(zeros.t().int() - zero_offset, w.BITS).t().contiguous()
    bias = packed.tensors.get("bias")
    return reference.pack_gptq(_pack_rows(levels, w.BITS), qzeros, scales, g_idx, w.BITS, zero_offset, bias)


def gptq_levels(packed: Packed) -> Tensor:
    """`reference.gptq_levels`, of any layout."""
    return reference.gptq_levels(packed if packed.layout == "gptq" else unpack_gptq(packed))


def dequantize(w: PackedWeight) -> Tensor:
    """The float32 weight [N, K], its inputs in the packed order: what the kernels compute with."""
    levels = _levels(w)[: w.inputs, : w.outputs]
    group = torch.arange(w.inputs, device=levels.device) // w.group
    zeros = middle(w.BITS) if w.zeros is None else w.zeros[:, : w.outputs].int()[group]
    weight: Tensor = w.scales[:, : w.outputs].float()[group] * (levels - zeros)
    return weight.t()


def zero_points(qzeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """int32 [G, N], as they are meant."""
    return unpack_rows(qzeros.t().contiguous(), bits).t() + zero_offset


def _grouping(inputs: int, groups: int, g_idx: Tensor | None) -> tuple[int, Tensor | None, bool]:
    """Inputs in a group, the order that sorts inputs by group (None: they are sorted), and whether groups are equal.

    The last group may be smaller.
    """
    if g_idx is None:
        return -(-inputs // groups), None, True
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    group = int(sizes[0])
    by_group, order = torch.sort(g_idx.long(), stable=True)
    places = torch.arange(inputs, device=g_idx.device)
    even = group > 0 and torch.equal(by_group, places // group)
    return group, None if torch.equal(order, places) else order.to(torch.int32), even


def _tile(kind: type[PackedWeight], qweight: Tensor, rows: Tensor, padding: int) -> Tensor:
    """The words [N', 16] of the inputs `rows`, at most a tile of them; those that are missing are level 0."""
    bits, in_word = kind.BITS, 32 // kind.BITS
    levels = (qweight[rows // in_word] >> (rows % in_word * bits).int().unsqueeze(1)) & (2**bits - 1)
    levels = F.pad(levels, (0, padding, 0, kind.TILE - len(rows))).view(in_word // 2, WORDS, 2, -1)
    word = torch.zeros_like(levels[0, :, 0])
    for shift, level in zip(_shifts(bits).flatten().tolist(), levels.transpose(1, 2).flatten(0, 1), strict=True):
        word |= level << shift
    return _turned(word, kind.TURN).t()


def _levels(w: PackedWeight) -> Tensor:
    """int32 levels [T * tile, N'] of a weight's words [T, N', 16]."""
    word, bits = _turned(w.words, -w.TURN), w.BITS
    shifts = _shifts(bits).to(word.device).view(1, -1, 1, 2, 1)
    levels = (word.permute(0, 2, 1)[:, None, :, None] >> shifts) & (2**bits - 1)
    rows: Tensor = levels.reshape(-1, w.words.shape[1])
    return rows


def _shifts(bits: int) -> Tensor:
    """int32 [j, h]: how far up a word holds the inputs 32 j + 2 r + h."""
    half = 16 // bits
    return torch.tensor([[bits * (j + half * h) for h in range(2)] for j in range(half)], dtype=torch.int32)


def _turned(words: Tensor, by: int) -> Tensor:
    """int32 words turned left by so many bits, or right where it is negative."""
    by %= 32
    return words if by == 0 else (words << by) | ((words >> (32 - by)) & (2**by - 1))


def _pack_rows(levels: Tensor, bits: int) -> Tensor:
    """Levels [rows, columns] to int32 words [rows * bits / 32, columns], first row lowest: `unpack_rows` undone."""
    fields = levels.int().view(-1, 32 // bits, levels.shape[1])
    words = torch.zeros_like(fields[:, 0])
    for i in range(fields.shape[1]):
        words |= (fields[:, i] & (2**bits - 1)) << (bits * i)
    return words
