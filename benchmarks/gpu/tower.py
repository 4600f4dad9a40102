"""The vision encoder by itself: the whole of it for one image and for several, and each of its parts.

The published sizes with random weights. The whole is timed as a CUDA graph and as the engine runs it, launched from
Python: the difference is what the GPU waits for. Its features must be as close to float32 as plain torch's. Products
rotate through the weights of the blocks, and are held against a large square product of cuBLAS; attention against
torch's own, and in several tilings; norms and activations against a large read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Maker
from benchmarks.gpu.encoder import POOL, Tower, build, config_of, operations, rounded_tower, sizes, weights_of
from benchmarks.gpu.place import COLD, Place
from qvl_kernels import reference
from qvl_kernels.util import dtype_name
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.model.vision import VisionEncoder
from qvl_runtime.plan.sizes import IMAGES_AT_ONCE

Row = dict[str, Any]
IMAGES = (1, IMAGES_AT_ONCE)
INT8_LAYERS = 6  # whose products are timed in 8 bits: enough weights for a cold L2
SQUARE = 8192  # rows and columns of the product that is the ceiling
TURNS = 3
# Queries, keys, warps and stages of attention besides the built-in ones. 64 queries read the keys twice as often, in
# twice as many programs: with 128, an image's 16 heads of 1,024 patches are 128 programs, for 132 multiprocessors.
TILINGS = ((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2))


def tower(place: Place, read: float) -> Iterator[Row]:
    """Rows of the whole encoder, then of its parts. read: bytes a second of a large read."""
    dtype = place.dtypes[-1]
    ceiling = _square_product(place, dtype)
    yield {"what": "ceiling", "dtype": dtype_name(dtype), "tflops": ceiling / 1e12}
    config = config_of(place)
    weights = weights_of(place, config, dtype)
    built = build(place.ops, config, weights)
    yield _judged(place, config, weights, built.encoder)
    for images in IMAGES[: 1 if place.tiny else None]:
        yield from _whole(place, built, images, ceiling)
        yield from _products(place, built, images, ceiling)
        yield from _attention(place, built, images, ceiling)
        yield from _elementwise(place, built, images, read)
    del built, weights
    place.settle()
    yield from _products(place, rounded_tower(place, INT8_LAYERS), IMAGES[-1], ceiling)
    place.settle()


def exercise(place: Place, share: int, shares: int) -> None:
    """Launch once what `tower` launches of this package, for its kernels: encoders, and a share of the tilings."""
    config, dtype = config_of(place, 1), place.dtypes[-1]
    if share == 0:
        encoder = build(place.ops, config, weights_of(place, config, dtype)).encoder
        encoder.forward(_pixels(place, config.visual, IMAGES[-1]))
    if share == shares - 1:
        int8 = rounded_tower(place, 1)
        for kind, linears in int8.linears.items():
            linears[0].call(_input(place, int8, kind, IMAGES[-1]))
    qkv = Maker(place.device, dtype).normal(1, config.visual.num_patches, 3 * config.visual.width)
    for tiling in TILINGS[share::shares]:
        _tiled(place, tiling, config.visual.heads)(qkv)


def _judged(place: Place, config: ModelConfig, weights: dict[str, Tensor], ours: VisionEncoder) -> Row:
    """Root mean square errors of an image's features, ours and plain torch's, against plain torch in float32."""
    pixels = _pixels(place, config.visual, 1)
    exact = build(reference, config, {name: weight.float() for name, weight in weights.items()}).encoder.forward(pixels)
    plain = build(reference, config, weights).encoder.forward(pixels)
    error, yardstick = (float((x.float() - exact).square().mean().sqrt()) for x in (ours.forward(pixels), plain))
    return {"what": "features", "rms_error": error, "plain_torch": yardstick, "right": error <= 2 * yardstick}


def _whole(place: Place, built: Tower, images: int, ceiling: float) -> Iterator[Row]:
    call = partial(built.encoder.forward, _pixels(place, built.config, images))
    taken, launched = place.seconds(*[call] * (1 if place.tiny else 2)), []
    for _ in range(1 if place.tiny else TURNS):
        place.wait()
        began = time.perf_counter()
        call()
        place.wait()
        launched.append(time.perf_counter() - began)
    at = {"images": images, "dtype": dtype_name(built.dtype)}
    kinds = {kind: len(linears) for kind, linears in built.linears.items()}
    rates = _rates(taken, images * operations(built.config, kinds), ceiling)
    times = {"ms": 1e3 * taken, "ms_an_image": 1e3 * taken / images, "from_python_ms": 1e3 * median(launched)}
    yield {"what": "tower", **at, **times, "wall_over_gpu": median(launched) / taken, **rates}
    patches = Maker(place.device, built.dtype).normal(images, built.config.num_patches, built.config.width)
    taken = place.seconds(partial(built.pool, patches))
    pool = {kind: len(linears) for kind, linears in built.linears.items() if kind.startswith(POOL)}
    yield {"what": "resampler", **at, "us": 1e6 * taken} | _rates(
        taken, images * operations(built.config, pool), ceiling
    )


def _products(place: Place, built: Tower, images: int, ceiling: float) -> Iterator[Row]:
    """A row for each kind of linear."""
    for kind, linears in built.linears.items():
        x, (m, k, n) = _input(place, built, kind, images), sizes(built.config)[kind]
        some = linears[: place.copies(linears[0].nbytes)]
        taken = place.seconds(*(partial(linear.call, x) for linear in some))
        at = {"linear": kind, "weights": linears[0].kernel, "images": images, "dtype": dtype_name(built.dtype)}
        cold = {"cold": len(some) * linears[0].nbytes >= COLD}
        yield {"what": "product", **at, "us": 1e6 * taken} | cold | _rates(taken, 2 * images * m * k * n, ceiling)


def _attention(place: Place, built: Tower, images: int, ceiling: float) -> Iterator[Row]:
    """Attention of a block: this package's, in other tilings, and torch's; and that of the resampler."""
    config, make = built.config, Maker(place.device, built.dtype)
    qkvs = [make.normal(images, config.num_patches, 3 * config.width)]
    qkvs += [qkvs[0].clone() for _ in range(place.copies(qkvs[0].nbytes) - 1)]
    ways: dict[str, Callable[[Tensor], Tensor]] = {"built in": partial(place.ops.vision_attention, heads=config.heads)}
    for tiling in TILINGS[: 1 if place.tiny else None]:
        ways["{} queries, {} keys, {} warps, {} stages".format(*tiling)] = _tiled(place, tiling, config.heads)
    ways["torch's"] = partial(_torchs_attention, heads=config.heads)
    flops = 4 * images * config.num_patches**2 * config.width
    at = {"images": images, "dtype": dtype_name(built.dtype)}
    for way, attend in ways.items():
        taken = place.seconds(*(partial(attend, qkv) for qkv in qkvs))
        yield {"what": "attention", **at, "heads of": config.head_dim, "by": way, "us": 1e6 * taken} | _rates(
            taken, flops, ceiling
        )
    q, k, v = (
        make.normal(*shape, config.output_dim) for shape in ((config.n_queries,), *[(images, config.num_patches)] * 2)
    )
    taken = place.seconds(partial(place.ops.cross_attention, q, k, v, config.pool_heads))
    flops = 4 * images * config.n_queries * config.num_patches * config.output_dim
    heads = {"heads of": config.pool_head_dim, "by": "the resampler's", "us": 1e6 * taken}
    yield {"what": "attention", **at, **heads} | _rates(taken, flops, ceiling)


def _elementwise(place: Place, built: Tower, images: int, read: float) -> Iterator[Row]:
    """The norms and the activation of a block."""
    config, ops, make = built.config, place.ops, Maker(place.device, built.dtype)
    x = make.normal(images, config.num_patches, config.width)
    wide, weight = make.normal(images, config.num_patches, config.mlp_width), make.normal(config.width)
    eps = config.layer_norm_eps
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "layer_norm": (lambda: ops.layer_norm(x, weight, weight, eps), 2 * x.nbytes),
        "add_layer_norm": (lambda: ops.add_layer_norm(x, x, weight, weight, eps), 4 * x.nbytes),
        "gelu": (lambda: ops.gelu(wide), 2 * wide.nbytes),
    }
    for name, (call, nbytes) in calls.items():
        taken = place.seconds(call)
        rates = {"gb_s": nbytes / taken / 1e9, "of_read": nbytes / taken / read}
        yield {"what": "kernel", "kernel": name, "images": images, "us": 1e6 * taken, **rates}


def _square_product(place: Place, dtype: torch.dtype) -> float:
    """Operations a second of a large product."""
    side = 64 if place.tiny else SQUARE
    x, weight = (Maker(place.device, dtype).normal(side, side) for _ in range(2))
    return 2 * side**3 / place.seconds(lambda: F.linear(x, weight))


def _rates(taken: float, flops: int, ceiling: float) -> Row:
    return {"tflops": flops / taken / 1e12, "of_product": flops / taken / ceiling}


def _pixels(place: Place, config: VisionConfig, images: int) -> Tensor:
    return Maker(place.device, torch.float32).normal(images, 3, config.image_size, config.image_size)


def _input(place: Place, built: Tower, kind: str, images: int) -> Tensor:
    rows, inputs, _ = sizes(built.config)[kind]
    return Maker(place.device, built.dtype).normal(images, rows, inputs)


def _tiled(place: Place, tiling: tuple[int, int, int, int], heads: int) -> Callable[[Tensor], Tensor]:
    from qvl_kernels.triton.attention import vision

    def attend(qkv: Tensor) -> Tensor:
        with patch.object(vision, "configuration", lambda *_: vision.Configuration(*tiling)):
            return place.ops.vision_attention(qkv, heads)

    return attend


def _torchs_attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.view(*qkv.shape[:2], heads, 3, -1).permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)
