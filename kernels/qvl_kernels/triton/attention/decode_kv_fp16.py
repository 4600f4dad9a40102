"""Decode attention over a 16-bit (or float32) cache, on the CUDA cores."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.attention.kv_tiles import load_tile


@triton.jit
def visible_keys(queries_ptr, lengths_ptr, query, LISTED: tl.constexpr):
    """Row of q, request and number of keys of a query: listed in int32 [m, 3], or row r of request r with lengths."""
    if LISTED:
        listed = queries_ptr + 3 * query
        return tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    return query, query, tl.load(lengths_ptr + query).to(tl.int32)


@triton.jit
def decode_kv_fp16_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, queries_ptr, lengths_ptr, partial_ptr, lse_ptr,
    H, most_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, LISTED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """partial = softmax(q k^T / sqrt(d)) v over one split of the keys of one row and head; lse in base 2.

    q [n, H, D]; caches [blocks, H, BLOCK_SIZE, D]; tables [R, most_blocks]; partial float32 [m, H, SPLITS, D],
    lse float32 [m, H, SPLITS]. LISTED: queries int32 [m, 3] are row, request and number of visible keys; otherwise
    row r belongs to request r and lengths [m] are the keys. A split without keys has lse -inf and no partial result.

    One warp and one block of the cache at a time: its keys are one contiguous run. ROWS vectors are loaded by one
    instruction of a warp, so every ROWS-th vector is in the same thread, and those are added before anything else is
    done to them. No software pipeline: 12 warps fit on an SM, each with 8 KB of keys and values under way, and four
    stages of it cost 30 % more instructions and two thirds of those warps.
    """
    head, split, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, request, length = visible_keys(queries_ptr, lengths_ptr, query, LISTED)
    blocks = tl.cdiv(length, BLOCK_SIZE)
    share = tl.cdiv(blocks, SPLITS)
    first, last = split * share, tl.minimum((split + 1) * share, blocks)

    column, slot = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SIZE)
    columns = (column < D)[None, :]
    q = tl.load(q_ptr + (row.to(tl.int64) * H + head) * D + column, column < D, 0.0).to(tl.float32) * scale
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(first, last):
        page = tl.load(tables_ptr + request.to(tl.int64) * most_blocks + block).to(tl.int64)
        start = (page * H + head) * (BLOCK_SIZE * D)
        written = block * BLOCK_SIZE + slot < length
        k = load_tile(k_cache_ptr, start, slot, written, columns, tl.float32, D)
        v = load_tile(v_cache_ptr, start, slot, written, columns, tl.float32, D)
        scores = tl.where(written, tl.sum(q[None, :] * k, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights, fade = tl.exp2(scores - higher), tl.exp2(top - higher)
        mass = mass * fade + weights
        weighted = tl.reshape(weights[:, None] * v, BLOCK_SIZE // ROWS, ROWS, BLOCK_D)
        total = total * fade + tl.sum(weighted, 0)
        top = higher
    at = (query.to(tl.int64) * H + head) * SPLITS + split
    if first < last:
        whole = tl.sum(mass, 0)
        tl.store(partial_ptr + at * D + column, tl.sum(total, 0) / whole, column < D)
        tl.store(lse_ptr + at, top + tl.log2(whole))
    else:
        tl.store(lse_ptr + at, float("-inf"))
