"""Between the fused projection and attention: rotary embedding, log-n, and keys and values into the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.reference import SCALE_BYTES, cache_width
from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.kv_tiles import scales_at
from qvl_kernels.triton.launch import Launch, Spec, blocks, counted
from qvl_kernels.triton.linear.int4_shapes import decode_splits

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to a whole number, ties to even
MANY = 128  # rows that fill the GPU with programs


@triton.jit
def _vectors(x_ptr, at, apart, inside, dtype: tl.constexpr, SPLITS: tl.constexpr):
    """Values at `at`; of SPLITS partial sums `apart` from one another (0: whole), the sum, rounded to dtype."""
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(x_ptr + split * apart + at, inside, 0.0)
    return x.to(dtype).to(tl.float32) if SPLITS > 0 else x


@triton.jit
def _levels(x, factor):
    """x * factor rounded to int8: the low byte of the float32 that ROUND has pushed it into."""
    return (x * factor + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store(
    cache_ptr, start, slot, head, first, second, rest, turns, passes, column, beyond,
    TURNED: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, INT8: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Vectors into a slot of the blocks that start at `start`: channels first | second | rest; in int8 their scale."""
    if INT8:
        top = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
        if PARTIAL:
            top = tl.maximum(top, tl.max(tl.abs(rest), 1))
        tl.store(scales_at(cache_ptr, start, D, BLOCK_SIZE) + slot, (top * (1 / 127))[:, None], head)
        factor = tl.where(top > 0, 127.0 / top, 0.0)[:, None]
        first, second = _levels(first, factor), _levels(second, factor)
        if PARTIAL:
            rest = _levels(rest, factor)
    dtype = cache_ptr.dtype.element_ty
    at = start + slot * D
    tl.store(cache_ptr + at + column, first.to(dtype), turns)
    tl.store(cache_ptr + at + TURNED + column, second.to(dtype), turns)
    if PARTIAL:
        tl.store(cache_ptr + at + beyond, rest.to(dtype), passes)


@triton.jit(do_not_specialize=["rows"])  # 1 would be a constant
def rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, logn_ptr, slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,
    rows, H,
    D: tl.constexpr, TURNED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """q = round(turn(q)) * logn; caches[slot] = turn(k), v, for HEADS heads of one row.

    turn: channels j and j + TURNED of 2 * TURNED become x_j cos_j - x_j' sin_j and x_j' cos_j' + x_j sin_j'; those
    beyond pass (Su et al. 2021, in GPT-NeoX's order). qkv [SPLITS or 1, rows, 3, H, D]; cos, sin float32
    [rows, 2 * TURNED]; q [rows, H, D]; caches [blocks, H, BLOCK_SIZE, WIDTH] that lie as `kv_tiles` says. HALF and REST
    are the powers of two that hold TURNED and D - 2 * TURNED channels; WHOLE: HEADS divides H, and nothing is masked.
    """
    dtype = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    some = tl.arange(0, HEADS)
    heads = tl.program_id(1) * HEADS + some
    count = HEADS if WHOLE else H - tl.program_id(1) * HEADS
    head = (some < count)[:, None]
    column = tl.arange(0, HALF)[None, :]
    beyond = 2 * TURNED + tl.arange(0, REST)[None, :]
    turning = column < TURNED
    turns, passes = head & turning, head & (beyond < D)
    partial: tl.constexpr = 2 * TURNED < D

    table = row * 2 * TURNED + tl.arange(0, 2)[:, None] * TURNED + column
    cos_1, cos_2 = tl.split(tl.trans(tl.load(cos_ptr + table, turning, 0.0)))
    sin_1, sin_2 = tl.split(tl.trans(tl.load(sin_ptr + table, turning, 0.0)))
    logn = tl.load(logn_ptr + row).to(dtype).to(tl.float32)
    slot = tl.load(slots_ptr + row)
    stored = (some < tl.where(slot >= 0, count, 0))[:, None]
    cached = (slot // BLOCK_SIZE * H + heads[:, None]) * (BLOCK_SIZE * WIDTH)
    apart = rows.to(tl.int64) * 3 * H * D
    at = (row * 3 * H + heads[:, None]) * D

    for part in tl.static_range(3):  # q, k, v
        source = at + part * H * D
        first = _vectors(qkv_ptr, source + column, apart, turns, dtype, SPLITS)
        second = _vectors(qkv_ptr, source + TURNED + column, apart, turns, dtype, SPLITS)
        rest = first
        if partial:
            rest = _vectors(qkv_ptr, source + beyond, apart, passes, dtype, SPLITS)
        if part < 2:
            turned = first * cos_1 - second * sin_1
            second = (second * cos_2 + first * sin_2).to(dtype).to(tl.float32)
            first = turned.to(dtype).to(tl.float32)
        if part == 0:
            out = q_ptr + (row * H + heads[:, None]) * D
            tl.store(out + column, (first * logn).to(dtype), turns)
            tl.store(out + TURNED + column, (second * logn).to(dtype), turns)
            if partial:
                tl.store(out + beyond, (rest * logn).to(dtype), passes)
        else:
            cache_ptr = k_cache_ptr if part == 1 else v_cache_ptr
            _store(cache_ptr, cached, slot % BLOCK_SIZE, stored, first, second, rest, stored & turning,
                   stored & (beyond < D), column, beyond, TURNED, D, BLOCK_SIZE, INT8, partial)  # fmt: skip


def rotary_to_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`reference.rotary_to_cache`: qkv [n, 3 * H * d], or float32 partial sums [S, n, 3 * H * d] taken as `dtype`.

    A row with a slot below 0 is turned and not stored: it pads the batch of a captured graph.
    """
    checks.device("rotary_to_cache", qkv, cos, sin, logn, k_cache, v_cache, slots)
    heads = k_cache.shape[1]
    q = qkv.new_empty(qkv.shape[-2], heads, qkv.shape[-1] // (3 * heads), dtype=dtype)
    _plan(qkv, cos, sin, logn, k_cache, v_cache, slots, q).run()
    return q


def heads_at_once(rows: int) -> int:
    """Heads of a program: 4 make one load of 128 bits a lane; of many rows 8, which halves what a row costs besides."""
    return 4 if rows < MANY else 8


def _plan(
    qkv: Tensor, cos: Tensor, sin: Tensor, logn: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, q: Tensor
) -> Launch:
    op = "rotary_to_cache"
    rows, heads, head_dim = q.shape
    turned, int8 = cos.shape[-1] // 2, k_cache.dtype == torch.int8
    shape = (rows, 3 * heads * head_dim)
    if qkv.dim() == 3:
        checks.tensor(op, "qkv", qkv, (None, *shape), torch.float32)
    else:
        checks.tensor(op, "qkv", qkv, shape, q.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(op, name, table, (rows, 2 * turned), torch.float32)
    if not 0 < 2 * turned <= head_dim:
        raise ValueError(f"{op}: {2 * turned} channels turn; expected 2 to the {head_dim} of a head")
    checks.tensor(op, "logn", logn, (rows,), torch.float32)
    checks.tensor(op, "slots", slots, (rows,), torch.int64)
    width = cache_width(head_dim, k_cache.dtype)
    if int8 and width % SCALE_BYTES:
        raise ValueError(f"{op}: heads of {head_dim} channels; an int8 cache needs a multiple of {SCALE_BYTES}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(op, name, cache, (None, heads, None, width), torch.int8 if int8 else q.dtype)
    at_once = heads_at_once(rows)
    half, rest = triton.next_power_of_2(turned), triton.next_power_of_2(max(head_dim - 2 * turned, 1))
    return Launch(
        rotary_kernel,
        (rows, blocks(heads, at_once)),
        {"qkv_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, "logn_ptr": logn, "slots_ptr": slots, "q_ptr": q,
         "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "rows": rows, "H": heads},
        {"D": head_dim, "TURNED": turned, "BLOCK_SIZE": k_cache.shape[2], "WIDTH": width, "INT8": int8,
         "SPLITS": len(qkv) if qkv.dim() == 3 else 0, "HEADS": at_once, "HALF": half, "REST": rest,
         "WHOLE": heads % at_once == 0},
        warps=1,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """32 heads of 128: decode with 1 and 16 rows, of packed linears' partial sums and whole; prefill of 2048 rows."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    specs, parts = [], decode_splits(capability, "qkv")
    for rows, splits, cache_dtype in (
        (1, 0, torch.bfloat16), (1, parts, torch.bfloat16), (16, parts, torch.bfloat16), (16, parts, torch.int8),
        (2048, 0, torch.bfloat16), (2048, 0, torch.int8),
    ):  # fmt: skip
        shape = (rows, 3 * 4096)
        qkv = empty(splits, *shape, dtype=torch.float32) if splits else empty(*shape)
        tables, logn = empty(rows, 128, dtype=torch.float32), empty(rows, dtype=torch.float32)
        cache, slots = empty(256, 32, 16, cache_width(128, cache_dtype), dtype=cache_dtype), logn.long()
        q = empty(rows, 32, 128)
        stored = 2 * rows * 32 * cache.shape[-1] * cache.element_size()
        moved = qkv.nbytes + 2 * tables.nbytes + logn.nbytes + slots.nbytes + q.nbytes + stored
        name = ["rotary_to_cache", counted(rows, "row"), *[counted(splits, "split")] * bool(splits)]
        name += ["int8 KV"] * (cache_dtype == torch.int8)
        launch = _plan(qkv, tables, tables, logn, cache, cache, slots, q)
        per_layer = int(splits > 0 and cache_dtype != torch.int8)
        specs.append(Spec(", ".join(name), launch, moved, max_ratio=0.3, min_wide=0.9, per_layer=per_layer))
    return specs
