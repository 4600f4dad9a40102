"""Every op in plain torch, without tricks: its definition, and what runs where nothing faster does.

Shapes: n rows (tokens of all requests of a step, one after another, no padding), R requests, D channels, H heads of
d channels, P pictures of L patches. A paged KV cache is [blocks, H, block_size, d], so that a block of a head is one
contiguous run; a slot is block * block_size + offset. Section numbers are those of the Qwen-VL specification that
the tests are built on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# --- linear ------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., in] times weight [out, in] transposed, plus bias [out]."""
    return F.linear(x, weight, bias)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 words [rows, columns] to integers [rows * 32 / bits, columns], lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, 1)
    values: Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)  # the mask removes what the signed shift drags in
    return values.reshape(-1, words.shape[1])


def gptq_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int
) -> Tensor:
    """The float32 weight [out, in] of a GPTQ linear: scales * (q - (zeros + zero_offset)).

    qweight int32 [in * bits / 32, out]; qzeros int32 [G, out * bits / 32]; scales float [G, out]; g_idx int32 [in] is
    the group of each input, or None for groups of equal size one after another.
    """
    q = unpack_rows(qweight, bits)
    zeros = unpack_rows(qzeros.t(), bits).t() + zero_offset
    if g_idx is None:
        size = -(-q.shape[0] // scales.shape[0])
        g_idx = torch.arange(q.shape[0], device=q.device) // size
    group = g_idx.long()
    return (scales.float()[group] * (q - zeros[group])).t()


def gptq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, zero_offset: int,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [.., in] times a GPTQ linear, its weight rounded once, to x's dtype."""
    weight = gptq_dequantize(qweight, qzeros, scales, g_idx, bits, zero_offset)
    return F.linear(x, weight.to(x.dtype), bias)


# --- norms and elementwise ---------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, then times weight [D] (5.2)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalised over the last axis, times weight [D] plus bias [D]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def swiglu(up: Tensor, gate: Tensor) -> Tensor:
    """up * silu(gate), elementwise (5.2)."""
    return up * F.silu(gate)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x * Phi(x) with the error function (4.4); the tanh form is off by 8e-4 in the tower's output."""
    return F.gelu(x)


# --- decoder attention -------------------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [n, H, d] in float32, rounded to x's dtype; cos, sin [n, r] with r <= d rotated channels.

    Channels j and j + r/2 turn together (Su et al. 2021 in GPT-NeoX's order); those beyond r pass.
    """
    rotated, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    turned = rotated * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def rotary_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """Rotate q and k, scale q by log-n, store k and v: the step between the fused projection and attention (5.3).

    qkv [n, 3 * H * d]; cos, sin float32 [n, r]; logn float32 [n]; caches [blocks, H, block_size, d]; slots int64 [n],
    all different. Gives q [n, H, d]; k and v are written into the caches.
    """
    heads, block_size, head_dim = k_cache.shape[1:]
    q, k, v = qkv.view(len(qkv), 3, heads, head_dim).unbind(1)
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = rotate_half(k, cos, sin).to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v.to(v_cache.dtype)
    return rotate_half(q, cos, sin) * logn.to(q.dtype).view(-1, 1, 1)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_starts: Sequence[int],
    context_lens: Sequence[int],
) -> Tensor:  # fmt: skip
    """Causal attention of each request's new rows over its cached keys, those of the new rows included (5.3).

    q [n, H, d]; block_tables int64 [R, most blocks]; query_starts R + 1 row numbers, so that request r has the rows
    query_starts[r] to query_starts[r + 1], which are the last of its context_lens[r] tokens. One row a request is
    decoding, more are prefill, whole or in chunks. Scale 1/sqrt(d). Gives [n, H * d].
    """
    block_size, out = k_cache.shape[2], torch.empty_like(q)
    for r, length in enumerate(context_lens):
        start, end = query_starts[r], query_starts[r + 1]
        blocks = block_tables[r, : -(-length // block_size)]
        k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(q.dtype) for cache in (k_cache, v_cache))
        rows = end - start
        causal = None
        if rows > 1:
            causal = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        y = F.scaled_dot_product_attention(q[start:end].transpose(0, 1)[None], k[None], v[None], attn_mask=causal)
        out[start:end] = y[0].transpose(0, 1)
    return out.flatten(1)


# --- the same over an int8 cache -------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., d] to int8 [.., d] and float32 scales [..], so that x is about q * scale: symmetric, 127 the largest."""
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / 127
    return (x.float() / scale.unsqueeze(-1)).round().to(torch.int8), scale


def rotary_to_cache_int8(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor,
    v_scale: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """As `rotary_to_cache`, into int8 caches with a scale for each token and head, float32 [blocks, H, block_size]."""
    heads, block_size, head_dim = k_cache.shape[1:]
    q, k, v = qkv.view(len(qkv), 3, heads, head_dim).unbind(1)
    blocks, offsets = slots // block_size, slots % block_size
    for rows, cache, scales in ((rotate_half(k, cos, sin), k_cache, k_scale), (v, v_cache, v_scale)):
        cache[blocks, :, offsets], scales[blocks, :, offsets] = quantize_rows(rows)
    return rotate_half(q, cos, sin) * logn.to(q.dtype).view(-1, 1, 1)


def paged_attention_int8(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, block_tables: Tensor,
    query_starts: Sequence[int], context_lens: Sequence[int],
) -> Tensor:  # fmt: skip
    """As `paged_attention`, over int8 caches: each row is unpacked to float32 and rounded to q's dtype."""
    size = k_cache.shape[2]
    used = torch.unique(torch.cat([row[: -(-n // size)] for row, n in zip(block_tables, context_lens, strict=True)]))
    place = torch.zeros(len(k_cache), dtype=torch.int64, device=q.device)
    place[used] = torch.arange(len(used), device=q.device)
    pairs = ((k_cache, k_scale), (v_cache, v_scale))
    k, v = ((cache[used] * scale[used].unsqueeze(-1)).to(q.dtype) for cache, scale in pairs)
    return paged_attention(q, k, v, place[block_tables], query_starts, context_lens)


# --- vision attention --------------------------------------------------------------------------------------------


def vision_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of a picture's patches to each other, [P, L, W]; qkv [P, L, 3 * W] holds q, k, v PER HEAD (4.4)."""
    pictures, patches, _ = qkv.shape
    q, k, v = qkv.view(pictures, patches, heads, 3, -1).permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The resampler's attention: q [Q, D], the same for all pictures, to k and v [P, L, D] (4.5). Gives [P, Q, D]."""
    k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (k, v))
    q = q.view(len(q), heads, -1).transpose(0, 1).expand(len(k), -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
