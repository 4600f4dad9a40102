"""The ops on a CPU: the names and signatures of `reference`, on the C++ kernels of csrc/.

Inputs that no kernel supports (float64, a head wider than 256 channels, weights whose dtype differs from their input's)
run in plain torch, with a warning the first time and a line in the report.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.cpu.library import CODES, FLOATS, library, warn_fallback
from qvl_kernels.cpu.memory import empty, empty_like
from qvl_kernels.reference import (
    SampledTokens,
    SamplingRows,
)
from qvl_kernels.reference.sampling import choose
from qvl_kernels.util import dtype_name


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if not _same_floats(x, weight) or weight.shape != x.shape[-1:]:
        warn_fallback("rms_norm", _unsupported(x, weight))
        return reference.rms_norm(x, weight, eps)
    x, y = x.contiguous(), empty_like(x)
    width = x.shape[-1]
    library().ready().rms_norm(
        x.data_ptr(), None, CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps, None, y.data_ptr()
    )
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`, for an update [n, D]: CPU kernels have no partial sums."""
    if not _same_floats(x, weight, update) or x.shape != update.shape or weight.shape != x.shape[-1:]:
        warn_fallback("add_rms_norm", _unsupported(x, update, weight))
        return reference.add_rms_norm(x, update, weight, eps)
    x, update = x.contiguous(), update.contiguous()
    total, y = empty_like(x), empty_like(x)
    width = x.shape[-1]
    library().ready().rms_norm(
        x.data_ptr(), update.data_ptr(), CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), eps,
        total.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return total, y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm`."""
    if not _same_floats(x, weight, bias) or not weight.shape == bias.shape == x.shape[-1:]:
        warn_fallback("layer_norm", _unsupported(x, weight, bias))
        return reference.layer_norm(x, weight, bias, eps)
    x, y = x.contiguous(), empty_like(x)
    width = x.shape[-1]
    library().ready().layer_norm(
        x.data_ptr(), CODES[x.dtype], x.numel() // width, width, weight.data_ptr(), bias.data_ptr(), eps, y.data_ptr()
    )
    return y


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `reference.add_layer_norm`: torch's own sum, then the kernel of `layer_norm`."""
    x = x + update
    return x, layer_norm(x, weight, bias, eps)


def swiglu(up_gate: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.swiglu`, for up_gate [n, 2F]: CPU kernels have no partial sums."""
    width = up_gate.shape[-1] // 2
    if up_gate.dtype not in FLOATS or up_gate.dim() == 3 or up_gate.shape[-1] != 2 * width:
        warn_fallback("swiglu", _unsupported(up_gate))
        return reference.swiglu(up_gate, dtype)
    x, y = up_gate.contiguous(), empty((*up_gate.shape[:-1], width), up_gate.dtype)
    library().ready().swiglu(x.data_ptr(), CODES[x.dtype], len(x), width, y.data_ptr())
    return y


def concat_outputs(first: Tensor, second: Tensor) -> Tensor:
    """`reference.concat_outputs`."""
    if first.dtype != second.dtype or first.dim() != 2:
        return reference.concat_outputs(first, second)
    first, second = first.contiguous(), second.contiguous()
    (rows, left), right, size = first.shape, second.shape[1], first.element_size()
    y = empty((rows, left + right), first.dtype)
    library().ready().side_by_side(first.data_ptr(), left * size, second.data_ptr(), right * size, rows, y.data_ptr())
    return y


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu`."""
    if x.dtype not in FLOATS:
        warn_fallback("gelu", _unsupported(x))
        return reference.gelu(x)
    x, y = x.contiguous(), empty_like(x)
    library().ready().gelu(x.data_ptr(), CODES[x.dtype], x.numel(), y.data_ptr())
    return y


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """`reference.embedding`."""
    y = empty((len(ids), table.shape[1]), table.dtype)
    ids, table = ids.contiguous(), table.contiguous()
    library().ready().gather_rows(
        table.data_ptr(), len(table), table.shape[1] * table.element_size(), ids.data_ptr(), len(ids), y.data_ptr()
    )
    return y


def rotary_tables(positions: Tensor, frequencies: Tensor, logn_from: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.rotary_tables`."""
    rows, half = len(positions), frequencies.shape[-1]
    positions, frequencies = positions.contiguous(), frequencies.expand(rows, half).contiguous()
    cos, sin, logn = (empty(shape, frequencies.dtype) for shape in ((rows, 2 * half), (rows, 2 * half), (rows,)))
    library().ready().rotary_tables(
        positions.data_ptr(), frequencies.data_ptr(), rows, half, logn_from or 0, cos.data_ptr(), sin.data_ptr(),
        logn.data_ptr(),
    )  # fmt: skip
    return cos, sin, logn


def greedy(logits: Tensor) -> SampledTokens:
    """`reference.greedy`."""
    if logits.dtype not in FLOATS:
        return reference.greedy(logits)
    logits, rows = logits.contiguous(), len(logits)
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    library().ready().greedy(
        logits.data_ptr(), CODES[logits.dtype], rows, logits.shape[1], tokens.data_ptr(), logprobs.data_ptr()
    )
    return SampledTokens(tokens, logprobs)


def sample(logits: Tensor, rows: SamplingRows) -> SampledTokens:
    """`reference.sample`, with log probabilities from those of `greedy`: a token has one, however others are chosen."""
    if logits.dtype not in FLOATS:
        return reference.sample(logits, rows)
    tokens, finite = choose(logits, rows)
    likeliest = greedy(logits)
    ids = torch.stack([tokens, likeliest.token_ids], 1)
    chosen, highest = logits.gather(1, ids).float().unbind(1)
    return SampledTokens(tokens, torch.where(finite, chosen - highest + likeliest.logprobs, math.nan))


def rotary_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`reference.rotary_to_cache`, for qkv [n, 3 * H * d]: CPU kernels have no partial sums."""
    heads, block_size, _ = k_cache.shape[1:]
    plain = all(t.is_contiguous() for t in (k_cache, v_cache, cos, sin, logn, slots))
    if qkv.dtype not in FLOATS or qkv.dim() == 3 or not plain:
        warn_fallback("rotary_to_cache", _unsupported(qkv, k_cache, v_cache))
        return reference.rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
    qkv, head_dim = qkv.contiguous(), qkv.shape[-1] // (3 * heads)
    q = empty((len(qkv), heads, head_dim), qkv.dtype)
    library().ready().rotary_to_cache(
        qkv.data_ptr(), CODES[qkv.dtype], len(qkv), heads, head_dim, cos.data_ptr(), sin.data_ptr(), cos.shape[-1],
        logn.data_ptr(), slots.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), CODES[k_cache.dtype], len(k_cache),
        block_size, q.data_ptr(),
    )  # fmt: skip
    return q


def _same_floats(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in FLOATS and all(t.dtype == x.dtype and t.is_contiguous() for t in others)


def _unsupported(*tensors: Tensor) -> str:
    """Say which dtypes and shapes a kernel does not support."""
    kinds = (f"{dtype_name(t.dtype)} {list(t.shape)}" for t in tensors)
    return f"its kernel does not support {', '.join(kinds)}"
