"""The layout of keys and values in a block of the paged cache, and loads from it.

A block of one head holds BLOCK_SIZE vectors of D channels one after another, and in int8 then their float32 scales: the
bytes of `reference.to_cached` in another order. A scale after each vector would align the next one to 4
bytes only, and 128-bit loads would be impossible.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.reference import SCALE_BYTES

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to a whole number, ties to even


def to_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.to_cached` of whole blocks of vectors [.., block_size, d], as these kernels read them."""
    return by_block(reference.to_cached(x, dtype))


def from_cached(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.from_cached` of whole blocks [.., block_size, width], as these kernels read them."""
    return reference.from_cached(by_vector(stored), dtype)


def by_block(stored: Tensor) -> Tensor:
    """Whole blocks [.., block_size, width] as `reference` has them, reordered for these kernels."""
    if stored.dtype != torch.int8:
        return stored
    parts = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:]
    return torch.cat([part.flatten(-2) for part in parts], -1).view(stored.shape)


def by_vector(stored: Tensor) -> Tensor:
    """The inverse of `by_block`."""
    if stored.dtype != torch.int8:
        return stored
    slots, dim, block = stored.shape[-2], stored.shape[-1] - SCALE_BYTES, stored.flatten(-2)
    values, scales = block[..., : slots * dim], block[..., slots * dim :]
    return torch.cat([values.unflatten(-1, (slots, dim)), scales.unflatten(-1, (slots, SCALE_BYTES))], -1)


@triton.jit
def scales_at(cache_ptr, start, D: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Pointers to the scales of an int8 block that starts at element `start` of the cache."""
    return (cache_ptr + start + BLOCK_SIZE * D).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def load_tile(cache_ptr, start, slot, keys, columns, dtype: tl.constexpr, D: tl.constexpr):
    """Vectors [N, BLOCK_D] in dtype of slot [N] of the blocks that start at `start`; zeros where not keys or columns.

    start is [N], or one for all; the cache holds floats.
    """
    at = cache_ptr + (start + slot * D)[:, None] + tl.arange(0, columns.shape[1])[None, :]
    return tl.load(at, keys[:, None] & columns, 0).to(dtype)


@triton.jit
def bytes_as_floats(words, BYTE: tl.constexpr):
    """Byte BYTE of words uint32 as float32: times 2^-149, and times 2^8 and 2^16 for bytes 1 and 2.

    Whole numbers below 2^24 are the bits of float32 numbers in steps of 2^-149, most of them subnormal, which a
    multiplication takes as fast as any. A conversion of integers runs at 16 lanes a clock, a quarter of a mask's rate.
    """
    return (words >> 24 if BYTE == 3 else words & (0xFF << 8 * BYTE)).to(tl.float32, bitcast=True)


@triton.jit
def max_or_nan(x, y):
    """max(x, y), or NaN if one of them is. `tl.max` loses NaN, and the int8 values of a lost one would be an answer."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_to_int8(x, factor):
    """x * factor rounded to int8: the low byte of the float32 after ROUND was added."""
    return (x * factor + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
