"""The engines that the suite measures: full-size models with random weights; nano where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.bounds import full_config
from benchmarks.gpu.place import Place
from qvl_kernels import packing_for
from qvl_kernels.reference import Packed
from qvl_runtime import Engine
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.model.cache_layout import bytes_per_token
from qvl_runtime.weights.loader import Weights
from qvl_runtime.weights.packed_specs import rounded_vision
from qvl_runtime.weights.synthetic import synthetic_config, synthetic_weights

KINDS = ("int4", "bf16", "int4-options")
NAMES = {"bf16": "qwen-vl-chat", "int4": "qwen-vl-chat-int4", "int4-options": "qwen-vl-chat-int4"}
OPTIONS: dict[str, dict[str, Any]] = {
    "int4-options": {"kv_dtype": "int8", "embedding_on_host": True}  # and int8 head and vision encoder, below
}
LONGEST = 8192 + 64
SHORT_REQUESTS, SHORT_TOKENS = 64, 192  # that the KV cache must hold together


def kv_dtype(kind: str) -> torch.dtype:
    """The dtype of the KV cache of an engine."""
    return torch.int8 if kind == "int4-options" else torch.bfloat16


def make_engine(place: Place, kind: str, longest: int = LONGEST, layers: int | None = None, **options: Any) -> Engine:
    """The engine of a kind. layers: of the decoder and of the vision encoder; None: as published. options: Engine's."""
    if place.tiny:
        folder = None if kind == "bf16" else str(NANO.parent / "nano_int4")
        return Engine(folder, device="cpu", dtype="float16", max_model_len=longest, overlap=True, **options)
    layers = place.layers or layers
    torch.cuda.reset_peak_memory_stats()
    needed = max(longest, SHORT_REQUESTS * SHORT_TOKENS) * bytes_per_token(full_config(NAMES[kind]), kv_dtype(kind))
    with _layers(layers), _int8_parts(kind == "int4-options"):
        return Engine(
            synthetic=NAMES[kind],
            device=str(place.device),
            dtype="bfloat16" if kind == "bf16" else "float16",
            max_model_len=longest,
            kv_cache_bytes=needed if layers is None else needed * layers // 32,
            **OPTIONS.get(kind, {}),
            **options,
        )


@contextmanager
def _layers(count: int | None) -> Iterator[None]:
    """Give synthetic models this many layers."""

    def config_of(name: str, vocabulary: ModelConfig) -> ModelConfig:
        config = synthetic_config(name, vocabulary)
        if count is None:
            return config
        return replace(config, num_hidden_layers=count, visual=replace(config.visual, layers=count))

    with patch("qvl_runtime.engine.engine.synthetic_config", config_of):
        yield


@contextmanager
def _int8_parts(wanted: bool) -> Iterator[None]:
    """Round head and vision encoder of synthetic models to 8 bits, as `qvl convert --head int8 --vision int8` does."""
    with patch("qvl_runtime.engine.loading.synthetic_weights", rounded_weights if wanted else synthetic_weights):
        yield


def rounded_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, repeat: bool = False) -> Weights:
    """`synthetic_weights` with the head and the linears of the vision encoder in 8 bits."""
    weights = synthetic_weights(config, dtype, device, repeat)
    weights.packed.update(rounded(weights.state, ("lm_head", *rounded_vision(config)), config))
    return weights


def rounded(state: MutableMapping[str, Tensor], names: Iterable[str], config: ModelConfig) -> dict[str, Packed]:
    """Take these linears out of a state and round them to 8 bits."""
    from qvl_runtime.convert.recipes import Recipe, build

    packed: dict[str, Packed] = {}
    for name in names:
        tensors = {key: state.pop(key) for key in (f"{name}.weight", f"{name}.bias") if key in state}
        for built in build(Recipe(name, (name,), 8), tensors, config, packing_for("cuda")):
            packed[built.name] = built.packed
    return packed
