"""Load a model and what it runs with: weights, KV cache, image cache and decode graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qvl_kernels import cpu, reference
from qvl_kernels.util import dtype_name
from qvl_runtime.config.engine import EngineConfig
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.cores import settle_threads
from qvl_runtime.engine.capacity import capture_graphs, kv_cache_tokens, memory_after_loading, spare_bytes
from qvl_runtime.engine.parallel_loading import load_parallel_runner
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.formats.adapter import Adapter
from qvl_runtime.formats.host_memory import trim_heap
from qvl_runtime.host import choose_device, choose_dtype, free_memory
from qvl_runtime.model.adapters import Adapters
from qvl_runtime.model.cache_layout import bytes_per_token
from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache
from qvl_runtime.schedule.runner import Runner
from qvl_runtime.weights.adapter import read_adapter
from qvl_runtime.weights.loader import Weights, load_weights
from qvl_runtime.weights.synthetic import synthetic_weights


def load_runner(
    engine_config: EngineConfig,
    config: ModelConfig,
    folder: Path,
    max_model_len: int,
    weights: Weights | None = None,
    adapters: Mapping[str, str | Path | Adapter] | None = None,
) -> Runner:
    """Load the weights of `folder`, allocate the KV cache in the memory that is left, and capture decode graphs.

    The folder is not read if there are `weights`, on the device and in the dtype of `engine_config`, nor for synthetic
    ones. Raises `ConfigError` or `CapacityError` where memory does not suffice, and `CheckpointError` for a damaged
    checkpoint.
    """
    _check_adapters(adapters)
    device, dtype = choose_device(engine_config.device), choose_dtype(engine_config.dtype, config)
    if device.type == "cpu":
        settle_threads()  # of which other ranks get their parts
    if engine_config.tensor_parallel > 1:
        return load_parallel_runner(engine_config, config, folder, max_model_len, bool(adapters or weights))
    on_host = engine_config.embedding_on_host
    free: int | None = None
    if weights is not None:
        weights = weights._replace(state=dict(weights.state))  # the model empties it
    elif engine_config.synthetic is None:  # the size of a synthetic model is known only once it is loaded
        free = memory_after_loading(engine_config, config, dtype, folder, device)
        weights = load_weights(folder, config, dtype, device, on_host)
    else:
        weights = synthetic_weights(config, dtype, device, engine_config.repeat_blocks)
    notes = weights.notes
    model = QwenVL(
        config,
        weights.state,
        engine_config.precision,
        weights.packed,
        embedding_on_host=on_host,
        batch_invariant=engine_config.batch_invariant,
    )
    del weights
    if engine_config.batch_invariant:
        _check_invariant(model)
    if adapters:  # before the KV cache takes what is left
        model.adapters = load_adapters(adapters, model)
        free = None if free is None else free - model.adapters.nbytes
    trim_heap()
    kv_dtype = torch.int8 if engine_config.kv_dtype == "int8" else dtype
    free = free_memory(device) if free is None else free
    spare = spare_bytes(model, engine_config, kv_dtype)
    per_token = bytes_per_token(config, kv_dtype)
    num_kv_tokens = kv_cache_tokens(engine_config, per_token, max_model_len, free, spare)
    cache = KVCache(config, num_kv_tokens, kv_dtype, device, engine_config.prefix_caching)
    runner = Runner(model, cache, ImageCache(engine_config.image_cache_bytes), notes)
    capture_graphs(runner, engine_config, max_model_len)
    return runner


def _check_invariant(model: QwenVL) -> None:
    """Raise `ConfigError` where `batch_invariant` is asked of plain torch, or of float32 on a GPU, which is torch's."""
    if model.ops is reference or (model.ops is not cpu and model.dtype == torch.float32):
        raise ConfigError(
            f"batch_invariant needs kernels, and torch multiplies {dtype_name(model.dtype)} here, in an order that "
            "depends on the other rows: use bfloat16 or float16, and leave QVL_KERNELS unset"
        )


def load_adapters(adapters: Mapping[str, str | Path | Adapter], model: QwenVL) -> Adapters:
    """Read LoRA adapters from their folders, and put them on the model's device in its dtype.

    Raises `ConfigError` or `CheckpointError` that names the adapter.
    """
    read = {
        name: adapter if isinstance(adapter, Adapter) else read_adapter(Path(adapter), model.config)
        for name, adapter in adapters.items()
    }
    return Adapters(read, model.config, model.ops, model.dtype, model.device)


def _check_adapters(adapters: object) -> None:
    if adapters is None:
        return
    if not isinstance(adapters, Mapping):
        raise ConfigError(f"adapters is {quoted(adapters)}; expected a dict of folders by the adapters' names")
    for name, adapter in adapters.items():
        if not isinstance(adapter, (str, Path, Adapter)):
            raise ConfigError(f"adapter {quoted(name)} is {quoted(adapter)}; expected the folder that holds it")
