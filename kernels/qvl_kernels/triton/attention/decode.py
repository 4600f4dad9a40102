"""Attention of single rows over their paged cache: keys split over programs, partial results merged afterwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import cache_width
from qvl_kernels.triton.attention.decode_kv_fp16 import PIECES, decode_kv_fp16_kernel
from qvl_kernels.triton.attention.decode_kv_int8 import decode_kv_int8_kernel
from qvl_kernels.triton.attention.merge import merge
from qvl_kernels.triton.attention.rotary import NewTokens
from qvl_kernels.triton.attention.softmax import LOG2E
from qvl_kernels.triton.dependent import dependent
from qvl_kernels.triton.launch import Launch, Spec, counted
from qvl_kernels.triton.linear.published_shapes import decode_splits
from qvl_kernels.util import cdiv

# Bars of the kernel report, of a 16-bit cache and of int8: that was at 0.38 of 0.4 on sm_90 when an LDSM counted as one
# pass, and is at 0.44 with its four.
MOST_RATIO = {False: 0.4, True: 0.45}
ROWS_AT_ONCE = 64  # whose partial results are in memory at a time: 34 MB for 32 heads of 128
FLOATS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Part(NamedTuple):
    """The two launches for some of the rows."""

    attend: Launch
    merge: Launch


class Plan(NamedTuple):
    """The launches of decode attention, in order."""

    parts: tuple[Part, ...]

    def run(self) -> None:
        """Queue all launches."""
        for part in self.parts:
            part.attend.run()
            part.merge.run()


def unit_of(block_size: int, int8: bool) -> tuple[int, int]:
    """Keys that a program reads at once, and how many times that the least piece is: 32 keys with blocks of 16.

    Fewer keys a piece cost as much traffic in partial results as they save; more leave the GPU idle when one short
    request is all there is.
    """
    return (2 * block_size, 1) if int8 else (block_size, 2)


def pieces_for(most_blocks: int) -> int:
    """Pieces of the keys of a row that has at most this many blocks."""
    return min(int(PIECES.value), max(1, cdiv(most_blocks, 2)))


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    queries: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    capability: int,
    new: NewTokens | None = None,
) -> Plan:
    """The launches of a checked `paged_attention` for rows one by one: those listed in queries, or one a request.

    queries int32 [m, 3]: row, request, keys; otherwise lengths int32 or int64 [n]: keys of row r of request r.
    new: q is not looked at but its shape and dtype; it is made of these, and their keys and values are cached.
    """
    count, pieces = len(q) if queries is None else len(queries), pieces_for(block_tables.shape[1])
    at_once = min(count, ROWS_AT_ONCE)
    partial = q.new_empty(at_once, q.shape[1], pieces, q.shape[2], dtype=torch.float32)
    lse = q.new_empty(at_once, q.shape[1], pieces, dtype=torch.float32)
    list_or_any = lse if queries is None else queries
    lengths_or_any = list_or_any if lengths is None else lengths
    int8, listed = k_cache.dtype == torch.int8, queries is not None
    pdl, unit = dependent(capability, count), unit_of(k_cache.shape[2], int8)
    attend = _attend(q, k_cache, v_cache, block_tables, new)
    attend = attend.with_arguments(
        queries_ptr=list_or_any, lengths_ptr=lengths_or_any, partial_ptr=partial, lse_ptr=lse
    )
    parts = []
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        launch = attend.with_arguments(first_query=first, pieces=pieces)
        launch = launch.with_grid((q.shape[1], pieces, rows)).with_constants(LISTED=listed, PDL=pdl)
        merged = merge(partial[:rows], lse, list_or_any, lengths_or_any, out, first, unit, listed, pdl)
        parts.append(Part(launch, merged))
    return Plan(tuple(parts))


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, new: NewTokens | None) -> Launch:
    """The launch but for its queries, outputs and grid."""
    rows, heads, head_dim = q.shape
    int8, itemsize = k_cache.dtype == torch.int8, k_cache.element_size()
    block_d = max(32 if int8 else 1, triton.next_power_of_2(head_dim))
    qkv, cos, sin, logn, slots = new or NewTokens(q, q, q, q, q)
    sums = len(qkv) if new is not None and qkv.dim() == 3 else 0
    return Launch(
        decode_kv_int8_kernel if int8 else decode_kv_fp16_kernel,
        (),
        {"q_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, "logn_ptr": logn, "slots_ptr": slots, "k_cache_ptr": k_cache,
         "v_cache_ptr": v_cache, "tables_ptr": block_tables, "rows": rows, "H": heads,
         "most_blocks": block_tables.shape[1], "scale": LOG2E * head_dim**-0.5},
        {"D": head_dim, "BLOCK_D": block_d, "BLOCK_SIZE": k_cache.shape[2], "NEW": new is not None,
         "FLOAT": FLOATS[q.dtype], "SUMS": sums, "ROTARY_HALF": 0 if new is None else cos.shape[-1] // 2,
         "ROWS": max(1, min(k_cache.shape[2], 32 * 16 // (block_d * itemsize)))},
        warps=1,
        stages=1,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """1 and 16 rows with 2048 keys each, in both caches, their own keys and values new, and the merge; and 4 listed."""
    cases = [(rows, dtype, True) for dtype in (torch.bfloat16, torch.int8) for rows in (1, 16)]
    return [spec for case in [*cases, (4, torch.bfloat16, False)] for spec in _specs(capability, *case)]


def _specs(capability: int, rows: int, cache_dtype: torch.dtype, is_new: bool) -> list[Spec]:
    q = torch.empty(rows, 32, 128, dtype=torch.bfloat16, device="meta")
    cache = q.new_empty(4096, 32, 16, cache_width(128, cache_dtype), dtype=cache_dtype)
    tables, lengths = q.new_empty(rows, 512, dtype=torch.int64), q.new_empty(rows, dtype=torch.int32)
    splits, logn = decode_splits(capability, "qkv"), q.new_empty(rows, dtype=torch.float32)
    shape = (splits, rows, 3 * 4096) if splits > 1 else (rows, 3 * 4096)
    qkv = q.new_empty(shape, dtype=torch.float32 if splits > 1 else q.dtype)
    table = q.new_empty(rows, 128, dtype=torch.float32)
    new = NewTokens(qkv, table, table, logn, logn.long()) if is_new else None
    queries = None if is_new else q.new_empty(rows, 3, dtype=torch.int32)
    plan = decode(q, cache, cache, tables, queries, lengths if is_new else None, q, capability, new)
    pieces = plan.parts[0].attend.grid[1]
    partial = rows * 32 * pieces * 129 * 4
    cached = 2 * rows * 2048 * 32 * cache.shape[-1] * cache.element_size()
    moved = (qkv if is_new else q).nbytes + cached + partial
    int8, label = cache_dtype == torch.int8, counted(rows, "row")
    label += "" if is_new else " listed"
    attend, merged = (
        launch.with_constants(PDL=capability >= 90) for launch in (plan.parts[0].attend, plan.parts[0].merge)
    )
    per_layer = int(is_new and not int8)
    specs = [
        Spec(f"decode attention, {label}, {'int8' if int8 else '16-bit'} KV", attend, moved, max_ratio=MOST_RATIO[int8],
             min_wide=0.9, loop_trips=2048 / pieces / (32 if int8 else 16), per_layer=per_layer, least_bytes=cached)
    ]  # fmt: skip
    if is_new and not int8:
        specs.append(Spec(f"attention merge, {label}", merged, partial + q.nbytes, max_ratio=0.4, min_wide=0.9,
                          per_layer=1))  # fmt: skip
    return specs
