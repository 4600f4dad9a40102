"""Time kernels and their peers on this CPU in turns, with the read ceiling of the same run. One JSON line a figure.

    python -m benchmarks.cpu.kernels gemv     # int4, one row, the four layer shapes; ONNX Runtime where installed
    python -m benchmarks.cpu.kernels gemm     # 512 rows: W4A8, exact int4, W8A8; OpenVINO, ONNX Runtime if installed
    python -m benchmarks.cpu.kernels attention  # decode attention at 300 and 2000 tokens, 16-bit and int8 cache
    python -m benchmarks.cpu.kernels rows     # attention of many rows and of an image's patches; torch's in turns
    python -m benchmarks.cpu.kernels vision   # a block of the vision encoder in bf16 and W8A8; torch in bf16

Peers are optional (onnx onnxruntime openvino). QVL_CPU_ISA=avx512, avxvnni or avx2 forces an instruction set.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu.peers import GROUP, Calls, onnxruntime_linears, openvino_linears
from benchmarks.timing import alternate, memory_state, say, setting
from qvl_kernels import bandwidth as ceiling
from qvl_kernels import cpu, reference
from qvl_kernels import memory as huge_pages
from qvl_kernels.cpu import linears as cpu_linear
from qvl_kernels.ops import Ops
from qvl_kernels.reference import SCALE_BYTES
from qvl_kernels.util import cdiv, dtype_name

SHAPES = ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096))  # inputs, outputs
LAYERS = 4  # layers with weights of their own: 400 MB, more than any cache
VISION_WIDTH, VISION_MLP, VISION_HEADS, PATCHES = 1664, 8192, 16, 1024


def random_packed(inputs: int, outputs: int, bits: int = 4) -> cpu_linear.PackedWeight:
    """A packed weight of random values with the same scale in every group."""
    lines = huge_pages.buffer(inputs * outputs * bits // 8).random_()
    scales = torch.full((outputs // 16, inputs // GROUP, 16), 0.002, dtype=torch.float16)
    return cpu_linear.PackedWeight(lines, scales, None, None, None, bits, GROUP, inputs, inputs, outputs)


def reader(nbytes: int) -> Callable[[], object]:
    """A call that reads `nbytes` bytes at the machine's full bandwidth."""
    return ceiling.reader(torch.device("cpu"), nbytes).call


def gemv() -> None:
    """Time one row through each of the four layer shapes, with at least 400 MB of weights."""
    for inputs, outputs in SHAPES:
        copies = max(2, (400 << 20) // (inputs * outputs // 2))
        weights = [random_packed(inputs, outputs) for _ in range(copies)]
        gemv_of(weights, torch.randn(1, inputs), onnxruntime_linears([(inputs, outputs)] * copies, 1))


def gemv_of(weights: list[cpu_linear.PackedWeight], x: Tensor, peers: Calls) -> None:
    """Time x [1, inputs] through the weights and through the peers, and print microseconds and GB/s."""
    nbytes = sum(w.nbytes for w in weights)
    timings = alternate(
        {
            "W4A8": lambda: [w.int8(x) for w in weights],
            "exact": lambda: [w.exact(x) for w in weights],
            "read": reader(nbytes),
            **peers,
        }
    )
    for name, timing in timings.items():
        say(
            gemv=name,
            inputs=weights[0].inputs,
            outputs=weights[0].outputs,
            us=timing.seconds / len(weights) * 1e6,
            gb_s=nbytes / timing.seconds / 1e9,
            of_read=timings["read"].seconds / timing.seconds,
            **memory_state(timings["read"], nbytes),
            over_ours=timing.seconds / timings["W4A8"].seconds,
            load=timing.load,
            samples=timing.samples,
        )


def gemm(rows: int = 512) -> None:
    """Time `rows` rows through the linears of one layer."""
    weights, wider = ([random_packed(*shape, bits) for shape in SHAPES] for bits in (4, 8))
    inputs = [torch.randn(rows, w.inputs).bfloat16() for w in weights]
    calls: Calls = {
        "W4A8": lambda: [w.int8(x) for w, x in zip(weights, inputs, strict=True)],
        "exact": lambda: [w.exact(x) for w, x in zip(weights, inputs, strict=True)],
        "W8A8": lambda: [w.int8(x) for w, x in zip(wider, inputs, strict=True)],
    }
    calls |= onnxruntime_linears(list(SHAPES), rows) | openvino_linears(list(SHAPES), rows)
    timings = alternate(calls, min_samples=3)
    for name, timing in timings.items():
        say(
            gemm=name,
            rows=rows,
            ms_a_layer=timing.seconds * 1e3,
            gop_s=2 * rows * sum(i * o for i, o in SHAPES) / timing.seconds / 1e9,
            over_ours=timing.seconds / timings["W4A8"].seconds,
            load=timing.load,
            samples=timing.samples,
        )


def attention() -> None:
    """Time decode attention at 300 and at 2000 tokens."""
    for context in (300, 2000):
        attention_over(context)


def attention_over(context: int, heads: int = 32, dim: int = 128, block_size: int = 16) -> None:
    """Time decode attention after `context` tokens with a 16-bit and an int8 cache."""
    blocks = cdiv(context, block_size)
    table = torch.randperm(blocks).view(1, -1)
    q = torch.randn(1, heads, dim).bfloat16()
    calls: Calls = {}
    sizes = {}
    for dtype in (torch.bfloat16, torch.int8):
        width = cpu.cache_width(dim, dtype)
        layers = max(2, (400 << 20) // (blocks * block_size * heads * width * 4))
        caches = [random_cache((2, blocks, heads, block_size, width), dtype) for _ in range(layers)]
        name = dtype_name(dtype)
        sizes[name] = layers * 2 * context * heads * width * dtype.itemsize
        calls[name] = partial(attend_each, q, caches, table, context)
    sizes["read"] = sizes["bfloat16"]
    timings = alternate(calls | {"read": reader(sizes["read"])})
    memory = memory_state(timings["read"], sizes["read"])
    for name, timing in timings.items():
        gb_s = sizes[name] / timing.seconds / 1e9
        say(attention=name, context=context, gb_s=gb_s, of_read=gb_s / memory["read_gb_s"], load=timing.load, **memory)


def attend_each(q: Tensor, caches: list[Tensor], table: Tensor, context: int) -> None:
    """Run decode attention of q [1, heads, dim] over each of the caches, keys and values stacked."""
    for k_cache, v_cache in caches:
        cpu.paged_attention(q, k_cache, v_cache, table, [0, 1], [context])


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Keys and values in huge pages, as the engine's are; int8 values, each row followed by its scale of 0.01."""
    cache = huge_pages.buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
    if dtype != torch.int8:
        return cache.normal_()
    cache.random_(-127, 128)[..., -SCALE_BYTES:] = torch.tensor([0.01]).view(torch.int8)
    return cache


def rows() -> None:
    """Prefill, a chunk of it, a second question, and drafts: (new rows, tokens in the cache)."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for new, context in ((512, 512), (2048, 2048), (256, 2256), (30, 330), (4, 2000)):
            table = torch.randperm(cdiv(context, 16)).view(1, -1)
            q = torch.randn(new, 32, 128).to(dtype)
            k_cache, v_cache = torch.randn(2, table.numel(), 32, 16, 128).to(dtype)
            args = (q, k_cache, v_cache, table, [0, new], [context])
            timings = alternate(
                {
                    "ours": partial(cpu.paged_attention, *args),
                    "torch": partial(reference.paged_attention, *args),
                },
                min_samples=3,
                limit_s=4,
            )
            for name, timing in timings.items():
                say(
                    rows=name,
                    new=new,
                    context=context,
                    dtype=str(dtype),
                    ms=timing.seconds * 1e3,
                    over_ours=timing.seconds / timings["ours"].seconds,
                    load=timing.load,
                )
        qkv = torch.randn(1, PATCHES, 3 * VISION_WIDTH).to(dtype)
        timings = alternate(
            {
                "ours": partial(cpu.vision_attention, qkv, VISION_HEADS),
                "torch": partial(reference.vision_attention, qkv, VISION_HEADS),
            },
            min_samples=3,
            limit_s=4,
        )
        for name, timing in timings.items():
            say(
                patches=name,
                dtype=str(dtype),
                ms=timing.seconds * 1e3,
                over_ours=timing.seconds / timings["ours"].seconds,
                load=timing.load,
            )


def vision() -> None:
    """Time one block of the vision encoder on 1,024 patches: torch, bfloat16 and W8A8."""
    w, mlp = VISION_WIDTH, VISION_MLP
    linears = [(3 * w, w), (w, w), (mlp, w), (w, mlp)]
    dense = [(torch.randn(o, i).bfloat16(), torch.zeros(o).bfloat16()) for o, i in linears]
    norm = (torch.ones(w).bfloat16(), torch.zeros(w).bfloat16())
    x = torch.randn(1, PATCHES, w).bfloat16()

    def block(ops: Ops, layers: list[reference.BoundLinear]) -> Tensor:
        qkv, out, fc, proj = layers
        y = x + out(ops.vision_attention(qkv(ops.layer_norm(x, *norm, 1e-6)), VISION_HEADS))
        return y + proj(ops.gelu(fc(ops.layer_norm(y, *norm, 1e-6))))

    kinds = {
        "torch bf16": (reference, [reference.prepare_linear(*d) for d in dense]),
        "exact": (cpu, [cpu.prepare_linear(*d) for d in dense]),
        "fast": (cpu, [cpu.prepare_linear(*d, "fast") for d in dense]),
    }
    with torch.inference_mode():
        timings = alternate({name: partial(block, *kind) for name, kind in kinds.items()})
    for name, timing in timings.items():
        say(vision_block=name, ms=timing.seconds * 1e3, image_s=timing.seconds * 48, load=timing.load)


def main() -> None:
    """Run the benchmarks named on the command line."""
    what = {"gemv": gemv, "gemm": gemm, "attention": attention, "rows": rows, "vision": vision}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=what)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    say(**setting())
    for name in args.what:
        what[name]()


if __name__ == "__main__":
    main()
