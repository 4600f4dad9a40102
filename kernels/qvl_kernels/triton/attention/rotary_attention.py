"""Rotary embedding, the cache's new entries and attention over it: in one kernel where each request decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.decode import decode
from qvl_kernels.triton.attention.paged import MAX_HEAD_DIM, paged_attention
from qvl_kernels.triton.attention.rotary import NewTokens, check, rotary_to_cache
from qvl_kernels.triton.launch import capability


def rotary_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.rotary_attention`; one kernel less with a length a row on the device, as captured steps have it.

    Then row r belongs to request r, and its slot must be that of its last key, or of padding.
    """
    rows, heads = qkv.shape[-2], k_cache.shape[1]
    head_dim = qkv.shape[-1] // (3 * heads)
    if not isinstance(context_lens, Tensor) or len(block_tables) < rows or head_dim > MAX_HEAD_DIM:
        q = rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
        return paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)
    op, new = "rotary_attention", NewTokens(qkv, cos, sin, logn, slots)
    checks.device(op, *new, k_cache, v_cache, block_tables, context_lens)
    out = qkv.new_empty(rows, heads, head_dim, dtype=dtype)
    check(op, new, k_cache, v_cache, out)
    checks.tensor(op, "block_tables", block_tables, (rows, None), torch.int32, torch.int64)
    checks.tensor(op, "context_lens", context_lens, (rows,), torch.int32, torch.int64)
    decode(out, k_cache, v_cache, block_tables, None, context_lens, out, capability(qkv.device), new).run()
    return out.flatten(1)
