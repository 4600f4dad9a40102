"""`paged_attention`: the choice between decode and prefill kernels, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qvl_kernels.reference import SCALE_BYTES, cache_width
from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.decode import decode
from qvl_kernels.triton.attention.prefill import prefill, prefill_on_device
from qvl_kernels.triton.launch import capability

DECODE_MAX_ROWS = 4  # of a request: up to it rows are decoded one by one, as split keys beat one tile of rows
MAX_HEAD_DIM = 256


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
) -> Tensor:
    """`reference.paged_attention`: q [n, H, d]; caches [blocks, H, block_size, width]; block_tables [R, most blocks].

    There are two ways to assign rows to requests. Python sequences, as in the reference: any mixture of prefill and
    decoding; their tables are uploaded once per value, not once per layer. Or `context_lens` as an int32 or int64
    tensor on the device: nothing is read on the host, and the launches do not depend on the lengths, so that they can
    be captured in a CUDA graph and replayed while the lengths grow up to most blocks * block_size. With n lengths every
    request has one row, and `query_starts` is ignored; a row of length 0 is padding: it reads nothing and returns
    zeros. With R < n lengths `query_starts` is a tensor [R + 1], too, and every request is a prefill; rows that belong
    to no request are padding, and what they return is undefined.
    """
    return attend(q, k_cache, v_cache, block_tables, query_starts, context_lens, DECODE_MAX_ROWS)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
    most_decoded: int,
) -> Tensor:
    """`paged_attention`; requests of up to `most_decoded` rows decode them one by one."""
    op, (rows, heads, head_dim) = "paged_attention", q.shape
    checks.tensor(op, "q", q, (rows, heads, head_dim))
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has heads of {head_dim} channels; expected at most {MAX_HEAD_DIM}")
    int8 = k_cache.dtype == torch.int8
    if int8 and head_dim % SCALE_BYTES:
        raise ValueError(f"{op}: heads of {head_dim} channels; an int8 cache needs a multiple of {SCALE_BYTES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        shape = (None, heads, None, cache_width(head_dim, k_cache.dtype))
        checks.tensor(op, name, cache, shape, torch.int8 if int8 else q.dtype)
    checks.tensor(op, "block_tables", block_tables, (None, None), torch.int32, torch.int64)
    checks.device(op, q, k_cache, v_cache, block_tables)
    out, same = torch.empty_like(q), (q, k_cache, v_cache, block_tables)
    if isinstance(context_lens, Tensor):
        requests = len(block_tables)
        checks.tensor(op, "context_lens", context_lens, (requests,), torch.int32, torch.int64)
        checks.device(op, q, context_lens)
        if requests < rows:
            if not isinstance(query_starts, Tensor):
                raise ValueError(f"{op}: query_starts is on the host and context_lens is not; expected both there")
            checks.tensor(op, "query_starts", query_starts, (requests + 1,), torch.int32, torch.int64)
            checks.device(op, q, query_starts)
            prefill_on_device(*same, query_starts, context_lens, capability(q.device), out).run()
            return out.flatten(1)
        decode(*same, None, context_lens, out, capability(q.device)).run()
        return out.flatten(1)
    starts, lengths = tuple(map(int, query_starts)), tuple(map(int, context_lens))
    _check_rows(starts, lengths, rows, block_tables, k_cache.shape[2])
    counts = [end - start for start, end in pairwise(starts)]
    queries = queries_of(starts, lengths, q.device, most_decoded)
    if len(queries):
        decode(*same, queries, None, out, capability(q.device)).run()
    prefilled = [r for r, count in enumerate(counts) if count > most_decoded]
    if prefilled:
        prefill(*same, prefilled, starts, lengths, capability(q.device), out).run()
    return out.flatten(1)


@lru_cache(maxsize=16)
def queries_of(
    query_starts: tuple[int, ...], context_lens: tuple[int, ...], device: torch.device, most_rows: int = DECODE_MAX_ROWS
) -> Tensor:
    """int32 [m, 3]: row, request and visible keys of each row of the requests with few rows. Cached by value."""
    queries = [
        (row, r, length - (query_starts[r + 1] - 1 - row))
        for r, length in enumerate(context_lens)
        for row in range(query_starts[r], query_starts[r + 1])
        if query_starts[r + 1] - query_starts[r] <= most_rows
    ]
    made = torch.tensor(queries, dtype=torch.int32).view(-1, 3)
    # pinned: a copy from other memory would wait for all that is queued on the device
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def _check_rows(
    starts: tuple[int, ...], lengths: tuple[int, ...], rows: int, block_tables: Tensor, block_size: int
) -> None:
    requests, room = len(block_tables), block_tables.shape[1] * block_size
    if len(lengths) != requests or len(starts) != requests + 1 or (starts[0], starts[-1]) != (0, rows):
        raise ValueError(
            f"paged_attention: {len(starts)} query_starts from {starts[:1]} to {starts[-1:]} and {len(lengths)}"
            f" context_lens; expected {requests + 1} from 0 to {rows}, and {requests}, the rows of block_tables"
        )
    for r, length in enumerate(lengths):
        if not 0 <= starts[r + 1] - starts[r] <= length <= room:
            raise ValueError(
                f"paged_attention: request {r} has {starts[r + 1] - starts[r]} rows and {length} tokens; expected no"
                f" more rows than tokens, and no more tokens than the {room} of its blocks"
            )
