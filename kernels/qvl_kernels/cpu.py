"""The ops on a CPU: the names and signatures of `reference`, on the C++ kernels of csrc/.

What no kernel covers runs in plain torch: unpacked GPTQ tensors, attention of many rows and the vision tower's
attention, where torch's own GEMMs and fused attention are the fast way, and dtypes other than the three floats.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.cpu_library import CODES, FLOATS, library
from qvl_kernels.cpu_linear import linear, prepare_gptq, prepare_linear
from qvl_kernels.reference import (
    cache_width,
    cross_attention,
    from_cached,
    gptq_dequantize,
    gptq_linear,
    rotate_half,
    to_cached,
    unpack_rows,
    vision_attention,
)

__all__ = [
    "add_rms_norm", "cache_width", "cross_attention", "from_cached", "gelu", "gptq_dequantize", "gptq_linear",
    "layer_norm", "linear", "paged_attention", "prepare_gptq", "prepare_linear", "rms_norm", "rotary_to_cache",
    "rotate_half", "swiglu", "to_cached", "unpack_rows", "vision_attention",
]  # fmt: skip

FEW_QUERIES = 4  # rows of a request up to which its cache is read row by row; beyond, torch's fused attention
MOST_DIM = 256  # the widest head of the attention kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _same_floats(x, weight) or weight.shape != x.shape[-1:]:
        return reference.rms_norm(x, weight, eps)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    library().ready().rms_norm(
        x.data_ptr(), None, CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps, None, y.data_ptr()
    )
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _same_floats(x, weight, update) or x.shape != update.shape or weight.shape != x.shape[-1:]:
        return reference.add_rms_norm(x, update, weight, eps)
    x, update = x.contiguous(), update.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    library().ready().rms_norm(
        x.data_ptr(), update.data_ptr(), CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps,
        total.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return total, y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not _same_floats(x, weight, bias) or not weight.shape == bias.shape == x.shape[-1:]:
        return reference.layer_norm(x, weight, bias, eps)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    library().ready().layer_norm(
        x.data_ptr(), CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), bias.data_ptr(), eps, y.data_ptr()
    )
    return y


def swiglu(up_gate: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    width = up_gate.shape[-1] // 2
    if up_gate.dtype not in FLOATS or up_gate.dim() == 3 or up_gate.shape[-1] != 2 * width:
        return reference.swiglu(up_gate, dtype)
    x, y = up_gate.contiguous(), up_gate.new_empty(*up_gate.shape[:-1], width)
    library().ready().swiglu(x.data_ptr(), CODES[x.dtype], len(x), width, y.data_ptr())
    return y


def gelu(x: Tensor) -> Tensor:
    if x.dtype not in FLOATS:
        return reference.gelu(x)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    library().ready().gelu(x.data_ptr(), CODES[x.dtype], x.numel(), y.data_ptr())
    return y


def rotary_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    heads, block_size, _ = k_cache.shape[1:]
    plain = all(t.is_contiguous() for t in (k_cache, v_cache, cos, sin, logn, slots))
    if qkv.dtype not in FLOATS or qkv.dim() == 3 or not plain:
        return reference.rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
    qkv, head_dim = qkv.contiguous(), qkv.shape[-1] // (3 * heads)
    q = qkv.new_empty(len(qkv), heads, head_dim)
    library().ready().rotary_to_cache(
        qkv.data_ptr(), CODES[qkv.dtype], len(qkv), heads, head_dim, cos.data_ptr(), sin.data_ptr(), cos.shape[-1],
        logn.data_ptr(), slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), CODES[k_cache.dtype], block_size,
        q.data_ptr(),
    )  # fmt: skip
    return q


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Sequence[int],
    context_lens: Sequence[int],
) -> Tensor:  # fmt: skip
    rows = [query_starts[r + 1] - query_starts[r] for r in range(len(context_lens))]
    head_dim, block_size = q.shape[-1], k_cache.shape[2]
    covered = q.dtype in FLOATS and head_dim % 16 == 0 and head_dim <= MOST_DIM and block_size % 16 == 0
    if covered and max(rows, default=0) <= FEW_QUERIES:
        return _few_queries(q.contiguous(), k_cache, v_cache, block_tables, rows, context_lens)
    out = torch.empty_like(q)
    for r, count in enumerate(rows):
        part, table = slice(query_starts[r], query_starts[r + 1]), block_tables[r : r + 1]
        if covered and count <= FEW_QUERIES:
            y = _few_queries(q[part].contiguous(), k_cache, v_cache, table, [count], context_lens[r : r + 1])
        else:
            y = _many_queries(q[part], k_cache, v_cache, table[0], context_lens[r])
        out[part] = y.view(count, *q.shape[1:])
    return out.flatten(1)


def _few_queries(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, rows: Sequence[int], context_lens: Sequence[int]
) -> Tensor:
    n, heads, head_dim = q.shape
    requests = [r for r, count in enumerate(rows) for _ in range(count)]
    contexts = [context_lens[r] - count + 1 + i for r, count in enumerate(rows) for i in range(count)]
    integers, y, tables = ctypes.c_int64 * n, q.new_empty(n, heads * head_dim), block_tables.contiguous()
    library().ready().paged_attention(
        q.data_ptr(), CODES[q.dtype], n, heads, head_dim, k_cache.data_ptr(), v_cache.data_ptr(), CODES[k_cache.dtype],
        k_cache.shape[2], tables.data_ptr(), tables.shape[1], integers(*requests), integers(*contexts), y.data_ptr(),
    )  # fmt: skip
    return y


def _many_queries(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int) -> Tensor:
    """Prefill: the request's cache gathered, then torch's fused attention, which skips what is above the diagonal."""
    rows, blocks = len(q), table[: -(-length // k_cache.shape[2])]
    k, v = (
        from_cached(cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length], q.dtype)[None]
        for cache in (k_cache, v_cache)
    )
    whole = rows == length
    causal = None if whole else torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=causal, is_causal=whole)
    return y[0].transpose(0, 1).flatten(1)


def _same_floats(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in FLOATS and all(t.dtype == x.dtype and t.is_contiguous() for t in others)
