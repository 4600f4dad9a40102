"""Write a synthetic checkpoint in the published layout, to try conversion and loading at full size."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_kernels.util import cdiv
from qvl_runtime.config.checks import require_choice, require_positive
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.weights.partial import check_absent, write_folder
from qvl_runtime.weights.save import SHARD, copy_companions, quantized_config, write_config, write_shards
from qvl_runtime.weights.synthetic import SyntheticState, synthetic_config

if TYPE_CHECKING:
    from torch import Tensor


def write_synthetic(
    folder: Path,
    like: Path,
    kind: str,
    layers: int | None = None,
    vision_layers: int | None = None,
    file_bytes: int = SHARD,
    divide: int = 1,
) -> dict[str, int]:
    """Write a checkpoint of random weights of a published size: {file: bytes}.

    Widths, heads and the vocabulary are divided by `divide`. Files are filled in the order of the layout up to
    `file_bytes`. The folder appears when it is complete.
    """
    import torch

    check_absent(folder)
    vocabulary = ModelConfig.from_folder(like)
    config = _divided(synthetic_config(kind, vocabulary), divide, vocabulary.vocab_size)
    visual = replace(config.visual, layers=vision_layers or config.visual.layers)
    config = replace(config, num_hidden_layers=layers or config.num_hidden_layers, visual=visual)
    require_positive(config, "", "num_hidden_layers")
    dtype = torch.float16 if config.quantization is not None else torch.bfloat16
    state = SyntheticState(config, dtype, optional=True)
    sizes: dict[str, int] = {}

    def write(partial: Path) -> None:
        infos = {name: state.info(name) for name in state}
        sizes.update(write_shards(partial, infos, functools.partial(_pieces, state), file_bytes))
        write_config(partial, _raw_config(config))
        copy_companions(like, partial)

    write_folder(folder, "synthetic", write)
    return sizes


def _divided(config: ModelConfig, by: int, min_vocabulary: int) -> ModelConfig:
    """A narrower model with heads of the same size."""
    require_choice("divide", by, (1, 2, 4, 8, 16))
    v = config.visual
    visual = replace(v, width=v.width // by, heads=v.heads // by, output_dim=v.output_dim // by)
    return replace(
        config,
        visual=visual,
        hidden_size=config.hidden_size // by,
        intermediate_size=config.intermediate_size // by // 256 * 256,
        num_attention_heads=config.num_attention_heads // by,
        vocab_size=max(config.vocab_size // by, cdiv(min_vocabulary, 64) * 64),
    )


def _pieces(state: SyntheticState, name: str) -> Iterator[Tensor]:
    """Yield a tensor, and free it once it is written."""
    yield state[name]
    state.forget(name)


def _raw_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of this configuration."""
    visual = asdict(config.visual)
    raw = asdict(config) | {"visual": visual, "architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
    raw.pop("dtype"), raw.pop("quantization")
    raw["bf16"] = True
    return raw if config.quantization is None else quantized_config(raw, config.quantization)
