"""Every op in plain torch, without tricks: its definition, and the fallback where no faster kernel runs.

Shapes: n tokens (of all requests of a step, concatenated without padding), R requests, D channels, H heads of d
channels, P images of L patches. A paged KV cache is [blocks, H, block_size, d], so that a block of one head is
contiguous; an int8 cache has `SCALE_BYTES` more in the last axis. A slot is block * block_size + offset. Section
numbers (§) are those of docs/model.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.util import cdiv


def sum_partials(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a linear's float32 partial sums [S, n, out], rounded to `dtype`; an output [n, out] is unchanged."""
    return x.sum(0).to(dtype) if x.dim() == 3 else x


def concat_outputs(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate the outputs of two linears, [.., a] and [.., b], to [.., a + b]."""
    return torch.cat([first, second], -1)


# --- norms and elementwise ---------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) in float32, round it to x's dtype, multiply by weight [D] (§5.2)."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the residual stream [n, D] after an update, x + update, and its `rms_norm`; update may be partial sums."""
    x = x + sum_partials(update, x.dtype)
    return x, rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize x over the last axis, times weight [D] plus bias [D]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the vision encoder's residual stream after an update, x + update, and its `layer_norm`."""
    x = x + update
    return x, layer_norm(x, weight, bias, eps)


def swiglu(up_gate: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return up * silu(gate), [n, F], of up_gate [n, 2F] = up | gate, or of its partial sums, as `dtype` (§5.2)."""
    up, gate = sum_partials(up_gate, dtype or up_gate.dtype).chunk(2, -1)
    return up * F.silu(gate)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU, x * Phi(x) with the error function (§4.4); the tanh form is off by 8e-4 in the encoder's output."""
    return F.gelu(x)


# --- start of a step: embedding and rotary tables ---------------------------------------------------------------


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Return the rows [n, D] of table [V, D] at ids, int64 [n] below V."""
    return F.embedding(ids, table)


def rotary_tables(positions: Tensor, frequencies: Tensor, logn_from: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return cos and sin [n, r] of positions int64 [n] times inverse frequencies [n or 1, r / 2], and log-n [n] (§5.3).

    All are float32, including the product of position and frequency. Log-n is log(position + 1) / log(logn_from) and at
    least 1; it is 1 if logn_from is None.
    """
    angles = positions.float().unsqueeze(1) * frequencies
    angles = torch.cat([angles, angles], dim=1)
    if logn_from is None:
        return angles.cos(), angles.sin(), torch.ones(len(positions), device=positions.device)
    factors = (positions.double() + 1).log() / math.log(logn_from)
    return angles.cos(), angles.sin(), factors.clamp(min=1.0).float()


# --- KV cache ---------------------------------------------------------------------------------------------------

SCALE_BYTES = 4  # an int8 cache stores a vector's float32 scale after its quantized values


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """Return the elements of a cached vector, including the scale of an int8 cache."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def to_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert vectors [.., d] to a cache's `dtype`; int8: x = scale * code, with scale = max |x| / 127."""
    if dtype != torch.int8:
        return x.to(dtype)
    top = x.float().abs().amax(-1, keepdim=True)
    codes = (x.float() * torch.where(top > 0, 127 / top, 0.0)).round().to(torch.int8)
    return torch.cat([codes, (top / 127).contiguous().view(torch.int8)], -1)


def from_cached(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert cached vectors to `dtype`."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    codes, scale = stored[..., :-SCALE_BYTES], stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes * scale).to(dtype)


# --- decoder attention -------------------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x [n, H, d] in float32, rounded to x's dtype; cos, sin [n, r], r <= d.

    Channels j and j + r/2 are rotated as a pair (Su et al. 2021, in GPT-NeoX's order); those from r on are unchanged.
    """
    rotated, rest = x[..., : cos.shape[-1]].float(), x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    rotated = rotated * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
    return torch.cat([rotated.to(x.dtype), rest], -1)


def rotary_to_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    logn: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate q and k, scale q by log-n and store k and v: the step between the fused projection and attention (§5.3).

    qkv [n, 3 * H * d], or its partial sums, rounded to `dtype`; cos, sin float32 [n, r]; logn float32 [n]; caches
    [blocks, H, block_size, d]; slots int64 [n], all different. Returns q [n, H, d]; k and v are written to the caches.
    """
    heads, block_size = k_cache.shape[1:3]
    qkv = sum_partials(qkv, dtype or qkv.dtype)
    q, k, v = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = to_cached(rotate_half(k, cos, sin), k_cache.dtype)
    v_cache[blocks, :, offsets] = to_cached(v, v_cache.dtype)
    return rotate_half(q, cos, sin) * logn.to(q.dtype).view(-1, 1, 1)


def on_host(numbers: Sequence[int] | Tensor) -> Sequence[int]:
    """Copy a tensor of integers to the host, which waits for its device; other sequences are unchanged."""
    if isinstance(numbers, Tensor):
        return [int(number) for number in numbers.tolist()]
    return numbers


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Sequence[int] | Tensor,
    context_lens: Sequence[int] | Tensor,
) -> Tensor:
    """Causal attention of each request's new tokens over its cached keys, including those of the new tokens (§5.3).

    q [n, H, d]; block_tables int64 [R, max blocks]; query_starts: R + 1 offsets into q, so that the new tokens of
    request r are query_starts[r] to query_starts[r + 1], the last of its context_lens[r] tokens. One new token is
    decoding; more are a prefill, whole or chunked. If every request decodes, or if there are fewer requests than rows,
    query_starts and context_lens may be integer tensors on q's device: the kernel reads them there, so that its launch
    can be captured in a graph. Then a request may have no rows, and rows of no request are undefined. The scale is
    1/sqrt(d). Returns [n, H * d].
    """
    block_size, out = k_cache.shape[2], torch.empty_like(q)
    query_starts, context_lens = on_host(query_starts), on_host(context_lens)
    for r, length in enumerate(context_lens):
        start, end = query_starts[r], query_starts[r + 1]
        if start == end:
            continue
        blocks = block_tables[r, : cdiv(length, block_size)]
        k, v = (
            from_cached(cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length], q.dtype)
            for cache in (k_cache, v_cache)
        )
        rows = end - start
        causal = None
        if rows > 1:
            causal = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        rows_of_heads = q[start:end].transpose(0, 1)
        y = F.scaled_dot_product_attention(rows_of_heads[None], k[None], v[None], attn_mask=causal)[0]
        out[start:end] = (y + lost_nan(rows_of_heads, k, causal=True)).transpose(0, 1)
    return out.flatten(1)


def lost_nan(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """Zeros, or NaN for a row whose query or visible keys are not finite, [.., rows, 1] to be added to its attention.

    torch gives 0 where every score of a row is NaN. q [.., rows, d]; k [.., keys, d], if causal the last ones those of
    the rows.
    """
    lost = (k * 0).sum(-1, keepdim=True)
    lost = lost.cumsum(-2)[..., k.shape[-2] - q.shape[-2] :, :] if causal else lost.sum(-2, keepdim=True)
    return lost + (q * 0).sum(-1, keepdim=True)


# --- vision attention --------------------------------------------------------------------------------------------


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
    """`rotary_to_cache`, then `paged_attention` of the q that it returns: all between a block's qkv and its output.

    Shapes as there; returns [n, H * d].
    """
    q = rotary_to_cache(qkv, cos, sin, logn, k_cache, v_cache, slots, dtype)
    return paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens)


def vision_attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of each image's patches, [P, L, W]; qkv [P, L, 3 * W] holds q, k, v PER HEAD (§4.4)."""
    images, patches, _ = qkv.shape
    q, k, v = qkv.view(images, patches, heads, 3, -1).permute(3, 0, 2, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return (y + lost_nan(q, k)).transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The resampler's attention: q [Q, D], the same for all images, over k and v [P, L, D] (§4.5), to [P, Q, D]."""
    k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (k, v))
    q = q.view(len(q), heads, -1).transpose(0, 1).expand(len(k), -1, -1, -1)
    y = F.scaled_dot_product_attention(q, k, v)
    return (y + lost_nan(q, k)).transpose(1, 2).flatten(2)
