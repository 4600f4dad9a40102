"""The vision encoder that the suite measures: the published sizes with random weights, in 16 or in 8 bits."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.bounds import full_config
from benchmarks.gpu.engines import rounded
from benchmarks.gpu.place import Place
from qvl_kernels.ops import Ops
from qvl_kernels.reference import BoundLinear, Packed
from qvl_runtime.config.model import ModelConfig, VisionConfig
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.model.linear import LinearBuilder
from qvl_runtime.model.vision import Resampler, VisionEncoder
from qvl_runtime.weights.packed_specs import rounded_vision
from qvl_runtime.weights.synthetic import SyntheticState

ROOT, POOL = "transformer.visual.", "attn_pool"


class Tower(NamedTuple):
    """An encoder, its linears by kind, those of all blocks together, and its resampler once more, to be timed alone."""

    config: VisionConfig
    dtype: torch.dtype
    encoder: VisionEncoder
    linears: dict[str, list[BoundLinear]]
    pool: Resampler


def config_of(place: Place, layers: int | None = None) -> ModelConfig:
    """The published model with this many layers in its encoder, None: all. Without a GPU tiny, with heads of 104 and
    more rows than the kernel of few dense rows takes, which is slow in the interpreter.
    """
    config = full_config("qwen-vl-chat")
    visual = replace(config.visual, layers=place.layers or layers or config.visual.layers)
    if not place.tiny:
        return replace(config, visual=visual)
    visual = replace(visual, image_size=70, width=416, heads=4, layers=1, mlp_ratio=1.0, output_dim=256, n_queries=25)
    return replace(config, hidden_size=256, num_attention_heads=2, intermediate_size=512, visual=visual)


def weights_of(place: Place, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The encoder's random weights by published name, on the device."""
    state = SyntheticState(config, dtype, device=place.device)
    return {name: state[name] for name in expected_tensors(config) if name.startswith(ROOT)}


def build(ops: Ops, config: ModelConfig, weights: dict[str, Tensor], packed: dict[str, Packed] | None = None) -> Tower:
    """Bind an encoder's weights; `packed` linears have no others."""
    linears = LinearBuilder(ops, dict(weights), "exact", packed or {})
    pool = Resampler(config.visual, LinearBuilder(ops, dict(weights), "exact", packed or {}), f"{ROOT}{POOL}")
    dtype = weights[f"{ROOT}ln_post.weight"].dtype
    encoder = VisionEncoder(config.visual, linears)
    kinds: dict[str, list[BoundLinear]] = defaultdict(list)
    for name, linear in linears.bound.items():
        kinds[re.sub(r"transformer\.resblocks\.\d+\.", "", name.removeprefix(ROOT))].append(linear)
    return Tower(config.visual, dtype, encoder, dict(kinds), pool)


def rounded_tower(place: Place, layers: int) -> Tower:
    """An encoder whose linears are in 8 bits, as `qvl convert --vision int8` makes them."""
    config, dtype = config_of(place, layers), place.dtypes[0]
    weights = weights_of(place, config, dtype)
    packed = rounded(weights, rounded_vision(config), config)
    return build(place.ops, config, weights, packed)


def sizes(config: VisionConfig) -> dict[str, tuple[int, int, int]]:
    """Rows of an image, inputs and outputs of the linears of each kind."""
    patches, queries, width, out = config.num_patches, config.n_queries, config.width, config.output_dim
    return {
        "conv1": (patches, 3 * config.patch_size**2, width),
        "attn.in_proj": (patches, width, 3 * width),
        "attn.out_proj": (patches, width, width),
        "mlp.c_fc": (patches, width, config.mlp_width),
        "mlp.c_proj": (patches, config.mlp_width, width),
        f"{POOL}.kv_proj": (patches, width, out),
        f"{POOL}.attn.to_k": (patches, out, out),
        f"{POOL}.attn.to_v": (patches, out, out),
        f"{POOL}.attn.out_proj": (queries, out, out),
        "proj": (queries, out, out),
    }


def operations(config: VisionConfig, kinds: dict[str, int]) -> int:
    """Multiplications and additions of an image: in `kinds` linears of each kind, and in their attention."""
    linears = sum(2 * kinds.get(kind, 0) * m * k * n for kind, (m, k, n) in sizes(config).items())
    own = 4 * config.num_patches**2 * config.width * kinds.get("attn.in_proj", 0)
    return linears + own + 4 * config.num_patches * config.n_queries * config.output_dim
