"""Decode attention over an int8 cache: values need no conversion; scales are applied to scores and weights."""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.attention.decode_kv_fp16 import share_of_keys, visible_keys
from qvl_kernels.triton.attention.kv_tiles import ROUND, bytes_as_floats, max_or_nan, scales_at
from qvl_kernels.triton.attention.new_token import cache_new_token, new_query
from qvl_kernels.triton.dependent import begin

PLANES = tl.constexpr(4)  # of 7 bits: what a float32 has
COLUMNS = tl.constexpr(8)  # the fewest that a dot accepts


@triton.jit
def split_into_planes(q):
    """Values int8 [d, COLUMNS], factors float32 [COLUMNS] such that q [d] is the sum over j of values[:, j] factors[j].

    The first PLANES columns hold 7 bits each of q over its largest element, the rest zeros.
    """
    largest = tl.reduce(tl.abs(q), 0, max_or_nan)
    rest = q * tl.where(largest > 0, 127.0 / largest, 0.0)
    plane = tl.arange(0, COLUMNS)
    values = tl.zeros([COLUMNS, q.shape[0]], tl.float32)
    for j in tl.static_range(PLANES):
        value = (rest + ROUND) - ROUND
        values = tl.where((plane == j)[:, None], value[None, :], values)
        rest = (rest - value) * 128.0
    return values.to(tl.int8), tl.exp2(plane * -7.0) * (largest / 127.0)


@triton.jit(
    do_not_specialize=["rows", "most_blocks", "pieces", "first_query"],
    # read a word at a time, from anywhere, as rows of tables of any width
    do_not_specialize_on_alignment=["tables_ptr", "queries_ptr", "lengths_ptr", "slots_ptr", "logn_ptr"],
)
def decode_kv_int8_kernel(
    q_ptr, cos_ptr, sin_ptr, logn_ptr, slots_ptr,
    k_cache_ptr, v_cache_ptr, tables_ptr, queries_ptr, lengths_ptr, partial_ptr, lse_ptr,
    rows, H, most_blocks, pieces, first_query, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr,
    NEW: tl.constexpr, FLOAT: tl.constexpr, SUMS: tl.constexpr, ROTARY_HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`decode_kv_fp16_kernel` for caches int8 [blocks, H, BLOCK_SIZE, D + 4] in the layout of `kv_tiles`.

    Two blocks of the cache at a time. Keys stay int8: q is split into planes of 7 bits, and tensor cores multiply both
    exactly. Values are added with an offset of 128, which is subtracted once for all the keys of a thread.
    """
    begin(PDL)
    head, piece, local = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, request, length = visible_keys(queries_ptr, lengths_ptr, local + first_query, LISTED)
    KEYS: tl.constexpr = 2 * BLOCK_SIZE
    first, last = share_of_keys(length, piece, KEYS, 1)
    if first < last:
        column, word, key = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D // 4), tl.arange(0, KEYS)
        slot = key % BLOCK_SIZE
        if NEW:
            q = new_query(q_ptr, cos_ptr, sin_ptr, logn_ptr, row, head, rows, H, FLOAT, SUMS, D, BLOCK_D, ROTARY_HALF)
            if last * KEYS >= length:
                cache_new_token(
                    q_ptr, cos_ptr, sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, row, head, rows, H,
                    FLOAT, SUMS, D, BLOCK_D, BLOCK_SIZE, ROTARY_HALF,
                )  # fmt: skip
        else:
            q_at = (row.to(tl.int64) * H + head) * D
            q = tl.load(q_ptr + q_at + column, column < D, 0.0).to(tl.float32)
        planes, factors = split_into_planes(q * scale)
        v_words_ptr = v_cache_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        top = tl.full([], float("-inf"), tl.float32)
        mass = tl.zeros([KEYS], tl.float32)
        raised = tl.zeros([KEYS], tl.float32)
        total_0 = tl.zeros([ROWS, BLOCK_D // 4], tl.float32)
        total_1, total_2, total_3 = total_0, total_0, total_0
        for tile in range(first, last):
            table = tables_ptr + request.to(tl.int64) * most_blocks + 2 * tile
            page, next_page = tl.load(table), tl.load(table + 1, tile * KEYS + BLOCK_SIZE < length, 0)
            at = tl.where(key < BLOCK_SIZE, page, next_page).to(tl.int64) * H + head
            start = at * (BLOCK_SIZE * (D + 4))
            written = tile * KEYS + key < length
            k = tl.load(k_cache_ptr + (start + slot * D)[:, None] + column[None, :], (column < D)[None, :], 0)
            k_scale = tl.load(scales_at(k_cache_ptr, start, D, BLOCK_SIZE) + slot, written, 0.0)
            v_scale = tl.load(scales_at(v_cache_ptr, start, D, BLOCK_SIZE) + slot, written, 0.0)

            products = tl.dot(k, tl.trans(planes), out_dtype=tl.int32).to(tl.float32)
            scores = tl.where(written, tl.sum(products * factors[None, :], 1) * k_scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            weights, fade = tl.exp2(scores - higher), tl.exp2(top - higher)
            mass = mass * fade + weights
            weights *= v_scale * 2.0**100
            raised = raised * fade + weights
            total_0, total_1, total_2, total_3 = total_0 * fade, total_1 * fade, total_2 * fade, total_3 * fade
            for part in tl.static_range(KEYS // ROWS):
                part_key = part * ROWS + tl.arange(0, ROWS)
                part_page = page if part * ROWS < BLOCK_SIZE else next_page
                at_words = (part_page * H + head) * (BLOCK_SIZE * (D + 4) // 4) + part_key % BLOCK_SIZE * (D // 4)
                v = tl.load(v_words_ptr + at_words[:, None] + word[None, :], (word < D // 4)[None, :], 0) ^ 0x80808080
                weight = tl.gather(weights, part_key, 0)[:, None]
                total_0 += weight * bytes_as_floats(v, 0)
                total_1 += weight * bytes_as_floats(v, 1)
                total_2 += weight * bytes_as_floats(v, 2)
                total_3 += weight * bytes_as_floats(v, 3)
            top = higher
        at = (local.to(tl.int64) * H + head) * pieces + piece
        whole = tl.sum(mass, 0)
        factor = 2.0**49 / whole
        off = tl.sum(raised, 0) * (2.0 ** (7 - 100) / whole)
        out = partial_ptr + at * D + 4 * word
        tl.store(out, tl.sum(total_0, 0) * factor - off, word < D // 4)
        tl.store(out + 1, tl.sum(total_1, 0) * (factor * 2.0**-8) - off, word < D // 4)
        tl.store(out + 2, tl.sum(total_2, 0) * (factor * 2.0**-16) - off, word < D // 4)
        tl.store(out + 3, tl.sum(total_3, 0) * factor - off, word < D // 4)
        tl.store(lse_ptr + at, top + tl.log2(whole))
