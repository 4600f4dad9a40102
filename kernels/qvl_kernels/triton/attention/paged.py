"""`paged_attention`: which of its kernels runs for which request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qvl_kernels.reference import SCALE_BYTES, cache_width
from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.decode import decode
from qvl_kernels.triton.attention.prefill import prefill
from qvl_kernels.triton.launch import capability

FEW_ROWS = 4  # of a request up to which each is decoded on its own: keys split over the GPU beat one tile of rows
WIDEST_HEAD = 256


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
) -> Tensor:  # fmt: skip
    """`reference.paged_attention`: q [n, H, d]; caches [blocks, H, block_size, width]; block_tables [R, most blocks].

    Two ways to say where rows belong. Python sequences, as in the reference: any mixture of prefill and decoding; what
    the kernels need of them is uploaded once for each value, not once a layer. Or `context_lens` as an int32 or int64
    tensor [n] on the device: every request has one row, `query_starts` is not looked at, nothing is read on the host,
    and the launches do not depend on the lengths, so that they can be captured in a CUDA graph and replayed while
    the lengths grow up to most blocks * block_size. A row with length 0 pads a batch: it reads nothing and gives zeros.
    """
    op, (rows, heads, head_dim) = "paged_attention", q.shape
    checks.tensor(op, "q", q, (rows, heads, head_dim))
    if head_dim > WIDEST_HEAD:
        raise ValueError(f"{op}: q has heads of {head_dim} channels; expected at most {WIDEST_HEAD}")
    int8 = k_cache.dtype == torch.int8
    if int8 and head_dim % SCALE_BYTES:
        raise ValueError(f"{op}: heads of {head_dim} channels; an int8 cache needs a multiple of {SCALE_BYTES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        wanted = (None, heads, None, cache_width(head_dim, k_cache.dtype))
        checks.tensor(op, name, cache, wanted, torch.int8 if int8 else q.dtype)
    checks.tensor(op, "block_tables", block_tables, (None, None), torch.int32, torch.int64)
    checks.device(op, q, k_cache, v_cache, block_tables)
    out, same = torch.empty_like(q), (q, k_cache, v_cache, block_tables)
    if isinstance(context_lens, Tensor):
        checks.tensor(op, "context_lens", context_lens, (rows,), torch.int32, torch.int64)
        checks.device(op, q, context_lens)
        decode(*same, None, context_lens, out).run()
        return out.flatten(1)
    starts, lengths = tuple(map(int, query_starts)), tuple(map(int, context_lens))
    _check_rows(starts, lengths, rows, block_tables, k_cache.shape[2])
    counts = [end - start for start, end in pairwise(starts)]
    few = queries_of(starts, lengths, q.device)
    if len(few):
        decode(*same, few, None, out).run()
    many = [r for r, count in enumerate(counts) if count > FEW_ROWS]
    if many:
        prefill(*same, many, starts, lengths, capability(q.device), out).run()
    return out.flatten(1)


@lru_cache(maxsize=16)
def queries_of(query_starts: tuple[int, ...], context_lens: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [m, 3]: row, request and visible keys of each row of the requests that have few. Remembered by value."""
    queries = [
        (row, r, length - (query_starts[r + 1] - 1 - row))
        for r, length in enumerate(context_lens)
        for row in range(query_starts[r], query_starts[r + 1])
        if query_starts[r + 1] - query_starts[r] <= FEW_ROWS
    ]
    return torch.tensor(queries, dtype=torch.int32, device=device).view(-1, 3)


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
