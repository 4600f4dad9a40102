"""Causal attention of many new rows of each request over its paged cache: flash attention on tiles of rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import cache_width
from qvl_kernels.triton.attention.kv_tiles import load_tile
from qvl_kernels.triton.attention.prefill_kv_int8 import LIFT, prefill_kv_int8_kernel
from qvl_kernels.triton.attention.prefill_tiles import tiles_on_device
from qvl_kernels.triton.attention.softmax import LOG2E, attend
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.util import cdiv


@triton.jit(
    do_not_specialize=["most_blocks"],
    # read a word at a time, from anywhere, as rows of tables of any width
    do_not_specialize_on_alignment=["tables_ptr", "tiles_ptr"],
)
def prefill_kv_fp16_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, tiles_ptr, out_ptr,
    H, most_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(d)) v over the keys at or before each row, for one tile of rows and one head.

    q, out [n, H, D]; caches [blocks, H, BLOCK_SIZE, D]; tables [R, most_blocks]; tiles int32 [T, 4]: request, first
    row, rows, position of the first row. Whole tiles of keys before the first row need no mask; then come those on the
    diagonal, where nothing past the last row is read, as it is not written yet.
    """
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    head = tl.program_id(1)
    request, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1).to(tl.int64)
    rows, position = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    columns = (column < D)[None, :]
    inside = (row < rows)[:, None] & columns
    at = ((first + row[:, None]) * H + head) * D + column[None, :]
    q = tl.load(q_ptr + at, inside, 0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slots = tl.arange(0, BLOCK_N)
    seen = (position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, seen, BLOCK_N):
        key = start + slots
        page = tl.load(tables_ptr + request * most_blocks + key // BLOCK_SIZE).to(tl.int64)
        place, slot = (page * H + head) * (BLOCK_SIZE * D), key % BLOCK_SIZE
        every = key >= 0
        k = load_tile(k_cache_ptr, place, slot, every, columns, q.dtype, D)
        v = load_tile(v_cache_ptr, place, slot, every, columns, q.dtype, D)
        top, mass, total = attend(q, k, v, top, mass, total, scale, True, False)
    for start in range(seen, position + rows, BLOCK_N):
        key = start + slots
        written = key < position + rows
        page = tl.load(tables_ptr + request * most_blocks + key // BLOCK_SIZE, written, 0).to(tl.int64)
        place, slot = (page * H + head) * (BLOCK_SIZE * D), key % BLOCK_SIZE
        k = load_tile(k_cache_ptr, place, slot, written, columns, q.dtype, D)
        v = load_tile(v_cache_ptr, place, slot, written, columns, q.dtype, D)
        visible = key[None, :] <= position + row[:, None]
        top, mass, total = attend(q, k, v, top, mass, total, scale, visible, True)
    tl.store(out_ptr + at, (total / mass[:, None]).to(out_ptr.dtype.element_ty), inside)


class Configuration(NamedTuple):
    """Tile sizes and resources."""

    rows: int  # of a tile
    keys: int
    warps: int
    stages: int


def configuration(capability: int, rows: int, head_dim: int, dtype: torch.dtype, int8: bool) -> Configuration:
    """rows: the most that a request has; dtype: of q; int8: whether the cache is.

    The widest tiles that do not spill on any supported Triton: on sm_80 16 rows a warp with 32 keys. An int8 cache uses
    more keys there, so that the total, which has four parts, is updated less often, and half the rows, so that two
    programs fit on an SM.
    """
    if rows <= 16:
        return Configuration(16, 64 if head_dim <= 128 else 32, 4, 2)
    if head_dim > 128 or dtype == torch.float32:
        return Configuration(64, 32, 8, 2)
    if capability >= 90:
        return Configuration(128, 64, 8, 2)
    return Configuration(64, 64, 4, 2) if int8 else Configuration(128, 32, 8, 2)


@lru_cache(maxsize=16)
def tiles_of(
    requests: tuple[int, ...],
    query_starts: tuple[int, ...],
    context_lens: tuple[int, ...],
    block: int,
    device: torch.device,
) -> Tensor:
    """The tiles of these requests, int32 [T, 4], those with the most keys first: they take longest.

    Cached by value, so that the layers of a step upload one table between them.
    """
    tiles = []
    for r in requests:
        start, end = query_starts[r], query_starts[r + 1]
        before = context_lens[r] - (end - start)
        tiles += [(r, at, min(block, end - at), before + at - start) for at in range(start, end, block)]
    tiles.sort(key=lambda tile: -tile[3] - tile[2])
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 4)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    requests: Sequence[int],
    query_starts: Sequence[int],
    context_lens: Sequence[int],
    capability: int,
    out: Tensor,
) -> Launch:
    """The launch for some requests of a checked `paged_attention`; it writes their rows of out [n, H, d]."""
    most = max((query_starts[r + 1] - query_starts[r] for r in requests), default=0)
    choice = configuration(capability, most, q.shape[-1], q.dtype, k_cache.dtype == torch.int8)
    tiles = tiles_of(tuple(requests), tuple(query_starts), tuple(context_lens), choice.rows, q.device)
    return _plan(q, k_cache, v_cache, block_tables, tiles, choice, out)


def prefill_on_device(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    capability: int,
    out: Tensor,
) -> Launch:
    """`prefill` of requests whose starts and lengths are on the device: the launch depends on n and R alone."""
    choice = configuration(capability, len(q), q.shape[-1], q.dtype, k_cache.dtype == torch.int8)
    tiles = tiles_on_device(query_starts, context_lens, len(q), choice.rows)
    return _plan(q, k_cache, v_cache, block_tables, tiles, choice, out)


def _plan(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, tiles: Tensor, choice: Configuration, out: Tensor
) -> Launch:
    _, heads, head_dim = q.shape
    int8 = k_cache.dtype == torch.int8
    arguments = {
        "q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "tables_ptr": block_tables, "tiles_ptr": tiles,
        "out_ptr": out, "H": heads, "most_blocks": block_tables.shape[1], "scale": LOG2E * head_dim**-0.5,
    }  # fmt: skip
    constants = {
        "D": head_dim, "BLOCK_D": max(64 if int8 else 16, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": k_cache.shape[2], "BLOCK_M": choice.rows, "BLOCK_N": choice.keys,
    }  # fmt: skip
    grid = len(tiles), heads
    if int8:
        return Launch(prefill_kv_int8_kernel, grid, {**arguments, "lift": LIFT}, constants, choice.warps, choice.stages)
    return Launch(prefill_kv_fp16_kernel, grid, arguments, constants, choice.warps, choice.stages)


def aot_specs(capability: int) -> list[Spec]:
    """A prompt of 2048 tokens, 32 heads of 128, in both caches; 16 rows of one with 2048."""
    specs = []
    for rows, cache_dtype in ((2048, torch.bfloat16), (2048, torch.int8), (16, torch.bfloat16)):
        q = torch.empty(rows, 32, 128, dtype=torch.bfloat16, device="meta")
        cache = q.new_empty(512, 32, 16, cache_width(128, cache_dtype), dtype=cache_dtype)
        tables = q.new_empty(1, 128, dtype=torch.int64)
        choice = configuration(capability, rows, 128, q.dtype, cache_dtype == torch.int8)
        tiles = q.new_empty(cdiv(rows, choice.rows), 4, dtype=torch.int32)
        name = f"prefill attention, {rows} rows, {'int8' if cache_dtype == torch.int8 else '16-bit'} KV"
        stored = 2 * 2048 * 32 * cache.shape[-1] * cache.element_size()
        keys = (2048 - rows) + rows / 2  # that a row sees on average
        launch = _plan(q, cache, cache, tables, tiles, choice, q)
        specs.append(
            Spec(name, launch, 2 * q.nbytes + stored, loop_trips=keys / choice.keys, flops=int(4 * rows * keys * 4096))
        )
    return specs
