"""The GPU's ops with one order of sums: a token's bits do not depend on what else is in its step.

The ops are those of `qvl_kernels.triton`, but that more rows than a kernel of few rows takes go through it in slices,
each of which reads the weight again, and that the tokens of a prompt attend as they do while decoding, each over keys
that are split by its own position. So a prompt computes the same bits whole, in chunks, and token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvl_kernels import triton
from qvl_kernels.reference import BoundLinear, Packed, Precision
from qvl_kernels.triton import (
    LAYOUTS,
    SCALE_BYTES,
    SampledTokens,
    SamplingRows,
    add_layer_norm,
    add_rms_norm,
    cache_width,
    concat_outputs,
    cross_attention,
    embedding,
    from_cached,
    gelu,
    gptq_dequantize,
    gptq_linear,
    greedy,
    layer_norm,
    linear,
    pack_gptq,
    rms_norm,
    rotary_tables,
    rotary_to_cache,
    rotate_half,
    sample,
    sum_partials,
    swiglu,
    to_cached,
    unpack_rows,
    unpack_to_qweight,
    vision_attention,
)
from qvl_kernels.triton.attention.paged import attend
from qvl_kernels.triton.linear.configs import SMALL_M
from qvl_kernels.triton.linear.dense_linear import DenseLinear
from qvl_kernels.triton.linear.linears import PackedLinear

__all__ = [
    "LAYOUTS",
    "SCALE_BYTES",
    "BoundLinear",
    "Packed",
    "Precision",
    "SampledTokens",
    "SamplingRows",
    "add_layer_norm",
    "add_rms_norm",
    "bind",
    "cache_width",
    "concat_outputs",
    "cross_attention",
    "embedding",
    "from_cached",
    "gelu",
    "gptq_dequantize",
    "gptq_linear",
    "greedy",
    "layer_norm",
    "linear",
    "pack_gptq",
    "paged_attention",
    "prepare_gptq",
    "prepare_linear",
    "rms_norm",
    "rotary_attention",
    "rotary_tables",
    "rotary_to_cache",
    "rotate_half",
    "sample",
    "sum_partials",
    "swiglu",
    "to_cached",
    "unpack_rows",
    "unpack_to_qweight",
    "vision_attention",
]

EVERY_ROW = 1 << 31


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
) -> Tensor:
    """`triton.paged_attention`, with every row as if it were decoded."""
    return attend(q, k_cache, v_cache, block_tables, query_starts, context_lens, EVERY_ROW)


@dataclass(frozen=True, slots=True, eq=False)
class SlicedLinear:
    """A linear that takes `rows` rows at a time."""

    linear: PackedLinear | DenseLinear
    rows: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype; images [P, patches, in], whose size never changes, at once."""
        if x.dim() != 2 or len(x) <= self.rows:
            return self.linear(x)
        return torch.cat([self.linear(rows) for rows in x.split(self.rows)])


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """`triton.prepare_linear`, in slices."""
    return _sliced(triton.prepare_linear(weight, bias, precision))


def prepare_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
    precision: Precision = "exact",
) -> BoundLinear:
    """`triton.prepare_gptq`, in slices."""
    return _sliced(triton.prepare_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias, precision))


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """`triton.bind`, in slices."""
    return _sliced(triton.bind(packed, precision))


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
    """`triton.rotary_attention`, with every token as if it were decoded."""
    if isinstance(context_lens, Tensor):  # a captured step of decoding
        return triton.rotary_attention(
            qkv, cos, sin, logn, k_cache, v_cache, slots, block_tables, query_starts, context_lens, dtype
        )
    q = rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
    return paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)


def _sliced(bound: BoundLinear) -> BoundLinear:
    """The linear in slices, without what would let the next op add its partial sums.

    Torch's own products stay as they are: those of the vision encoder that no kernel takes, such as of patches, which
    always have the size of an image.
    """
    if isinstance(bound.call, PackedLinear):
        rows = SMALL_M[bound.call.weight.BITS]
    elif isinstance(bound.call, DenseLinear):
        rows = SMALL_M[16]
    else:
        return bound
    return bound._replace(call=SlicedLinear(bound.call, rows), split_k=None, gated=None)
