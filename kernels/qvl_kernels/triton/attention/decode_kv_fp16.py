"""Decode attention over a 16-bit (or float32) cache, on the CUDA cores."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.attention.kv_tiles import load_tile
from qvl_kernels.triton.attention.new_token import cache_new_token, new_query
from qvl_kernels.triton.dependent import begin

PIECES = tl.constexpr(32)  # of the keys of a row, at most


@triton.jit
def visible_keys(queries_ptr, lengths_ptr, query, LISTED: tl.constexpr):
    """Row of q, request and number of keys of a query: listed in int32 [m, 3], or row r of request r with lengths."""
    if LISTED:
        listed = queries_ptr + 3 * query
        return tl.load(listed), tl.load(listed + 1), tl.load(listed + 2)
    return query, query, tl.load(lengths_ptr + query).to(tl.int32)


@triton.jit
def share_of_keys(length, piece, UNIT: tl.constexpr, LEAST: tl.constexpr):
    """First unit of UNIT keys of a piece, and the first past it: equal pieces of at least LEAST units, by length alone.

    So a row's sums are taken in the same order whatever else is in the step. A piece past the last is empty.
    """
    units = tl.cdiv(length, UNIT)
    share = tl.maximum(tl.cdiv(units, PIECES), LEAST)
    return piece * share, tl.minimum((piece + 1) * share, units)


@triton.jit(
    do_not_specialize=["rows", "most_blocks", "pieces", "first_query"],
    # read a word at a time, from anywhere, as rows of tables of any width
    do_not_specialize_on_alignment=["tables_ptr", "queries_ptr", "lengths_ptr", "slots_ptr", "logn_ptr"],
)
def decode_kv_fp16_kernel(
    q_ptr, cos_ptr, sin_ptr, logn_ptr, slots_ptr,
    k_cache_ptr, v_cache_ptr, tables_ptr, queries_ptr, lengths_ptr, partial_ptr, lse_ptr,
    rows, H, most_blocks, pieces, first_query, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr,
    NEW: tl.constexpr, FLOAT: tl.constexpr, SUMS: tl.constexpr, ROTARY_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """partial = softmax(q k^T / sqrt(d)) v over one piece of the keys of one row and head; lse in base 2.

    q [n, H, D]; caches [blocks, H, BLOCK_SIZE, D]; tables [R, most_blocks]; partial float32 [m, H, pieces, D],
    lse float32 [m, H, pieces], of m queries from first_query on. LISTED: queries int32 [.., 3] are row, request and
    number of visible keys; otherwise row r belongs to request r and lengths [n] are the keys. An empty piece has no
    result. NEW: q is qkv as in `new_channels`, and the program with the last keys first stores the row's own.

    One warp and one block of the cache at a time: its keys are one contiguous run. ROWS vectors are loaded by one
    instruction of a warp, so every ROWS-th vector is in the same thread, and those are added before anything else is
    done to them. No software pipeline: 12 warps fit on an SM, each with 8 KB of keys and values under way, and four
    stages of it cost 30 % more instructions and two thirds of those warps.
    """
    begin(PDL)
    head, piece, local = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, request, length = visible_keys(queries_ptr, lengths_ptr, local + first_query, LISTED)
    first, last = share_of_keys(length, piece, BLOCK_SIZE, 2)
    if first < last:
        column, slot = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SIZE)
        columns = (column < D)[None, :]
        if NEW:
            q = new_query(q_ptr, cos_ptr, sin_ptr, logn_ptr, row, head, rows, H, FLOAT, SUMS, D, BLOCK_D, ROTARY_HALF)
            if last * BLOCK_SIZE >= length:
                cache_new_token(
                    q_ptr, cos_ptr, sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, row, head, rows, H,
                    FLOAT, SUMS, D, BLOCK_D, BLOCK_SIZE, ROTARY_HALF,
                )  # fmt: skip
        else:
            q_at = (row.to(tl.int64) * H + head) * D
            q = tl.load(q_ptr + q_at + column, column < D, 0.0).to(tl.float32)
        q *= scale
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
        at = (local.to(tl.int64) * H + head) * pieces + piece
        whole = tl.sum(mass, 0)
        tl.store(partial_ptr + at * D + column, tl.sum(total, 0) / whole, column < D)
        tl.store(lse_ptr + at, top + tl.log2(whole))
