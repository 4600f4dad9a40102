"""A configuration so small that a cache for it is a few kilobytes."""

from __future__ import annotations

from qvl_runtime.config.model import ModelConfig, VisionConfig


def small_config() -> ModelConfig:
    visual = VisionConfig(16, 8, 16, 1, 1, 2.0, 16, 60, n_queries=4, pool_head_dim=16)
    return ModelConfig(16, 1, 1, 64, 64, 2048, visual, kv_channels=16)
