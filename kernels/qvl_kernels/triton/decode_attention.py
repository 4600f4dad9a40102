"""Attention of single rows over their paged cache: keys split over programs, partial results merged afterwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import cache_width
from qvl_kernels.triton.kv_tiles import load_tile
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.triton.softmax import LOG2E

PROGRAMS = 1024  # one warp each: 8 to 10 on an SM of the GPUs that this is for, with 8 KB under way each
MOST_SPLITS = 32
LEAST_BLOCKS = 4  # of a split: fewer cost more in merging than they gain


@triton.jit
def decode_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, tables_ptr, queries_ptr, lengths_ptr, partial_ptr, lse_ptr,
    H, most_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, INT8: tl.constexpr,
    SPLITS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """partial = softmax(q k^T / sqrt(d)) v over one share of the keys of one row and head; lse in base 2.

    q [n, H, D]; caches [blocks, H, BLOCK_SIZE, WIDTH]; tables [R, most_blocks]; partial float32 [m, H, SPLITS, D],
    lse float32 [m, H, SPLITS]. LISTED: queries int32 [m, 3] are row, request and the keys it sees; otherwise row r
    belongs to request r and lengths [m] are the keys. A share without keys has lse -inf and no partial result.

    One warp and one block of the cache at a time: its keys are one contiguous run. The product with one query is
    multiplied and summed on the CUDA cores. No software pipeline: 12 warps fit on an SM, each with 8 KB of keys and
    values under way, and four stages of it cost 30 % more instructions and two thirds of those warps.
    """
    head, split, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LISTED:
        row, request = tl.load(queries_ptr + 3 * query), tl.load(queries_ptr + 3 * query + 1)
        length = tl.load(queries_ptr + 3 * query + 2)
    else:
        row, request, length = query, query, tl.load(lengths_ptr + query).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_SIZE), SPLITS)
    first, last = split * share, tl.minimum((split + 1) * share, tl.cdiv(length, BLOCK_SIZE))

    column, slot = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_SIZE)
    columns = (column < D)[None, :]
    q = tl.load(q_ptr + (row.to(tl.int64) * H + head) * D + column, column < D, 0.0).to(tl.float32) * scale
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    total = tl.zeros([BLOCK_SIZE, BLOCK_D], tl.float32)
    for block in range(first, last):
        page = tl.load(tables_ptr + request.to(tl.int64) * most_blocks + block).to(tl.int64)
        at = ((page * H + head) * BLOCK_SIZE + slot) * WIDTH
        written = block * BLOCK_SIZE + slot < length
        k = load_tile(k_cache_ptr, at, written, columns, tl.float32, D, INT8)
        v = load_tile(v_cache_ptr, at, written, columns, tl.float32, D, INT8)
        scores = tl.where(written, tl.sum(q[None, :] * k, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        weights, fade = tl.exp2(scores - higher), tl.exp2(top - higher)
        mass = mass * fade + weights
        total = total * fade + weights[:, None] * v
        top = higher
    at = (query.to(tl.int64) * H + head) * SPLITS + split
    if first < last:
        whole = tl.sum(mass, 0)
        out = tl.sum(total, 0) / whole
        tl.store(partial_ptr + at * D + column, out, column < D)
        tl.store(lse_ptr + at, top + tl.log2(whole))
    else:
        tl.store(lse_ptr + at, float("-inf"))


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, queries_ptr, out_ptr, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """out = sum of 2^(lse - max lse) * partial over the splits, normalised; zeros for a row without keys.

    partial float32 [m, H, SPLITS, D], lse float32 [m, H, SPLITS]; out [n, H, D]; queries as in `decode_kernel`.
    """
    head, query = tl.program_id(0), tl.program_id(1)
    row = tl.load(queries_ptr + 3 * query) if LISTED else query
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = (query.to(tl.int64) * H + head) * SPLITS + split
    lse = tl.load(lse_ptr + at, split < SPLITS, float("-inf"))
    has_keys = lse > float("-inf")
    weights = tl.where(has_keys, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    inside = has_keys[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * D + column[None, :], inside, 0.0)
    out = tl.sum(weights[:, None] * partial, 0) / tl.maximum(tl.sum(weights, 0), 1e-30)
    tl.store(out_ptr + (row.to(tl.int64) * H + head) * D + column, out.to(out_ptr.dtype.element_ty), column < D)


class Plan(NamedTuple):
    attend: Launch
    merge: Launch

    def run(self) -> None:
        self.attend.run()
        self.merge.run()


def splits_for(queries: int, heads: int, most_blocks: int) -> int:
    """Shares of the keys of a row: enough programs to fill the GPU, each with some work.

    It looks at the blocks that a row can have, not at those it has, which change while a captured graph stays.
    """
    return max(1, min(MOST_SPLITS, most_blocks // LEAST_BLOCKS, PROGRAMS // max(queries * heads, 1)))


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, queries: Tensor | None, lengths: Tensor | None,
    out: Tensor,
) -> Plan:  # fmt: skip
    """The launches of a checked `paged_attention` for rows one by one: those listed in queries, or one a request.

    queries int32 [m, 3]: row, request, keys; otherwise lengths int32 or int64 [n]: keys of row r of request r.
    """
    heads, head_dim = q.shape[1:]
    listed, count = queries is not None, len(q) if queries is None else len(queries)
    splits = splits_for(count, heads, block_tables.shape[1])
    partial = q.new_empty(count, heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(count, heads, splits, dtype=torch.float32)
    list_or_any = lse if queries is None else queries
    block_d = triton.next_power_of_2(head_dim)
    attend = Launch(
        decode_kernel,
        (heads, splits, count),
        {"q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "tables_ptr": block_tables,
         "queries_ptr": list_or_any, "lengths_ptr": list_or_any if lengths is None else lengths,
         "partial_ptr": partial, "lse_ptr": lse, "H": heads, "most_blocks": block_tables.shape[1],
         "scale": LOG2E * head_dim**-0.5},
        {"D": head_dim, "BLOCK_D": block_d, "BLOCK_SIZE": k_cache.shape[2], "WIDTH": k_cache.shape[3],
         "INT8": k_cache.dtype == torch.int8, "SPLITS": splits, "LISTED": listed},
        warps=1,
    )  # fmt: skip
    block_s = triton.next_power_of_2(splits)
    merge = Launch(
        merge_kernel,
        (heads, count),
        {"partial_ptr": partial, "lse_ptr": lse, "queries_ptr": list_or_any, "out_ptr": out, "H": heads},
        {"D": head_dim, "BLOCK_D": block_d, "SPLITS": splits, "BLOCK_S": block_s, "LISTED": listed},
        max(1, min(4, block_s * block_d // 1024)),
    )  # fmt: skip
    return Plan(attend, merge)


def aot_specs(capability: int) -> list[Spec]:
    """1 and 16 rows with 2048 keys each, in both caches, and the merge."""
    specs = []
    for rows, cache_dtype in ((1, torch.bfloat16), (16, torch.bfloat16), (1, torch.int8), (16, torch.int8)):
        q = torch.empty(rows, 32, 128, dtype=torch.bfloat16, device="meta")
        cache = q.new_empty(4096, 32, 16, cache_width(128, cache_dtype), dtype=cache_dtype)
        tables, lengths = q.new_empty(rows, 512, dtype=torch.int64), q.new_empty(rows, dtype=torch.int32)
        plan = decode(q, cache, cache, tables, None, lengths, q)
        splits = plan.attend.grid[1]
        partial = rows * 32 * splits * 129 * 4
        cached = 2 * rows * 2048 * 32 * cache.shape[-1] * cache.element_size()
        moved = q.nbytes + cached
        name = f"{rows} rows, {'int8' if cache_dtype == torch.int8 else '16-bit'} KV"
        # int8 vectors of 132 bytes load 32 bits a lane and each level is converted: 0.8 | 0.9 of half the memory time
        counted = int(cache_dtype != torch.int8)
        specs.append(
            Spec(f"decode attention, {name}", plan.attend, moved + partial, max_ratio=0.4 if counted else 1.0,
                 min_wide=0.9 * counted, loop_trips=128 / splits, per_layer=counted, least_bytes=cached)
        )  # fmt: skip
        if counted:
            specs.append(
                Spec(f"attention merge, {rows} rows", plan.merge, partial + q.nbytes, max_ratio=0.4, min_wide=0.7,
                     per_layer=1)
            )  # fmt: skip
    return specs
