"""Permute the bits of GPTQ's `qweight` to the GPU layouts and back, without unpacking a code.

A word is an int32 of packed codes. A tile is 16 rows of `qweight`, which become 16 words of each output. In binary, an
input of a tile at 4 bits is j1 j0 r3 r2 r1 r0 h (see `layouts.gpu`). GPTQ stores it in row j1 j0 r3 r2, nibble r1 r0 h;
the kernels need it in word r3 r2 r1 r0, nibble h j1 j0. So three times a binary digit of the row is swapped with one of
the nibble: j0 with h, j1 with r0, and h, which is now in j0's position, with r1. At 8 bits an input is j r3 r2 r1 r0 h,
stored in row j r3 r2 r1 and byte r0 h, needed in word r3 r2 r1 r0 and byte h j: swap j with h, then h with r0.

Each swap is six operations on two rows of words, for all of their nibbles at once (Warren, Hacker's Delight, section
7-3, on transposing a matrix of bits). A word takes 7 ns on one core; unpacking code by code took 30 to 80 ns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.util import cdiv

WORDS = 16  # words of a tile for each output, and rows of qweight in a tile
ROTATION = {4: 3, 8: 0}  # bits that a word is rotated left by, for each number of bits of a code
# Words in a piece: on a CPU half a MiB, which with temporaries of half that size fit a core's cache; on a GPU, where
# each of some ten operations is a launch of microseconds, 16 MiB: a linear of the model takes 50 launches, not 2,000.
_WORDS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 22}
# The digits to swap: a dimension of rows [rest, 2, 2, outputs] (at 8 bits [rest, 2, outputs]), and the distance in bits
# between two fields of a word whose numbers differ only in the other digit.
_SWAPS = {4: ((1, 4), (2, 8), (1, 16)), 8: ((1, 8), (1, 16))}
_DIGITS = {4: 2, 8: 1}  # digits of a row's number that are swapped: the highest


def to_tiles(qweight: Tensor, bits: int, outputs: int) -> Tensor:
    """Convert `qweight` [rows, N] to int32 words [tiles, outputs, 16], padding rows and outputs with zeros."""
    rows, unpadded = qweight.shape
    words = qweight.new_empty(cdiv(rows, WORDS), outputs, WORDS)
    words[:, unpadded:] = 0
    for tiles, part in _pieces(words, unpadded):
        piece = qweight[tiles.start * WORDS : tiles.stop * WORDS, part]
        missing = (tiles.stop - tiles.start) * WORDS - len(piece)
        if missing:
            piece = F.pad(piece, (0, 0, 0, missing))
        fields = _by_digits(piece, bits).clone(memory_format=torch.contiguous_format)
        _swap_digits(fields.flatten(0, 1), _SWAPS[bits])
        rotated = _rotate_left(fields.view(-1, WORDS, fields.shape[-1]), ROTATION[bits])
        words[tiles, part] = rotated.transpose(1, 2)
    return words


def from_tiles(words: Tensor, bits: int, outputs: int) -> Tensor:
    """Invert `to_tiles`: int32 [tiles * 16, outputs], without the padded outputs."""
    qweight = words.new_empty(len(words) * WORDS, outputs)
    for tiles, part in _pieces(words, outputs):
        piece = words[tiles, part].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        into = _by_digits(qweight[tiles.start * WORDS : tiles.stop * WORDS, part], bits)
        fields = _rotate_left(piece, -ROTATION[bits]).view(into.shape)
        _swap_digits(fields.flatten(0, 1), reversed(_SWAPS[bits]))
        into.copy_(fields)
    return qweight


def permute_inputs(qweight: Tensor, bits: int, perm: Tensor) -> Tensor:
    """Permute the inputs of `qweight` [rows, outputs]: input i of the result is input perm[i]."""
    per_word = 32 // bits
    words = torch.empty_like(qweight)
    for first in range(0, len(words), WORDS):
        part = words[first : first + WORDS].zero_()
        by_field = perm[first * per_word : (first + WORDS) * per_word].long().view(-1, per_word).t()
        for field, source in enumerate(by_field):
            codes = qweight[source // per_word]
            codes >>= (source % per_word * bits).int().unsqueeze(1)
            codes &= 2**bits - 1
            codes <<= bits * field
            part |= codes
    return words


def _pieces(words: Tensor, outputs: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the tiles, each with slices of the outputs."""
    tiles, most = len(words), _WORDS_AT_ONCE["cpu" if words.device.type == "cpu" else "cuda"]
    wide = max(1, min(outputs, most // WORDS))
    high = max(1, most // (wide * WORDS)) if wide == outputs else 1
    for tile in range(0, tiles, high):
        for first in range(0, outputs, wide):
            yield slice(tile, min(tile + high, tiles)), slice(first, min(first + wide, outputs))


def _by_digits(rows: Tensor, bits: int) -> Tensor:
    """View rows [tiles * 16, n] as [tiles, r3 r2, j0, j1, n], at 8 bits [tiles, r3 r2 r1, j, n]: r1 and r0 are last."""
    digits = _DIGITS[bits]
    by_digit = rows.view(-1, *[2] * digits, WORDS >> digits, rows.shape[1])
    return by_digit.movedim(tuple(range(1, digits + 1)), tuple(range(digits + 1, 1, -1)))


def _swap_digits(fields: Tensor, swaps: Iterable[tuple[int, int]]) -> None:
    """Do the swaps in place, on [rest, 2, 2, n]."""
    for dim, distance in swaps:
        _swap(fields, dim, distance)


def _swap(fields: Tensor, dim: int, distance: int) -> None:
    """Swap in place the fields `distance` bits up in words whose digit `dim` is 0 with the lower ones if it is 1."""
    zero, one = fields.unbind(dim)
    moved = zero >> distance
    moved ^= one
    moved &= (2**32 - 1) // (2**distance + 1)  # every second run of `distance` bits, starting with the lowest
    one ^= moved
    moved <<= distance
    zero ^= moved


def _rotate_left(words: Tensor, bits: int) -> Tensor:
    """Rotate int32 words left by `bits`, in place, or right if `bits` is negative."""
    bits %= 32
    if bits:
        top = words >> (32 - bits)
        top &= 2**bits - 1
        words <<= bits
        words |= top
    return words
