"""Attention of single rows over their paged cache: keys split over programs, partial results merged afterwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import cache_width
from qvl_kernels.triton.attention.decode_kv_fp16 import decode_kv_fp16_kernel
from qvl_kernels.triton.attention.decode_kv_int8 import decode_kv_int8_kernel
from qvl_kernels.triton.attention.softmax import LOG2E
from qvl_kernels.triton.launch import Launch, Spec, counted
from qvl_kernels.util import cdiv

PROGRAMS = 1024  # one warp each: 8 to 10 on an SM of the GPUs that this is for, with 8 KB under way each
MOST_SPLITS = 32
MERGED = 8  # partial results of a program that merges, at least
LEAST_BLOCKS = 4  # of a split: fewer cost more in merging than they gain


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, queries_ptr, out_ptr, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, EVEN_HEADS: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """out = sum of 2^(lse - max lse) * partial over the splits, normalized; zeros for a row without keys.

    partial float32 [m, H, SPLITS, D], lse float32 [m, H, SPLITS]; out [n, H, D]; queries as in
    `decode_kv_fp16_kernel`. One warp for HEADS heads of a row: each thread has a few channels of all their partial
    results, and their lse, which are contiguous. EVEN_HEADS: HEADS divides H, and no head is masked.
    """
    query = tl.program_id(1)
    heads, part, column = tl.arange(0, HEADS), tl.arange(0, HEADS * SPLITS), tl.arange(0, BLOCK_D)
    first = tl.program_id(0) * HEADS
    count = HEADS if EVEN_HEADS else tl.minimum(H - first, HEADS)
    row = tl.load(queries_ptr + 3 * query) if LISTED else query
    at = (query.to(tl.int64) * H + first) * SPLITS + part
    lse = tl.load(lse_ptr + at, part < count * SPLITS, float("-inf"))
    inside = (lse != float("-inf"))[:, None] & (column < D)[None, :]  # NaN has a partial result, too: NaN
    partial = tl.load(partial_ptr + at[:, None] * D + column[None, :], inside, 0.0)
    lse, partial = tl.reshape(lse, HEADS, SPLITS), tl.reshape(partial, HEADS, SPLITS, BLOCK_D)
    weights = tl.where(lse != float("-inf"), tl.exp2(lse - tl.max(lse, 1)[:, None]), 0.0)
    out = tl.sum(weights[:, :, None] * partial, 1) / tl.maximum(tl.sum(weights, 1), 1e-30)[:, None]
    to = (row.to(tl.int64) * H + first + heads[:, None]) * D + column[None, :]
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), (heads < count)[:, None] & (column < D)[None, :])


class Plan(NamedTuple):
    """The two launches of decode attention."""

    attend: Launch
    merge: Launch

    def run(self) -> None:
        """Queue both launches."""
        self.attend.run()
        self.merge.run()


def splits_for(queries: int, heads: int, most_blocks: int) -> int:
    """Shares of the keys of a row, a power of two: enough programs to fill the GPU, each with some work.

    It depends on the blocks that a row can have, not on those it has, which change between replays of a captured graph.
    """
    most = min(MOST_SPLITS, most_blocks // LEAST_BLOCKS, PROGRAMS // max(queries * heads, 1))
    return 1 << max(most, 1).bit_length() - 1


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    queries: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
) -> Plan:
    """The launches of a checked `paged_attention` for rows one by one: those listed in queries, or one a request.

    queries int32 [m, 3]: row, request, keys; otherwise lengths int32 or int64 [n]: keys of row r of request r.
    """
    heads, head_dim = q.shape[1:]
    listed, count = queries is not None, len(q) if queries is None else len(queries)
    splits = splits_for(count, heads, block_tables.shape[1])
    partial = q.new_empty(count, heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(count, heads, splits, dtype=torch.float32)
    list_or_any = lse if queries is None else queries
    int8, itemsize = k_cache.dtype == torch.int8, k_cache.element_size()
    block_d = max(32 if int8 else 1, triton.next_power_of_2(head_dim))
    attend = Launch(
        decode_kv_int8_kernel if int8 else decode_kv_fp16_kernel,
        (heads, splits, count),
        {"q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "tables_ptr": block_tables,
         "queries_ptr": list_or_any, "lengths_ptr": list_or_any if lengths is None else lengths,
         "partial_ptr": partial, "lse_ptr": lse, "H": heads, "most_blocks": block_tables.shape[1],
         "scale": LOG2E * head_dim**-0.5},
        {"D": head_dim, "BLOCK_D": block_d, "BLOCK_SIZE": k_cache.shape[2], "SPLITS": splits, "LISTED": listed,
         "ROWS": max(1, min(k_cache.shape[2], 32 * 16 // (block_d * itemsize)))},
        warps=1,
        stages=1,
    )  # fmt: skip
    at_once = max(1, MERGED // splits)
    merge = Launch(
        merge_kernel,
        (cdiv(heads, at_once), count),
        {"partial_ptr": partial, "lse_ptr": lse, "queries_ptr": list_or_any, "out_ptr": out, "H": heads},
        {"D": head_dim, "BLOCK_D": block_d, "SPLITS": splits, "HEADS": at_once, "EVEN_HEADS": heads % at_once == 0,
         "LISTED": listed},
        warps=1,
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
        moved = q.nbytes + cached + partial
        label, int8 = counted(rows, "row"), cache_dtype == torch.int8
        specs.append(
            Spec(f"decode attention, {label}, {'int8' if int8 else '16-bit'} KV", plan.attend, moved, max_ratio=0.4,
                 min_wide=0.9, loop_trips=2048 / splits / (32 if int8 else 16), per_layer=int(not int8),
                 least_bytes=cached)
        )  # fmt: skip
        if not int8:
            merged = Spec(f"attention merge, {label}", plan.merge, partial + q.nbytes, max_ratio=0.4, min_wide=0.9)
            specs.append(merged._replace(per_layer=1))
    return specs
