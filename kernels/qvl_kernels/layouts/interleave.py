"""GPTQ's words to those of the GPU layouts and back: the same bits in another order, no level ever unpacked.

A tile is 16 rows of `qweight`, which become 16 words of each output. Written in binary, an input of a tile of 4 bits is
j1 j0 r3 r2 r1 r0 h (see `layouts.gpu`). GPTQ holds it in row j1 j0 r3 r2, nibble r1 r0 h; the kernels want it in word
r3 r2 r1 r0, nibble h j1 j0. So three times a binary digit of the row changes places with one of the nibble: j0 with h,
j1 with r0, and h, which is now where j0 was, with r1. Of 8 bits an input is j r3 r2 r1 r0 h, in row j r3 r2 r1 and byte
r0 h, wanted in word r3 r2 r1 r0 and byte h j: j with h, then h with r0.

Each exchange is six operations on two rows of words, for all of their nibbles at once (Warren, Hacker's Delight,
section 7-3, on transposing a matrix of bits). A word takes 7 ns of one core; unpacked level by level it took 30 to 80.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = 16  # of a tile, for each output, and rows of qweight
TURN = {4: 3, 8: 0}  # bits that a word is turned left by, by bits of a level
_AT_ONCE = 4096  # outputs of a tile: 256 KiB of words, and half of that beside them, stay in a core's cache
# The digits that change places: the dimension of rows [rest, 2, 2, outputs] (of 8 bits [rest, 2, outputs]) and how far
# apart in a word fields are whose numbers differ in the other digit alone.
_EXCHANGES = {4: ((1, 4), (2, 8), (1, 16)), 8: ((1, 8), (1, 16))}
_DIGITS = {4: 2, 8: 1}  # of a row's number that take part: the highest


def to_tiles(qweight: Tensor, bits: int, outputs: int) -> Tensor:
    """int32 words [tiles, outputs, 16] of `qweight` [rows, its outputs]; rows and outputs that it lacks are zeros."""
    rows, own = qweight.shape
    words = qweight.new_empty(-(-rows // WORDS), outputs, WORDS)
    words[:, own:] = 0
    for tile, part in _pieces(len(words), own):
        piece = qweight[tile * WORDS : (tile + 1) * WORDS, part]
        if len(piece) < WORDS:
            piece = F.pad(piece, (0, 0, 0, WORDS - len(piece)))
        fields = _by_digits(piece, bits).clone(memory_format=torch.contiguous_format)
        for dim, apart in _EXCHANGES[bits]:
            _exchange(fields, dim, apart)
        turned = _turn(fields.view(1, WORDS, -1), TURN[bits])
        words[tile : tile + 1, part] = turned.transpose(1, 2)  # of a matrix torch would go by blocks: twice the time
    return words


def from_tiles(words: Tensor, bits: int, outputs: int) -> Tensor:
    """int32 [tiles * 16, outputs]: `to_tiles` undone, without the outputs that were added."""
    qweight = words.new_empty(len(words) * WORDS, outputs)
    for tile, part in _pieces(len(words), outputs):
        piece = words[tile : tile + 1, part].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        into = _by_digits(qweight[tile * WORDS : (tile + 1) * WORDS, part], bits)
        fields = _turn(piece, -TURN[bits]).view(into.shape)
        for dim, apart in reversed(_EXCHANGES[bits]):
            _exchange(fields, dim, apart)
        into.copy_(fields)
    return qweight


def permute_inputs(qweight: Tensor, bits: int, places: Tensor) -> Tensor:
    """The rows of levels that `qweight` [rows, outputs] packs in another order: level i is what was level places[i]."""
    in_word = 32 // bits
    words = torch.empty_like(qweight)
    for first in range(0, len(words), WORDS):
        part = words[first : first + WORDS].zero_()
        by_field = places[first * in_word : (first + WORDS) * in_word].long().view(-1, in_word).t()
        for field, source in enumerate(by_field):
            level = qweight[source // in_word]
            level >>= (source % in_word * bits).int().unsqueeze(1)
            level &= 2**bits - 1
            level <<= bits * field
            part |= level
    return words


def _pieces(tiles: int, outputs: int) -> Iterator[tuple[int, slice]]:
    """Tile by tile, some outputs at a time."""
    for tile in range(tiles):
        for first in range(0, outputs, _AT_ONCE):
            yield tile, slice(first, min(first + _AT_ONCE, outputs))


def _by_digits(rows: Tensor, bits: int) -> Tensor:
    """Rows [16, n] as [r3 r2, j0, j1, n], of 8 bits [r3 r2 r1, j, n]: what comes to be r1 and r0 stands last."""
    digits = _DIGITS[bits]
    apart = rows.view(*[2] * digits, WORDS >> digits, rows.shape[1])
    return apart.movedim(tuple(range(digits)), tuple(range(digits, 0, -1)))


def _exchange(fields: Tensor, dim: int, apart: int) -> None:
    """Swap, in place, fields `apart` bits up in the words whose digit `dim` is 0 with the lower ones where it is 1."""
    zero, one = fields.unbind(dim)
    moved = zero >> apart
    moved ^= one
    moved &= (2**32 - 1) // (2**apart + 1)  # every second run of so many bits, the lowest first
    one ^= moved
    moved <<= apart
    zero ^= moved


def _turn(words: Tensor, by: int) -> Tensor:
    """int32 words turned left, in place, by so many bits, or right where it is negative."""
    by %= 32
    if by:
        top = words >> (32 - by)
        top &= 2**by - 1
        words <<= by
        words |= top
    return words
