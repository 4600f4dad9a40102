"""The newest token of a request inside decode attention: rotate its query and key, and cache its key and value."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.attention.kv_tiles import max_or_nan, round_to_int8, scales_at
from qvl_kernels.triton.partial_sums import load_sum


@triton.jit
def new_channels(
    qkv_ptr, cos_ptr, sin_ptr, row, head, rows, H,
    FLOAT: tl.constexpr, PART: tl.constexpr, SUMS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
):  # fmt: skip
    """Channels float32 [BLOCK_D] of q, k or v (PART 0 to 2) of a row and head, rounded to FLOAT; zeros past D.

    q and k are rotated, and rounded again, as `rotary_kernel` does it. qkv [SUMS or 1, rows, 3, H, D], SUMS 0: whole.
    """
    column = tl.arange(0, BLOCK_D)
    at = ((row.to(tl.int64) * 3 + PART) * H + head) * D
    stride = rows.to(tl.int64) * 3 * H * D
    x = load_sum(qkv_ptr, at + column, stride, column < D, FLOAT, SUMS)
    if PART < 2:
        rotates, lower = column < 2 * ROTARY_HALF, column < ROTARY_HALF
        partner = tl.where(lower, column + ROTARY_HALF, column - ROTARY_HALF)
        other = load_sum(qkv_ptr, at + partner, stride, rotates, FLOAT, SUMS)
        table = row.to(tl.int64) * 2 * ROTARY_HALF + column
        cos, sin = tl.load(cos_ptr + table, rotates, 1.0), tl.load(sin_ptr + table, rotates, 0.0)
        x = tl.fma(x, cos, tl.where(lower, -other, other) * sin).to(FLOAT).to(tl.float32)
    return x


@triton.jit
def new_query(
    qkv_ptr, cos_ptr, sin_ptr, logn_ptr, row, head, rows, H,
    FLOAT: tl.constexpr, SUMS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY_HALF: tl.constexpr,
):  # fmt: skip
    """The rotated query float32 [BLOCK_D] times log-n, rounded to FLOAT."""
    q = new_channels(qkv_ptr, cos_ptr, sin_ptr, row, head, rows, H, FLOAT, 0, SUMS, D, BLOCK_D, ROTARY_HALF)
    return (q * tl.load(logn_ptr + row).to(FLOAT).to(tl.float32)).to(FLOAT).to(tl.float32)


@triton.jit
def store_vector(cache_ptr, slot, head, H, x, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x [BLOCK_D] into a slot of a cache of floats [blocks, H, BLOCK_SIZE, D], or int8 as `kv_tiles` has it."""
    column = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    WIDTH: tl.constexpr = D + 4 if dtype == tl.int8 else D
    start = (slot // BLOCK_SIZE * H + head) * (BLOCK_SIZE * WIDTH)
    inside = (column < D) & (slot >= 0)  # a slot below 0 is stored nowhere
    if dtype == tl.int8:
        top = tl.reduce(tl.abs(x), 0, max_or_nan)
        tl.store(scales_at(cache_ptr, start, D, BLOCK_SIZE) + slot % BLOCK_SIZE, top * (1 / 127), slot >= 0)
        code = round_to_int8(x, tl.where(top > 0, 127.0 / top, 0.0))
        tl.store(cache_ptr + start + slot % BLOCK_SIZE * D + column, code, inside)
    else:
        tl.store(cache_ptr + start + slot % BLOCK_SIZE * D + column, x.to(dtype), inside)


@triton.jit
def cache_new_token(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, row, head, rows, H,
    FLOAT: tl.constexpr, SUMS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
):  # fmt: skip
    """Store the token's rotated key and its value, and make them visible to the loads of this program that follow."""
    slot = tl.load(slots_ptr + row)
    k = new_channels(qkv_ptr, cos_ptr, sin_ptr, row, head, rows, H, FLOAT, 1, SUMS, D, BLOCK_D, ROTARY_HALF)
    v = new_channels(qkv_ptr, cos_ptr, sin_ptr, row, head, rows, H, FLOAT, 2, SUMS, D, BLOCK_D, ROTARY_HALF)
    store_vector(k_cache_ptr, slot, head, H, k, D, BLOCK_SIZE, BLOCK_D)
    store_vector(v_cache_ptr, slot, head, H, v, D, BLOCK_SIZE, BLOCK_D)
    tl.debug_barrier()
