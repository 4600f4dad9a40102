"""Attention on a CPU: the kernel of csrc/attention/attention.inl, and torch's fused attention for some images.

The kernel's two products use AMX tiles for bfloat16, and float32 fused multiply-adds otherwise. A row is the same bits
alone and among others, decoded and in a prompt. Without vector instructions torch's attention is used for images, each
of which it computes separately.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.cpu.library import CODES, FLOATS, library, warn_fallback
from qvl_kernels.cpu.memory import empty
from qvl_kernels.cpu.ops import rotary_to_cache

MAX_HEAD_DIM = 256  # channels of the widest head that the kernel supports
TORCH_WHOLE = ("portable",)  # with which torch is faster for attention without a mask


def report() -> str:
    """Describe the attention kernels in use, for the report."""
    used = library().instruction_set
    if used in TORCH_WHOLE:
        return "C++ over the paged cache; torch for images"
    return "C++, bfloat16 on AMX tiles" if used == "amx" else "C++"


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
) -> Tensor:  # fmt: skip
    """`reference.paged_attention`; a row's bits depend on no other row, nor on how many tokens a request adds."""
    reason = _not_covered(q, k_cache, v_cache)
    if reason is not None:
        warn_fallback("paged_attention", reason)
        return reference.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)
    q, tables = q.contiguous(), block_tables.contiguous()
    n, heads, head_dim = q.shape
    y = empty((n, heads * head_dim), q.dtype)
    library().ready().attention(
        q.data_ptr(), CODES[q.dtype], heads * head_dim, head_dim, heads, head_dim,
        k_cache.data_ptr(), v_cache.data_ptr(), CODES[k_cache.dtype],
        len(k_cache), k_cache.shape[2], *k_cache.stride()[:3], tables.data_ptr(), tables.shape[1],
        len(context_lens), _integers(query_starts), _integers(context_lens), True, y.data_ptr(),
    )  # fmt: skip
    return y


def rotary_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    block_tables: Tensor, query_starts: Sequence[int] | Tensor, context_lens: Sequence[int] | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`reference.rotary_attention`, in two kernels."""
    q = rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
    return paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)


def vision_attention(qkv: Tensor, heads: int) -> Tensor:
    """`reference.vision_attention`."""
    images, patches, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.contiguous().view(images, patches, heads, 3, head_dim).unbind(3)
    return _whole("vision_attention", q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`reference.cross_attention`."""
    q, k, v = (t.reshape(*t.shape[:-1], heads, -1) for t in (q.expand(len(k), -1, -1).contiguous(), k, v))
    return _whole("cross_attention", q, k, v)


def _whole(op: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all queries [P, Q, H, d] over all keys [P, L, H, d] of their image, without a mask: [P, Q, H * d].

    The kernel reads a paged cache: each image is passed as one block of L tokens.
    """
    reason = _not_covered(q, k, v)
    if reason is not None:
        warn_fallback(op, reason)
    if reason is not None or library().instruction_set in TORCH_WHOLE:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v) + reference.lost_nan(q, k)
        return y.transpose(1, 2).flatten(2)
    images, rows, heads, head_dim = q.shape
    keys = k.shape[1]
    y, tables = empty((images, rows, heads * head_dim), q.dtype), torch.arange(images)
    per_block, per_row, per_head, _ = k.stride()
    library().ready().attention(
        q.data_ptr(), CODES[q.dtype], q.stride(1), q.stride(2), heads, head_dim,
        k.data_ptr(), v.data_ptr(), CODES[k.dtype], images, keys, per_block, per_head, per_row,
        tables.data_ptr(), 1, images,
        _integers(range(0, (images + 1) * rows, rows)), _integers([keys] * images), False, y.data_ptr(),
    )  # fmt: skip
    return y


def _not_covered(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the attention kernel does not support these tensors, or None."""
    if q.dtype not in FLOATS or k.dtype not in CODES or k.dtype != v.dtype:
        return f"its dtypes are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"a head of {q.shape[-1]} channels is wider than {MAX_HEAD_DIM}"
    strided = (q.dim() == 4 and len(q) > 1 and q.stride(0) != q.shape[1] * q.stride(1)) or k.stride() != v.stride()
    return "the strides of its tensors are not supported" if strided or k.stride(-1) != 1 or q.stride(-1) != 1 else None


def _integers(values: Sequence[int] | Tensor) -> ctypes.Array[ctypes.c_int64] | int:
    """Pass integers to the kernel: a copy, or the address of a tensor, whose values may change until a replay."""
    if isinstance(values, Tensor):
        if values.dtype != torch.int64 or not values.is_contiguous():
            raise ValueError(f"starts and lengths are {values.dtype} {list(values.shape)}; expected contiguous int64")
        return values.data_ptr()
    return (ctypes.c_int64 * len(values))(*values)
