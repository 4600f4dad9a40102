"""The layout that the GPU's int4 kernels read, made of a GPTQ linear and turned back, bit for bit, in plain torch.

A tile is 128 inputs. Within it word r (0 to 15) of an output holds the inputs 32 j + 2 r + h (j 0 to 3, h 0 to 1) in
nibble j + 4 h, and is then turned left by 3 bits; memory order is [tiles, outputs, 16 words]. Why:

- a tile of many outputs is one contiguous run, so it is copied 128 bits at a time;
- `turn_right(word, 4 j) & 0x00780078 | MAGIC` is two neighbouring inputs as 16-bit floats, which is what a tensor core
  takes: no conversion. MAGIC 0x5800 makes float16 128 + q, 0x4180 makes bfloat16 16 + q: one packing for both.

Inputs of act-order checkpoints are sorted by group first; x is gathered in that order. Outputs are padded to 128 with
scales of zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.reference import Packed, unpack_rows

LAYOUT = "gpu-1"  # of packed weights in files; another number when the kernels read them differently
LAYOUTS = (LAYOUT, *reference.LAYOUTS)
TILE = 128  # inputs
WORDS = 16  # of 8 inputs each
TURN = 3  # bits
OUTPUTS = 128  # outputs are padded to a multiple
MIDDLE = 8  # the zero point of every symmetric checkpoint
NIBBLES = 8  # in a word


@dataclass(frozen=True, slots=True, eq=False)
class PackedInt4:
    """A weight of 4 bits, N outputs padded to N', K inputs in T tiles and G groups."""

    words: Tensor  # int32 [T, N', 16]
    scales: Tensor  # float [G, N'], in the checkpoint's dtype
    zeros: Tensor | None  # uint8 [G, N'], zero points of 0 to 16; None: 8 everywhere
    order: Tensor | None  # int32 [K], the input at each place; None: in order
    inputs: int
    outputs: int
    group: int  # inputs that share a scale: 32, 64, a multiple of 128, or all

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
        return Packed(LAYOUT, self.tensors() | ({} if bias is None else {"bias": bias}), fields)

    @classmethod
    def from_packed(cls, packed: Packed) -> PackedInt4:
        """Raises ValueError for another layout, or another version of this one, or a shape or dtype that is not its."""
        if packed.layout != LAYOUT:
            raise ValueError(f"these GPU kernels read the layout {LAYOUT!r}; found {packed.layout!r}")
        inputs, outputs, group = (packed.fields[name] for name in ("inputs", "outputs", "group"))
        tiles, padded, groups = -(-inputs // TILE), -(-outputs // OUTPUTS) * OUTPUTS, -(-inputs // group)
        wanted = {
            "words": ((tiles, padded, WORDS), torch.int32),
            "scales": ((groups, padded), None),
            "zeros": ((groups, padded), torch.uint8),
            "order": ((inputs,), torch.int32),
        }
        if missing := {"words", "scales"} - set(packed.tensors):
            raise ValueError(f"packed int4 linear lacks {' and '.join(sorted(missing))}")
        for name, (shape, dtype) in wanted.items():
            found = packed.tensors.get(name)
            if found is not None and (tuple(found.shape) != shape or dtype not in (None, found.dtype)):
                raise ValueError(f"packed {name} is {found.dtype} {tuple(found.shape)}; expected {dtype} {shape}")
        words, scales, zeros, order = (packed.tensors.get(name) for name in wanted)
        return cls(words, scales, zeros, order, inputs, outputs, group)  # type: ignore[arg-type]  # checked above


def unsupported(qweight: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int) -> str | None:
    """Why the layout cannot hold a GPTQ linear, or None."""
    if bits != 4:
        return f"{bits} bits"
    inputs = qweight.shape[0] * NIBBLES
    group, _, even = _grouping(inputs, len(scales), g_idx)
    if not even:
        return "groups of unequal size"
    if len(scales) > 1 and group % TILE and group not in (32, 64):
        return f"groups of {group}"
    return None


def pack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Packed:  # fmt: skip
    """`reference.pack_gptq` in this layout, or as published where it cannot hold the linear."""
    if unsupported(qweight, scales, g_idx, bits):
        return reference.pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias)
    return packed_int4(qweight, qzeros, scales, g_idx, zero_offset).as_packed(zero_offset, bias)


def packed_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int) -> PackedInt4:
    """Lay a GPTQ linear of 4 bits out anew, a tile at a time; raises ValueError where the layout cannot hold it."""
    if fault := unsupported(qweight, scales, g_idx, 4):
        raise ValueError(f"a GPTQ linear with {fault} has no packed form; expected equal groups of 32, 64 or 128 n")
    inputs, outputs = qweight.shape[0] * NIBBLES, qweight.shape[1]
    group, order, _ = _grouping(inputs, len(scales), g_idx)
    places = torch.arange(inputs, device=qweight.device) if order is None else order.long()
    padding = -outputs % OUTPUTS
    words = qweight.new_empty(-(-inputs // TILE), outputs + padding, WORDS)
    for i, tile in enumerate(words):
        tile.copy_(_tile(qweight, places[i * TILE : (i + 1) * TILE], padding))
    zeros = (unpack_rows(qzeros.t().contiguous(), 4).t() + zero_offset).to(torch.uint8)
    return PackedInt4(
        words=words,
        scales=F.pad(scales, (0, padding)).contiguous(),
        zeros=None if bool((zeros == MIDDLE).all()) else F.pad(zeros, (0, padding), value=MIDDLE).contiguous(),
        order=order,
        inputs=inputs,
        outputs=outputs,
        group=group,
    )


def unpack_gptq(packed: Packed) -> Packed:
    """The published tensors again, in layout "gptq"; `g_idx` is absent where the groups follow one another."""
    w, zero_offset = PackedInt4.from_packed(packed), packed.fields["zero_offset"]
    levels, g_idx = _levels(w.words)[: w.inputs, : w.outputs], None
    if w.order is not None:
        inverse = torch.argsort(w.order)
        levels, g_idx = levels[inverse], (inverse // w.group).to(torch.int32)
    scales = w.scales[:, : w.outputs].contiguous()
    zeros = torch.full(scales.shape, MIDDLE, dtype=torch.uint8, device=scales.device)
    if w.zeros is not None:
        zeros = w.zeros[:, : w.outputs]
    qzeros = _pack_rows(zeros.t().int() - zero_offset).t().contiguous()
    bias = packed.tensors.get("bias")
    return reference.pack_gptq(_pack_rows(levels), qzeros, scales, g_idx, 4, zero_offset, bias)


def gptq_levels(packed: Packed) -> Tensor:
    """`reference.gptq_levels`, of either layout."""
    return reference.gptq_levels(packed if packed.layout == "gptq" else unpack_gptq(packed))


def dequantize(packed: PackedInt4) -> Tensor:
    """The float32 weight [N, K], its inputs in the packed order: what the kernels compute with."""
    levels = _levels(packed.words)[: packed.inputs, : packed.outputs]
    group = torch.arange(packed.inputs, device=levels.device) // packed.group
    zeros = MIDDLE if packed.zeros is None else packed.zeros[:, : packed.outputs].int()[group]
    weight: Tensor = packed.scales[:, : packed.outputs].float()[group] * (levels - zeros)
    return weight.t()


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


def _tile(qweight: Tensor, rows: Tensor, padding: int) -> Tensor:
    """The words [N', 16] of the inputs `rows`, at most 128 of them; those that are missing are level 0."""
    levels = (qweight[rows // NIBBLES] >> (rows % NIBBLES * 4).int().unsqueeze(1)) & 15
    levels = F.pad(levels, (0, padding, 0, TILE - len(rows))).view(4, WORDS, 2, -1)
    word = torch.zeros_like(levels[0, :, 0])
    for j in range(4):
        for h in range(2):
            word |= levels[j, :, h] << (4 * (j + 4 * h))
    turned: Tensor = (word << TURN) | ((word >> (32 - TURN)) & (2**TURN - 1))
    return turned.t()


def _levels(words: Tensor) -> Tensor:
    """int32 levels [T * 128, N'] of words [T, N', 16]."""
    word = ((words >> TURN) & (2 ** (32 - TURN) - 1)) | (words << (32 - TURN))
    shifts = torch.tensor([[4 * (j + 4 * h) for h in range(2)] for j in range(4)], device=words.device)
    levels = (word.permute(0, 2, 1)[:, None, :, None] >> shifts.int().view(1, 4, 1, 2, 1)) & 15
    rows: Tensor = levels.reshape(-1, words.shape[1])
    return rows


def _pack_rows(levels: Tensor) -> Tensor:
    """Levels [rows, columns] to int32 words [rows / 8, columns], first row lowest: the inverse of `unpack_rows`."""
    nibbles = levels.int().view(-1, NIBBLES, levels.shape[1])
    words = torch.zeros_like(nibbles[:, 0])
    for i in range(NIBBLES):
        words |= (nibbles[:, i] & 15) << (4 * i)
    return words
