"""Sets of token ids as bitsets: bit t % 32 of word t // 32 says whether token t is in the set.

A bitset is an int32 array [ceil(vocab / 32)] of numpy, the form that the samplers' kernels read and that llguidance
fills: 19 KB for the published vocabulary, where a row of floats has 608 KB. Bits past the vocabulary are 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qvl_kernels.util import cdiv

Mask = NDArray[np.int32]


def none_of(vocab: int) -> Mask:
    """Return the empty set."""
    return np.zeros(cdiv(vocab, 32), np.int32)


def all_of(vocab: int) -> Mask:
    """Return the set of all tokens of a vocabulary."""
    return first_of(vocab, vocab)


def first_of(count: int, vocab: int) -> Mask:
    """Return the set of the first `count` tokens of a vocabulary."""
    mask = none_of(vocab)
    mask[: count // 32] = -1
    if count % 32:
        mask[count // 32] = (1 << count % 32) - 1
    return mask


def mask_of(token_ids: Iterable[int], vocab: int) -> Mask:
    """Return the set of these tokens."""
    mask = none_of(vocab)
    add(mask, token_ids)
    return mask


def add(mask: Mask, token_ids: Iterable[int]) -> None:
    """Add tokens to a set."""
    words = mask.view(np.uint32)  # bit 31 is the sign of an int32
    for token in token_ids:
        words[token >> 5] |= np.uint32(1 << (token & 31))


def remove(mask: Mask, token_ids: Iterable[int]) -> None:
    """Remove tokens from a set."""
    words = mask.view(np.uint32)
    for token in token_ids:
        words[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)


def holds(mask: Mask, token: int) -> bool:
    """Whether a token is in a set."""
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


def tokens_of(mask: Mask) -> NDArray[np.int64]:
    """Return the tokens of a set, in order."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
