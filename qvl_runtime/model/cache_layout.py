"""How the KV cache is laid out: tokens per block, and bytes per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvl_runtime.config.model import ModelConfig

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 16  # tokens per block: one head's block is 4 KiB in 16 bits at head size 128


def bytes_per_token(config: ModelConfig, kv_dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token in all layers; int8 adds a float32 scale a vector."""
    from qvl_kernels.reference import cache_width

    vector = cache_width(config.kv_channels, kv_dtype) * kv_dtype.itemsize
    return 2 * config.num_hidden_layers * config.num_attention_heads * vector
