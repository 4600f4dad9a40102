"""Rotary embedding and log-n scaling after the fused projection, and keys and values into the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import SCALE_BYTES, cache_width
from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.kv_tiles import max_or_nan, round_to_int8, scales_at
from qvl_kernels.triton.launch import Launch, Spec, counted
from qvl_kernels.triton.partial_sums import load_sum
from qvl_kernels.util import cdiv

FULL_GPU_ROWS = 128  # that fill the GPU with programs


@triton.jit
def _store(
    cache_ptr, start, slot, head_mask, first, second, passthrough, rotary_mask, pass_mask, column, pass_column,
    ROTARY_HALF: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, INT8: tl.constexpr, HAS_PASS: tl.constexpr,
):  # fmt: skip
    """Store vectors into a slot of the blocks at `start`, channels first | second | passthrough, and an int8 scale."""
    if INT8:
        top = tl.reduce(max_or_nan(tl.abs(first), tl.abs(second)), 1, max_or_nan)
        if HAS_PASS:
            top = max_or_nan(top, tl.reduce(tl.abs(passthrough), 1, max_or_nan))
        tl.store(scales_at(cache_ptr, start, D, BLOCK_SIZE) + slot, (top * (1 / 127))[:, None], head_mask)
        factor = tl.where(top > 0, 127.0 / top, 0.0)[:, None]
        first, second = round_to_int8(first, factor), round_to_int8(second, factor)
        if HAS_PASS:
            passthrough = round_to_int8(passthrough, factor)
    dtype = cache_ptr.dtype.element_ty
    at = start + slot * D
    tl.store(cache_ptr + at + column, first.to(dtype), rotary_mask)
    tl.store(cache_ptr + at + ROTARY_HALF + column, second.to(dtype), rotary_mask)
    if HAS_PASS:
        tl.store(cache_ptr + at + pass_column, passthrough.to(dtype), pass_mask)


@triton.jit(do_not_specialize=["rows"])  # 1 would be a constant
def rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, logn_ptr, slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    rows, H,
    D: tl.constexpr, ROTARY_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_PASS: tl.constexpr,
    EVEN_HEADS: tl.constexpr,
):  # fmt: skip
    """q = round(rotate(q)) * logn; caches[slot] = rotate(k), v, for HEADS heads of one row.

    rotate: channels j and j' = j + ROTARY_HALF of 2 * ROTARY_HALF become x_j cos_j - x_j' sin_j and x_j' cos_j' +
    x_j sin_j'; channels beyond pass through (Su et al. 2021, GPT-NeoX's order). qkv [SPLITS or 1, rows, 3, H, D]; cos,
    sin float32 [rows, 2 * ROTARY_HALF]; q [rows, H, D]; caches [blocks, H, BLOCK_SIZE, WIDTH] as in `kv_tiles`. The
    powers of two BLOCK_HALF and BLOCK_PASS hold ROTARY_HALF and D - 2 * ROTARY_HALF channels. EVEN_HEADS: HEADS divides
    H, and no head is masked.
    """
    dtype = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head_offset = tl.arange(0, HEADS)
    heads = tl.program_id(1) * HEADS + head_offset
    count = HEADS if EVEN_HEADS else H - tl.program_id(1) * HEADS
    head_mask = (head_offset < count)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    pass_column = 2 * ROTARY_HALF + tl.arange(0, BLOCK_PASS)[None, :]
    half_mask = column < ROTARY_HALF
    rotary_mask, pass_mask = head_mask & half_mask, head_mask & (pass_column < D)
    has_passthrough: tl.constexpr = 2 * ROTARY_HALF < D

    table = row * 2 * ROTARY_HALF + tl.arange(0, 2)[:, None] * ROTARY_HALF + column
    cos_1, cos_2 = tl.split(tl.trans(tl.load(cos_ptr + table, half_mask, 0.0)))
    sin_1, sin_2 = tl.split(tl.trans(tl.load(sin_ptr + table, half_mask, 0.0)))
    logn = tl.load(logn_ptr + row).to(dtype).to(tl.float32)
    slot = tl.load(slots_ptr + row)
    store_mask = (head_offset < tl.where(slot >= 0, count, 0))[:, None]
    cached = (slot // BLOCK_SIZE * H + heads[:, None]) * (BLOCK_SIZE * WIDTH)
    split_stride = rows.to(tl.int64) * 3 * H * D
    at = (row * 3 * H + heads[:, None]) * D

    for part in tl.static_range(3):  # q, k, v
        source = at + part * H * D
        first = load_sum(qkv_ptr, source + column, split_stride, rotary_mask, dtype, SPLITS)
        second = load_sum(qkv_ptr, source + ROTARY_HALF + column, split_stride, rotary_mask, dtype, SPLITS)
        passthrough = first
        if has_passthrough:
            passthrough = load_sum(qkv_ptr, source + pass_column, split_stride, pass_mask, dtype, SPLITS)
        if part < 2:
            # with explicit fused operations, so that `new_channels` rounds alike
            rotated = tl.fma(first, cos_1, -(second * sin_1))
            second = tl.fma(second, cos_2, first * sin_2).to(dtype).to(tl.float32)
            first = rotated.to(dtype).to(tl.float32)
        if part == 0:
            out = q_ptr + (row * H + heads[:, None]) * D
            tl.store(out + column, (first * logn).to(dtype), rotary_mask)
            tl.store(out + ROTARY_HALF + column, (second * logn).to(dtype), rotary_mask)
            if has_passthrough:
                tl.store(out + pass_column, (passthrough * logn).to(dtype), pass_mask)
        else:
            cache_ptr = k_cache_ptr if part == 1 else v_cache_ptr
            _store(
                cache_ptr, cached, slot % BLOCK_SIZE, store_mask, first, second, passthrough, store_mask & half_mask,
                store_mask & (pass_column < D), column, pass_column, ROTARY_HALF, D, BLOCK_SIZE, INT8, has_passthrough,
            )  # fmt: skip


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
    """`reference.rotary_to_cache`: qkv [n, 3 * H * d], or float32 partial sums [S, n, 3 * H * d] rounded to `dtype`.

    A row with a slot below 0 is rotated and not stored: it pads the batch of a captured graph.
    """
    checks.device("rotary_to_cache", qkv, cos, sin, logn, k_cache, v_cache, slots)
    heads = k_cache.shape[1]
    q = qkv.new_empty(qkv.shape[-2], heads, qkv.shape[-1] // (3 * heads), dtype=dtype)
    _plan(qkv, cos, sin, logn, k_cache, v_cache, slots, q).run()
    return q


def heads_per_program(rows: int) -> int:
    """Heads of a program: 4 make one load of 128 bits a lane; with many rows 8, for half the fixed cost of a row."""
    return 4 if rows < FULL_GPU_ROWS else 8


class NewTokens(NamedTuple):
    """What the fused projection and the rotary tables hold of n tokens, and where their keys and values go."""

    qkv: Tensor  # [n, 3 * H * d], or float32 partial sums [S, n, 3 * H * d]
    cos: Tensor  # float32 [n, r]
    sin: Tensor
    logn: Tensor  # float32 [n]
    slots: Tensor  # int64 [n]


def check(op: str, new: NewTokens, k_cache: Tensor, v_cache: Tensor, q: Tensor) -> None:
    """Raises ValueError unless the tensors fit q [n, H, d], of which only shape and dtype are looked at."""
    qkv, cos, sin, logn, slots = new
    rows, heads, head_dim = q.shape
    half, int8 = cos.shape[-1] // 2, k_cache.dtype == torch.int8
    shape = (rows, 3 * heads * head_dim)
    if qkv.dim() == 3:
        checks.tensor(op, "qkv", qkv, (None, *shape), torch.float32)
    else:
        checks.tensor(op, "qkv", qkv, shape, q.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(op, name, table, (rows, 2 * half), torch.float32)
    if not 0 < 2 * half <= head_dim:
        raise ValueError(f"{op}: {2 * half} rotary channels; expected 2 to the {head_dim} of a head")
    checks.tensor(op, "logn", logn, (rows,), torch.float32)
    checks.tensor(op, "slots", slots, (rows,), torch.int64)
    width = cache_width(head_dim, k_cache.dtype)
    if int8 and width % SCALE_BYTES:
        raise ValueError(f"{op}: heads of {head_dim} channels; an int8 cache needs a multiple of {SCALE_BYTES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(op, name, cache, (None, heads, None, width), torch.int8 if int8 else q.dtype)


def _plan(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, q: Tensor
) -> Launch:
    check("rotary_to_cache", NewTokens(qkv, cos, sin, logn, slots), k_cache, v_cache, q)
    rows, heads, head_dim = q.shape
    half, width, int8 = cos.shape[-1] // 2, k_cache.shape[-1], k_cache.dtype == torch.int8
    heads_at_once = heads_per_program(rows)
    block_half, block_pass = triton.next_power_of_2(half), triton.next_power_of_2(max(head_dim - 2 * half, 1))
    return Launch(
        rotary_kernel,
        (rows, cdiv(heads, heads_at_once)),
        {"qkv_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, "logn_ptr": logn, "slots_ptr": slots, "q_ptr": q,
         "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "rows": rows, "H": heads},
        {"D": head_dim, "ROTARY_HALF": half, "BLOCK_SIZE": k_cache.shape[2], "WIDTH": width, "INT8": int8,
         "SPLITS": len(qkv) if qkv.dim() == 3 else 0, "HEADS": heads_at_once, "BLOCK_HALF": block_half,
         "BLOCK_PASS": block_pass, "EVEN_HEADS": heads % heads_at_once == 0},
        warps=1,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """32 heads of 128: 1 and 16 rows, which captured decode steps rotate in attention; prefill of 2048 rows."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    specs, parts = [], 2
    for rows, splits, cache_dtype in (
        (1, 0, torch.bfloat16),
        (1, parts, torch.bfloat16),
        (16, parts, torch.bfloat16),
        (16, parts, torch.int8),
        (2048, 0, torch.bfloat16),
        (2048, 0, torch.int8),
    ):
        shape = (rows, 3 * 4096)
        qkv = empty(splits, *shape, dtype=torch.float32) if splits else empty(*shape)
        tables, logn = empty(rows, 128, dtype=torch.float32), empty(rows, dtype=torch.float32)
        cache, slots = empty(256, 32, 16, cache_width(128, cache_dtype), dtype=cache_dtype), logn.long()
        q = empty(rows, 32, 128)
        cached = 2 * rows * 32 * cache.shape[-1] * cache.element_size()
        moved = qkv.nbytes + 2 * tables.nbytes + logn.nbytes + slots.nbytes + q.nbytes + cached
        name = ["rotary_to_cache", counted(rows, "row"), *[counted(splits, "split")] * bool(splits)]
        name += ["int8 KV"] * (cache_dtype == torch.int8)
        launch = _plan(qkv, tables, tables, logn, cache, cache, slots, q)
        specs.append(Spec(", ".join(name), launch, moved, max_ratio=0.3, min_wide=0.9))
    return specs
