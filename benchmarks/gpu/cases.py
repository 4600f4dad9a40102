"""Ops and inputs for them, made on the device: at the published model's sizes, at odd ones, and tiny."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_kernels.reference import cache_width, to_cached
from qvl_kernels.util import cdiv

Outputs = tuple[Tensor, ...]
BLOCK = 16  # slots of a cache block
GROUP = 128  # inputs of a quantization group


class Case(NamedTuple):
    """An op and its inputs; `bind` returns the call to time, without the work done once at load."""

    name: str
    inputs: tuple[Any, ...]
    bind: Callable[[Ops, tuple[Any, ...]], Callable[[], Outputs]]
    nbytes: int  # that it must move at least
    timed: bool = False


def plain(op: str) -> Callable[[Ops, tuple[Any, ...]], Callable[[], Outputs]]:
    """Call an op by name; its outputs are its results and the caches it wrote."""

    def bind(ops: Ops, inputs: tuple[Any, ...]) -> Callable[[], Outputs]:
        def call() -> Outputs:
            result = getattr(ops, op)(*inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            return outputs + (inputs[4:6] if op in ("rotary_to_cache", "rotary_attention") else ())

        return call

    return bind


def prepared(op: str) -> Callable[[Ops, tuple[Any, ...]], Callable[[], Outputs]]:
    """Bind a linear; its weights are packed once."""

    def bind(ops: Ops, inputs: tuple[Any, ...]) -> Callable[[], Outputs]:
        x, *weights = inputs
        linear = getattr(ops, op)(*weights)
        return lambda: (linear(x),)

    return bind


def gated(ops: Ops, inputs: tuple[Any, ...]) -> Callable[[], Outputs]:
    """Bind a packed linear of up | gate, and take the SwiGLU of its outputs: in its kernel, if it can."""
    x, *weights = inputs
    linear = ops.prepare_gptq(*weights)
    if linear.gated is not None:
        return lambda: (linear.gated(x),)  # type: ignore[misc]  # narrowed above
    return lambda: (ops.swiglu(linear(x)),)


class Maker:
    """Random inputs of one dtype on one device, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._rng = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values of this shape, times `scale`."""
        return (torch.randn(shape, generator=self._rng, device=self.device) * scale).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Values from 0 to 1, float32."""
        return torch.rand(shape, generator=self._rng, device=self.device)

    def permutation(self, count: int) -> Tensor:
        """0 to `count` - 1 in random order."""
        return torch.randperm(count, generator=self._rng, device=self.device)

    def words(self, *shape: int) -> Tensor:
        """Random bits, int32."""
        made = torch.randint(-(2**31), 2**31, shape, generator=self._rng, device=self.device, dtype=torch.int64)
        return made.to(torch.int32)

    def case(self, op: str, inputs: tuple[Any, ...], moved: int, note: str, timed: bool) -> Case:
        """A case that calls the op by name; `moved` is in bytes."""
        return Case(f"{op}, {note}", inputs, plain(op), moved, timed)

    def rows(self, rows: int, width: int, timed: bool = False) -> Iterator[Case]:
        """Norms and activations."""
        x, up_gate, weight = self.normal(rows, width), self.normal(rows, 2 * width), self.normal(width)
        note = f"{rows} x {width}"
        yield self.case("rms_norm", (x, weight, 1e-6), 2 * x.nbytes, note, timed)
        yield self.case("add_rms_norm", (x, x.flip(0), weight, 1e-6), 4 * x.nbytes, note, timed)
        sums = torch.stack([x.float(), x.float().flip(0)])
        yield self.case("add_rms_norm", (x, sums, weight, 1e-6), 3 * x.nbytes + sums.nbytes, f"{note}, 2 sums", False)
        yield self.case("layer_norm", (x, weight, x[0].clone(), 1e-6), 2 * x.nbytes, note, timed)
        yield self.case("swiglu", (up_gate,), 3 * x.nbytes, note, timed)
        yield self.case("gelu", (x,), 2 * x.nbytes, note, timed)

    def cached(self, contexts: list[int], heads: int, dim: int, kv_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Caches with blocks in random order, and the block tables."""
        blocks_each = cdiv(max(contexts), BLOCK)
        blocks = self.permutation(len(contexts) * blocks_each)
        shape = (len(blocks), heads, BLOCK, dim)
        caches = [to_cached(self.normal(*shape), kv_dtype).contiguous() for _ in "kv"]
        return caches[0], caches[1], blocks.view(len(contexts), blocks_each)

    def attention(
        self, rows: int, context: int, requests: int, heads: int, dim: int, int8: bool = False, timed: bool = False
    ) -> Case:
        """`rows` new tokens for each of some requests, of slightly different lengths."""
        kv_dtype = torch.int8 if int8 else self.dtype
        contexts = [max(rows, context - 3 * r) for r in range(requests)]
        k, v, tables = self.cached(contexts, heads, dim, kv_dtype)
        q, starts = self.normal(rows * requests, heads, dim), [rows * r for r in range(requests + 1)]
        moved = 2 * sum(contexts) * heads * cache_width(dim, kv_dtype) * kv_dtype.itemsize + 2 * q.nbytes
        note = f"{requests} x {rows} rows after {context}, {heads} x {dim}{', int8' if int8 else ''}"
        return self.case("paged_attention", (q, k, v, tables, starts, contexts), moved, note, timed)

    def rotary(self, rows: int, heads: int, dim: int, int8: bool = False, timed: bool = False) -> Case:
        """Rotary embedding of `rows` tokens, and the write of their keys and values to the cache."""
        kv_dtype = torch.int8 if int8 else self.dtype
        qkv, angle = self.normal(rows, 3 * heads * dim), torch.arange(rows * dim, device=self.device).view(rows, dim)
        k = torch.zeros(
            cdiv(rows, BLOCK) + 1, heads, BLOCK, cache_width(dim, kv_dtype), dtype=kv_dtype, device=self.device
        )
        slots = self.permutation(rows)
        logn = torch.linspace(1, 1.2, rows, device=self.device)
        moved = 2 * qkv.nbytes + 8 * rows * dim
        inputs = (qkv, angle.float().cos(), angle.float().sin(), logn, k, k.clone(), slots)
        note = f"{rows} rows, {heads} x {dim}{', int8' if int8 else ''}"
        return self.case("rotary_to_cache", inputs, moved, note, timed)

    def new_tokens(
        self, context: int, requests: int, heads: int, dim: int, int8: bool = False, timed: bool = False
    ) -> Case:
        """A decode step of some requests from the fused projection to attention, with lengths on the device."""
        kv_dtype = torch.int8 if int8 else self.dtype
        contexts = [context - 3 * r for r in range(requests)]
        k, v, tables = self.cached(contexts, heads, dim, kv_dtype)
        qkv, angle = self.normal(requests, 3 * heads * dim), torch.arange(requests * dim, device=self.device)
        cos, sin = (f(angle.view(requests, dim).float()) for f in (torch.cos, torch.sin))
        logn, lengths = self.uniform(requests) + 1, torch.tensor(contexts, device=self.device)
        last = lengths - 1
        slots = tables.gather(1, (last // BLOCK)[:, None])[:, 0] * BLOCK + last % BLOCK
        starts = torch.arange(requests + 1, device=self.device)
        moved = 2 * sum(contexts) * heads * cache_width(dim, kv_dtype) * kv_dtype.itemsize + 4 * qkv.nbytes // 3
        note = f"{requests} x 1 row after {context}, {heads} x {dim}{', int8' if int8 else ''}"
        inputs = (qkv, cos, sin, logn, k, v, slots, tables, starts, lengths)
        return self.case("rotary_attention", inputs, moved, note, timed)

    def images(self, images: int, patches: int, heads: int, dim: int, timed: bool = False) -> Iterator[Case]:
        """Attention of the vision encoder, and of the resampler with a quarter as many queries as patches."""
        width, queries = heads * dim, max(1, patches // 4)
        qkv, note = self.normal(images, patches, 3 * width), f"{images} x {patches}, {heads} x {dim}"
        yield self.case("vision_attention", (qkv, heads), qkv.nbytes * 4 // 3, note, timed)
        q, k, v = self.normal(queries, width), *(self.normal(images, patches, width) for _ in "kv")
        yield self.case("cross_attention", (q, k, v, heads), 2 * k.nbytes + images * q.nbytes, note, timed)

    def linears(self, rows: int, inputs: int, outputs: int, timed: bool = False, odd: bool = False) -> Iterator[Case]:
        """int4 as GPTQ packs it, in order and symmetric, or `odd`: act-order and asymmetric; and dense."""
        groups, x = cdiv(inputs, GROUP), self.normal(rows, inputs)
        random_zeros = self.words(groups, outputs // 8)
        zeros = random_zeros if odd else torch.full_like(random_zeros, 0x77777777)
        order = self.permutation(inputs) // GROUP if odd else None
        scales = (self.uniform(groups, outputs) / 64 + 1 / 64).half()
        packed = (x, self.words(inputs // 8, outputs), zeros, scales, None if order is None else order.int(), 4, 1)
        moved = inputs * outputs // 2 + scales.nbytes + x.nbytes + rows * outputs * x.element_size()
        note = f"{rows} x {inputs} to {outputs}{', act-order, asymmetric' if odd else ''}"
        yield Case(f"int4 linear, {note}", packed, prepared("prepare_gptq"), moved, timed)
        if inputs < outputs:
            yield Case(
                f"int4 linear with swiglu, {note}", packed, gated, moved - rows * outputs * x.element_size() // 2
            )
        if not odd:
            weight = self.normal(outputs, inputs, scale=inputs**-0.5)
            moved = weight.nbytes + x.nbytes + rows * outputs * x.element_size()
            yield Case(f"dense linear, {note}", (x, weight), prepared("prepare_linear"), moved, timed)
            yield self.int8_linear(rows, inputs, outputs, timed)

    def int8_linear(self, rows: int, inputs: int, outputs: int, timed: bool = False) -> Case:
        """Symmetric, in order: as a converted head or vision encoder has it."""
        groups, x = cdiv(inputs, GROUP), self.normal(rows, inputs)
        words = self.words(inputs // 4, outputs)
        zeros = torch.full((groups, outputs // 4), 0x7F7F7F7F, dtype=torch.int32, device=self.device)
        scales = ((self.uniform(groups, outputs) + 1) / 1024).half()
        moved = inputs * outputs + scales.nbytes + x.nbytes + rows * outputs * x.element_size()
        packed = (x, words, zeros, scales, None, 8, 1)
        return Case(f"int8 linear, {rows} x {inputs} to {outputs}", packed, prepared("prepare_gptq"), moved, timed)


def cases(make: Maker, tiny: bool) -> Iterator[Case]:
    """Odd sizes for correctness; then, on a GPU, the published model's sizes for speed."""
    for rows, width in ((1, 64), (3, 96)) if tiny else ((1, 64), (7, 96), (257, 1664)):
        yield from make.rows(rows, width)
    for int8 in (False, True):
        yield make.rotary(3, 2, 32, int8)
        yield make.attention(1, 37, 2, 2, 32, int8)
        yield make.new_tokens(37, 2, 2, 32, int8)
        yield make.attention(19, 37, 2, 2, 32, int8)
    yield from make.images(1 if tiny else 2, 33, 2, 104)
    for rows in (1, 5) if tiny else (1, 5, 16, 17, 255, 1025):
        yield from make.linears(rows, 256, 384)
        yield from make.linears(rows, 256, 384, odd=True)
    if tiny:
        return
    for rows in (1, 16, 2048):
        yield from make.rows(rows, 4096, timed=True)
        yield make.rotary(rows, 32, 128, timed=True)
        for inputs, outputs in ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)):
            yield from make.linears(rows, inputs, outputs, timed=True)
    for requests in (1, 16):
        for int8 in (False, True):
            yield make.attention(1, 2048, requests, 32, 128, int8, timed=True)
    yield make.attention(2048, 2048, 1, 32, 128, timed=True)
    yield from make.images(8, 1024, 16, 104, timed=True)
