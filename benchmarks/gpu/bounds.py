"""Upper bounds on decoding: memory bandwidth over the bytes of a token. Computed, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qvl_kernels.gpus import gpu_named
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.formats.layout import expected_tensors
from qvl_runtime.model.cache_layout import bytes_per_token
from qvl_runtime.weights.synthetic import SYNTHETIC, synthetic_config

MACHINES = ("A100-SXM4-80GB", "H100 80GB HBM3")
CONTEXTS = (2048, 8192)
# Tokens a second on an H100 on 2026-11-26: commit 49678f5, before the kernels and graphs that came since (docs/gpu.md).
MEASURED = {
    ("qwen-vl-chat-int4", 2048): "172 to 177",
    ("qwen-vl-chat-int4", 8192): "156 to 159",
    ("qwen-vl-chat", 2048): "158.6",
    ("qwen-vl-chat", 8192): "146.1",
}
UNREAD = ("transformer.wte.weight",)


def full_config(name: str) -> ModelConfig:
    """The configuration of a published model by its synthetic name."""
    return synthetic_config(name, ModelConfig.from_folder(NANO))


def weight_bytes(config: ModelConfig) -> int:
    """Bytes read for each token, in 16 bits or packed: the decoder and the head, but only a row of the embedding."""
    total = 0
    for name, spec in expected_tensors(config).items():
        elements = 1
        for extent in spec.shape:
            elements *= extent
        if not (spec.optional or name.startswith("transformer.visual.") or name in UNREAD or name.endswith(".g_idx")):
            total += elements * (4 if spec.packed else 2)
    return total


def token_bytes(config: ModelConfig, context: int, kv_dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes read for one token after `context` others: weights, keys and values."""
    return weight_bytes(config) + context * bytes_per_token(config, kv_dtype)


def bounds() -> Iterator[dict[str, Any]]:
    """A row for each model, machine and context, at half the context, which is what the table averages."""
    for name in SYNTHETIC:
        config = full_config(name)
        for gpu in map(gpu_named, MACHINES):
            for context in CONTEXTS:
                mean = token_bytes(config, context // 2)
                yield {
                    "model": name,
                    "machine": gpu.name,
                    "context": context,
                    "gb_a_token": mean / 1e9,
                    "at_most_tok_s": gpu.bandwidth / mean,
                }
