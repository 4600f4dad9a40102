"""Prefill attention over an int8 cache: a program converts each tile of keys and values to 16-bit floats once.

With a conversion in every warp, the compiler's choice, the bound of an A100 for 2048 tokens is 401 us, not 149.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.attention.kv_tiles import bytes_as_floats, scales_at
from qvl_kernels.triton.attention.softmax import softmax_step

# An argument of the kernel, not a constant: a run-time scalar between load and dot makes the compiler pass the floats
# through shared memory instead of the bytes.
LIFT = 2.0**126


@triton.jit
def load_planes(
    cache_ptr, start, slot, keys, lift, dtype: tl.constexpr, D, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Channels 4 w, 4 w + 1, 4 w + 2 and 4 w + 3 of the vectors at `slot` [N]: four times [N, BLOCK_D / 4] in dtype.

    start [N]: elements of the cache before the block. 0 where not keys. The rounding is that of
    `reference.from_cached`: a value, with 128 added, times 2^-23 is exact.
    """
    word = tl.arange(0, BLOCK_D // 4)
    at = cache_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + ((start + slot * D) // 4)[:, None] + word[None, :]
    words = tl.load(at, keys[:, None] & (word < D // 4)[None, :], 0) ^ 0x80808080
    scale = tl.load(scales_at(cache_ptr, start, D, BLOCK_SIZE) + slot, keys, 0.0)[:, None]
    times, off = scale * 2.0**23, scale * 128.0
    x_0 = (bytes_as_floats(words, 0) * lift * times - off).to(dtype)
    x_1 = (bytes_as_floats(words, 1) * (lift * 2.0**-8) * times - off).to(dtype)
    x_2 = (bytes_as_floats(words, 2) * (lift * 2.0**-16) * times - off).to(dtype)
    x_3 = (bytes_as_floats(words, 3) * lift * times - off).to(dtype)
    return x_0, x_1, x_2, x_3


@triton.jit(
    do_not_specialize=["most_blocks"],
    # read a word at a time, from anywhere, as rows of tables of any width
    do_not_specialize_on_alignment=["tables_ptr", "tiles_ptr"],
)
def prefill_kv_int8_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, tiles_ptr, out_ptr,
    H, most_blocks, scale, lift,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`prefill_kv_fp16_kernel` for caches int8 [blocks, H, BLOCK_SIZE, D + 4] in the layout of `kv_tiles`; lift: LIFT.

    Every fourth channel forms a plane, in q and out too, so that the bytes of a word never move.
    """
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    head = tl.program_id(1)
    request, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1).to(tl.int64)
    rows, position = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    row, word = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D // 4)
    inside = (row < rows)[:, None] & (word < D // 4)[None, :]
    at = ((first + row[:, None]) * H + head) * D + 4 * word[None, :]
    q_0, q_1 = tl.load(q_ptr + at, inside, 0.0), tl.load(q_ptr + at + 1, inside, 0.0)
    q_2, q_3 = tl.load(q_ptr + at + 2, inside, 0.0), tl.load(q_ptr + at + 3, inside, 0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total_0 = tl.zeros([BLOCK_M, BLOCK_D // 4], tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    slots = tl.arange(0, BLOCK_N)
    seen = (position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, seen, BLOCK_N):
        key = start + slots
        page = tl.load(tables_ptr + request * most_blocks + key // BLOCK_SIZE).to(tl.int64)
        place = (page * H + head) * (BLOCK_SIZE * (D + 4))
        k = load_planes(k_cache_ptr, place, key % BLOCK_SIZE, key >= 0, lift, q_0.dtype, D, BLOCK_D, BLOCK_SIZE)
        v = load_planes(v_cache_ptr, place, key % BLOCK_SIZE, key >= 0, lift, q_0.dtype, D, BLOCK_D, BLOCK_SIZE)
        scores = dot_planes(q_0, q_1, q_2, q_3, k) * scale
        top, mass, weights, fade = softmax_step(scores, top, mass, True, False)
        total_0, total_1, total_2, total_3 = accumulate_planes(weights, fade, v, total_0, total_1, total_2, total_3)
    for start in range(seen, position + rows, BLOCK_N):
        key = start + slots
        written = key < position + rows
        page = tl.load(tables_ptr + request * most_blocks + key // BLOCK_SIZE, written, 0).to(tl.int64)
        place = (page * H + head) * (BLOCK_SIZE * (D + 4))
        k = load_planes(k_cache_ptr, place, key % BLOCK_SIZE, written, lift, q_0.dtype, D, BLOCK_D, BLOCK_SIZE)
        v = load_planes(v_cache_ptr, place, key % BLOCK_SIZE, written, lift, q_0.dtype, D, BLOCK_D, BLOCK_SIZE)
        visible = key[None, :] <= position + row[:, None]
        scores = dot_planes(q_0, q_1, q_2, q_3, k) * scale
        top, mass, weights, fade = softmax_step(scores, top, mass, visible, True)
        total_0, total_1, total_2, total_3 = accumulate_planes(weights, fade, v, total_0, total_1, total_2, total_3)
    out = out_ptr + at
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out, (total_0 / mass[:, None]).to(dtype), inside)
    tl.store(out + 1, (total_1 / mass[:, None]).to(dtype), inside)
    tl.store(out + 2, (total_2 / mass[:, None]).to(dtype), inside)
    tl.store(out + 3, (total_3 / mass[:, None]).to(dtype), inside)


@triton.jit
def dot_planes(q_0, q_1, q_2, q_3, k):
    """q k^T [M, N], of the planes of both."""
    scores = tl.dot(q_0, tl.trans(k[0]), input_precision="ieee")
    scores = tl.dot(q_1, tl.trans(k[1]), scores, input_precision="ieee")
    scores = tl.dot(q_2, tl.trans(k[2]), scores, input_precision="ieee")
    return tl.dot(q_3, tl.trans(k[3]), scores, input_precision="ieee")


@triton.jit
def accumulate_planes(weights, fade, v, total_0, total_1, total_2, total_3):
    """The planes of total * fade + weights v."""
    rounded, fades = weights.to(v[0].dtype), fade[:, None]
    total_0 = tl.dot(rounded, v[0], total_0 * fades, input_precision="ieee")
    total_1 = tl.dot(rounded, v[1], total_1 * fades, input_precision="ieee")
    total_2 = tl.dot(rounded, v[2], total_2 * fades, input_precision="ieee")
    total_3 = tl.dot(rounded, v[3], total_3 * fades, input_precision="ieee")
    return total_0, total_1, total_2, total_3
