"""Load a model whose decoder is split among processes, and what it runs with."""

from __future__ import annotations

from pathlib import Path

import torch

from qvl_kernels.util import dtype_name
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.capacity import kv_cache_tokens
from qvl_runtime.errors import ConfigError
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.host import choose_device, choose_dtype, free_memory
from qvl_runtime.model.cache_layout import bytes_per_token
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.weights.loader import load_weights


def load_parallel_runner(
    engine_config: EngineConfig, config: ModelConfig, folder: Path, max_model_len: int, has_more: bool
) -> Runner:
    """Start the other ranks, load the first one's share, and allocate a KV cache of the same blocks on all.

    has_more: the engine is also to have adapters or weights of its own. There are no graphs: ranks compute op by op.
    Raises `ConfigError` for what cannot be split, and like `load_runner`.
    """
    from qvl_runtime.parallel.leader import ParallelCache, ParallelModel, Ranks

    device, dtype = choose_device(engine_config.device), choose_dtype(engine_config.dtype, config)
    _check(engine_config, device, has_more)
    ranks = Ranks(config, folder, engine_config.tensor_parallel, device, dtype_name(dtype), engine_config.precision)
    try:
        on_host = engine_config.embedding_on_host
        weights = load_weights(folder, config, dtype, device, on_host, ranks.share)
        model = ParallelModel(ranks, config, weights.state, engine_config.precision, weights.packed, on_host)
        trim_heap()
        kv_dtype = torch.int8 if engine_config.kv_dtype == "int8" else dtype
        per_token = bytes_per_token(config, kv_dtype) // ranks.share.ranks
        tokens = kv_cache_tokens(engine_config, per_token, max_model_len, free_memory(device) // ranks.share.ranks)
        cache = ParallelCache(ranks, config, tokens, kv_dtype, engine_config.prefix_caching)
    except BaseException as error:
        ranks.end(f"the model was not loaded: {error}")
        raise
    return Runner(model, cache, ImageCache(engine_config.image_cache_bytes), weights.notes)


def _check(engine_config: EngineConfig, device: torch.device, has_more: bool) -> None:
    """Raise `ConfigError` for options that do not go together with `tensor_parallel`."""
    if engine_config.synthetic is not None:
        raise ConfigError("tensor_parallel reads a checkpoint; write one by `python -m tools.make_synthetic`")
    if engine_config.batch_invariant and device.type == "cuda":
        raise ConfigError("tensor_parallel has no batch_invariant on a GPU: use one of the two")
    if has_more:
        raise ConfigError(
            "tensor_parallel has neither adapters nor weights of its own: merge them first, by `qvl merge`"
        )
    if device.type == "cuda" and engine_config.kv_cache_bytes is None:
        raise ConfigError("tensor_parallel does not measure what a GPU has left: set kv_cache_bytes, of each GPU")
