"""The ops on a CPU: the names and signatures of `reference`, on the C++ kernels of csrc/.

What no kernel covers (float64, a head wider than `MOST_DIM`, weights of another dtype than their input) runs in plain
torch, which is said: a warning the first time, and a line in the report.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.cpu_library import CODES, FLOATS, library, slower
from qvl_kernels.cpu_linear import linear, prepare_gptq, prepare_linear
from qvl_kernels.reference import (
    cache_width,
    from_cached,
    gptq_dequantize,
    gptq_linear,
    rotate_half,
    to_cached,
    unpack_rows,
)

__all__ = [
    "add_rms_norm", "cache_width", "cross_attention", "from_cached", "gelu", "gptq_dequantize", "gptq_linear",
    "layer_norm", "linear", "paged_attention", "prepare_gptq", "prepare_linear", "rms_norm", "rotary_to_cache",
    "rotate_half", "swiglu", "to_cached", "unpack_rows", "vision_attention",
]  # fmt: skip

MOST_DIM = 256  # the widest head of the attention kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _same_floats(x, weight) or weight.shape != x.shape[-1:]:
        slower("rms_norm", _mixed(x, weight))
        return reference.rms_norm(x, weight, eps)
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    library().ready().rms_norm(
        x.data_ptr(), None, CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps, None, y.data_ptr()
    )
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _same_floats(x, weight, update) or x.shape != update.shape or weight.shape != x.shape[-1:]:
        slower("add_rms_norm", _mixed(x, update, weight))
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
        slower("layer_norm", _mixed(x, weight, bias))
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
        slower("swiglu", _mixed(up_gate))
        return reference.swiglu(up_gate, dtype)
    x, y = up_gate.contiguous(), up_gate.new_empty(*up_gate.shape[:-1], width)
    library().ready().swiglu(x.data_ptr(), CODES[x.dtype], len(x), width, y.data_ptr())
    return y


def gelu(x: Tensor) -> Tensor:
    if x.dtype not in FLOATS:
        slower("gelu", _mixed(x))
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
        slower("rotary_to_cache", _mixed(qkv, k_cache, v_cache))
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
    reason = _not_attended(q, k_cache, v_cache)
    if reason is not None:
        slower("paged_attention", reason)
        return reference.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)
    q, tables = q.contiguous(), block_tables.contiguous()
    n, heads, head_dim = q.shape
    y = q.new_empty(n, heads * head_dim)
    library().ready().attention(
        q.data_ptr(), CODES[q.dtype], heads * head_dim, head_dim, heads, head_dim, k_cache.data_ptr(), v_cache.data_ptr(),
        CODES[k_cache.dtype], k_cache.shape[2], *k_cache.stride()[:3], tables.data_ptr(), tables.shape[1],
        len(context_lens), _integers(query_starts), _integers(context_lens), True, y.data_ptr(),
    )  # fmt: skip
    return y


def vision_attention(qkv: Tensor, heads: int) -> Tensor:
    pictures, patches, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.contiguous().view(pictures, patches, heads, 3, head_dim).unbind(3)
    return _whole("vision_attention", q, k, v)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (t.reshape(*t.shape[:-1], heads, -1) for t in (q.expand(len(k), -1, -1).contiguous(), k, v))
    return _whole("cross_attention", q, k, v)


def _whole(op: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all queries [P, Q, H, d] to all keys [P, L, H, d] of their picture: [P, Q, H * d].

    The kernel reads a paged cache: a picture is taken for a block of L tokens.
    """
    reason = _not_attended(q, k, v)
    if reason is not None:
        slower(op, reason)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return y.transpose(1, 2).flatten(2)
    pictures, rows, heads, head_dim = q.shape
    keys = k.shape[1]
    y, tables = q.new_empty(pictures, rows, heads * head_dim), torch.arange(pictures)
    per_block, per_row, per_head, _ = k.stride()
    library().ready().attention(
        q.data_ptr(), CODES[q.dtype], q.stride(1), q.stride(2), heads, head_dim, k.data_ptr(), v.data_ptr(), CODES[k.dtype],
        keys, per_block, per_head, per_row, tables.data_ptr(), 1, pictures,
        _integers(range(0, (pictures + 1) * rows, rows)), _integers([keys] * pictures), False, y.data_ptr(),
    )  # fmt: skip
    return y


def _not_attended(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the attention kernel cannot take these, or None."""
    if q.dtype not in FLOATS or k.dtype not in CODES or k.dtype != v.dtype:
        return f"its dtypes are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > MOST_DIM:
        return f"a head of {q.shape[-1]} channels is wider than {MOST_DIM}"
    strided = (q.dim() == 4 and len(q) > 1 and q.stride(0) != q.shape[1] * q.stride(1)) or k.stride() != v.stride()
    return "its tensors are strided apart" if strided or k.stride(-1) != 1 or q.stride(-1) != 1 else None


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _same_floats(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in FLOATS and all(t.dtype == x.dtype and t.is_contiguous() for t in others)


def _mixed(*tensors: Tensor) -> str:
    """What tensors are, where that is why a kernel cannot take them."""
    kinds = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
    return f"it is given {', '.join(kinds)}"
