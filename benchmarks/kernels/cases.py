"""Every op in every regime at the sizes of the 9.6 B model: ours, torch's equivalent, bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_kernels.util import cdiv

WIDTH, MLP, HEADS, HEAD = 4096, 11008, 32, 128
VISION_HEADS, VISION_HEAD, VISION_MLP, PATCHES = 16, 104, 8192, 1024
GROUP, SLOTS, EPS = 128, 16, 1e-6
COLD = 256 << 20  # bytes of weights or cache that calls go round, so that none is in the CPU's caches


class Case(NamedTuple):
    """One op in one regime; a call does the work once."""

    ours: Callable[[], object]
    torch: Callable[[], object] | None  # torch's equivalent in the same dtype
    nbytes: int  # that must be read and written
    operations: int


class Setting(NamedTuple):
    """What runs, where, in which dtype; `scale` divides the sizes, for a try."""

    ops: Ops
    device: torch.device
    dtype: torch.dtype
    scale: int = 1


def makers() -> dict[str, Callable[[Setting], Case]]:
    """Every case by its name; made when called, for each holds some hundred megabytes."""
    case_makers: dict[str, Callable[[Setting], Case]] = {}
    for rows in (1, 8, 32, 512):
        case_makers[f"int4 linear, qkv, {rows}"] = partial(int4_linear, rows=rows, inputs=WIDTH, outputs=3 * WIDTH)
        case_makers[f"int4 linear, down, {rows}"] = partial(int4_linear, rows=rows, inputs=MLP, outputs=WIDTH)
    for rows in (1, 512):
        case_makers[f"dense linear, {rows}"] = partial(dense_linear, rows=rows)
        for op in (rms_norm, add_rms_norm, swiglu):
            case_makers[f"{op.__name__}, {rows}"] = partial(op, rows=rows)
    for context in (300, 2000):
        for kind in ("16-bit", "int8"):
            name = f"decode attention, context {context}, {kind}"
            case_makers[name] = partial(decode_attention, context=context, int8=kind == "int8")
    for tokens in (512, 2048):
        case_makers[f"prefill attention, {tokens}"] = partial(prefill_attention, tokens=tokens)
    return case_makers | {"vision attention": vision_attention, "layer_norm": layer_norm, "gelu": gelu}


def int4_linear(at: Setting, rows: int, inputs: int, outputs: int) -> Case:
    """A GPTQ linear in the `fast` precision against a dense one; few rows go round cold weights."""
    inputs, outputs = inputs // at.scale // GROUP * GROUP, outputs // at.scale // 16 * 16
    nbytes = inputs * outputs // 2 + 2 * outputs * (inputs // GROUP)
    words = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), dtype=torch.int64).to(torch.int32)
    zeros = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
    scales = torch.full((inputs // GROUP, outputs), 0.002, dtype=torch.float16)
    words, zeros, scales = (t.to(at.device) for t in (words, zeros, scales))
    copies = max(1, COLD // nbytes) if rows <= 32 else 1
    bound = [at.ops.prepare_gptq(words, zeros, scales, None, 4, 1, None, "fast") for _ in range(copies)]
    x, dense = (torch.randn(n, inputs, device=at.device).to(at.dtype) for n in (rows, outputs))
    return Case(
        in_turn([partial(linear.call, x) for linear in bound]),
        lambda: F.linear(x, dense),
        nbytes + x.nbytes + rows * outputs * at.dtype.itemsize,
        2 * rows * inputs * outputs,
    )


def dense_linear(at: Setting, rows: int) -> Case:
    """A square linear of the model's width over cold weights."""
    width = WIDTH // at.scale
    copies = max(1, COLD // (width * width * at.dtype.itemsize))
    weights = [torch.randn(width, width, device=at.device).to(at.dtype) for _ in range(copies)]
    x = torch.randn(rows, width, device=at.device).to(at.dtype)
    bound = [at.ops.prepare_linear(w) for w in weights]
    return Case(
        in_turn([partial(linear.call, x) for linear in bound]),
        in_turn([partial(F.linear, x, weight) for weight in weights]),
        weights[0].nbytes + 2 * x.nbytes,
        2 * rows * width**2,
    )


def rms_norm(at: Setting, rows: int) -> Case:
    """RMSNorm of x [rows, width]."""
    x, _, weight = _stream(at, rows)
    shape = weight.shape
    return Case(
        lambda: at.ops.rms_norm(x, weight, EPS), lambda: F.rms_norm(x, shape, weight, EPS), 2 * x.nbytes, 4 * x.numel()
    )


def add_rms_norm(at: Setting, rows: int) -> Case:
    """The residual add fused with the next RMSNorm, [rows, width]."""
    x, update, weight = _stream(at, rows)
    return Case(
        lambda: at.ops.add_rms_norm(x, update, weight, EPS),
        lambda: F.rms_norm(x + update, weight.shape, weight, EPS),
        4 * x.nbytes,
        5 * x.numel(),
    )


def swiglu(at: Setting, rows: int) -> Case:
    """SwiGLU of the fused up and gate projections, [rows, 2 * mlp] to [rows, mlp]."""
    both = torch.randn(rows, 2 * (MLP // at.scale), device=at.device).to(at.dtype)

    def plain() -> Tensor:
        up, gate = both.chunk(2, -1)
        return up * F.silu(gate)

    return Case(lambda: at.ops.swiglu(both, at.dtype), plain, both.nbytes * 3 // 2, 2 * both.numel())


def decode_attention(at: Setting, context: int, int8: bool) -> Case:
    """Attention of one token after `context` tokens, over cold caches."""
    stored, heads, context = torch.int8 if int8 else at.dtype, HEADS // at.scale, context // at.scale
    blocks, width = cdiv(context, SLOTS), at.ops.cache_width(HEAD, stored)
    nbytes = 2 * context * heads * width * stored.itemsize
    copies = max(1, COLD // nbytes)
    table = torch.randperm(blocks).view(1, -1).to(at.device)
    caches = [torch.zeros(2, blocks, heads, SLOTS, width, dtype=stored, device=at.device) for _ in range(copies)]
    q = torch.randn(1, heads, HEAD, device=at.device).to(at.dtype)
    ours = in_turn([partial(at.ops.paged_attention, q, k, v, table, [0, 1], [context]) for k, v in caches])
    if int8:
        return Case(ours, None, nbytes, 4 * context * heads * HEAD)
    keys = [torch.zeros(2, 1, heads, context, HEAD, dtype=at.dtype, device=at.device) for _ in range(copies)]
    query = q.transpose(0, 1)[None]
    plain = in_turn([partial(F.scaled_dot_product_attention, query, k, v) for k, v in keys])
    return Case(ours, plain, nbytes, 4 * context * heads * HEAD)


def prefill_attention(at: Setting, tokens: int) -> Case:
    """Causal attention of a prompt of `tokens` tokens."""
    heads, tokens = HEADS // at.scale, tokens // at.scale
    blocks = cdiv(tokens, SLOTS)
    k_cache, v_cache = torch.randn(2, blocks, heads, SLOTS, HEAD, device=at.device).to(at.dtype)
    q = torch.randn(tokens, heads, HEAD, device=at.device).to(at.dtype)
    table = torch.arange(blocks, device=at.device).view(1, -1)
    query, keys, values = torch.randn(3, 1, heads, tokens, HEAD, device=at.device).to(at.dtype)
    return Case(
        lambda: at.ops.paged_attention(q, k_cache, v_cache, table, [0, tokens], [tokens]),
        lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=True),
        4 * q.nbytes,
        2 * tokens**2 * heads * HEAD,
    )


def vision_attention(at: Setting) -> Case:
    """Attention of the vision encoder over the patches of one image."""
    patches, heads = PATCHES // at.scale, max(1, VISION_HEADS // at.scale)
    width = heads * VISION_HEAD
    qkv = torch.randn(1, patches, 3 * width, device=at.device).to(at.dtype)
    split = [t.contiguous() for t in qkv.view(1, patches, heads, 3, -1).permute(3, 0, 2, 1, 4)]
    return Case(
        lambda: at.ops.vision_attention(qkv, heads),
        lambda: F.scaled_dot_product_attention(*split),
        qkv.nbytes * 4 // 3,
        4 * patches**2 * width,
    )


def layer_norm(at: Setting) -> Case:
    """LayerNorm of the patches of one image."""
    width = VISION_HEADS * VISION_HEAD
    x = torch.randn(PATCHES // at.scale, width, device=at.device).to(at.dtype)
    one, none = torch.ones_like(x[0]), torch.zeros_like(x[0])
    return Case(
        lambda: at.ops.layer_norm(x, one, none, EPS),
        lambda: F.layer_norm(x, (width,), one, none, EPS),
        2 * x.nbytes,
        6 * x.numel(),
    )


def gelu(at: Setting) -> Case:
    """GELU in the vision encoder's MLP, [patches, mlp]."""
    x = torch.randn(PATCHES // at.scale, VISION_MLP, device=at.device).to(at.dtype)
    return Case(lambda: at.ops.gelu(x), lambda: F.gelu(x), 2 * x.nbytes, 8 * x.numel())


def _stream(at: Setting, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    width = WIDTH // at.scale
    x, update = (torch.randn(rows, width, device=at.device).to(at.dtype) for _ in range(2))
    return x, update, torch.ones(width, device=at.device).to(at.dtype)


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs the next of `calls` each time, round and round; each works on its own memory."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(calls)
        return calls[state["next"]]()

    return call
