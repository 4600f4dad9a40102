"""A synthetic checkpoint on the disk, as a published one lies there: to try conversion and loading at real size."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qvl_runtime.config import ModelConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.settings import require_choice, require_positive
from qvl_runtime.weights.save import quantized_config, write_json
from qvl_runtime.weights.synthetic import SyntheticState, synthetic_config
from qvl_runtime.weights.tensor_file import CODES, LENGTH, TensorFile, Written, header_of

COMPANIONS = ("generation_config.json", "tokenizer_config.json", "qwen.tiktoken")


def write_synthetic(
    folder: Path, like: Path, kind: str, layers: int | None = None, vision_layers: int | None = None,
    file_bytes: int = 2 * 10**9, divide: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Write a checkpoint of random weights of a published size as the folder `folder`: {file: bytes}.

    Widths, heads and the vocabulary are divided by `divide`. Files are filled in the order of the layout up to
    `file_bytes`. The folder appears when it is whole.
    """
    import torch

    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another name or remove it first")
    vocabulary = ModelConfig.from_folder(like)
    config = _divided(synthetic_config(kind, vocabulary), divide, vocabulary.vocab_size)
    visual = replace(config.visual, layers=vision_layers or config.visual.layers)
    config = replace(config, num_hidden_layers=layers or config.num_hidden_layers, visual=visual)
    require_positive(config, "", "num_hidden_layers")
    dtype = torch.float16 if config.quantization is not None else torch.bfloat16
    state = SyntheticState(config, dtype, optional=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = _write_files(partial, state, file_bytes)
        raw = _raw_config(config)
        write_json(partial / "config.json", raw)
        if config.quantization is not None:
            write_json(partial / "quantize_config.json", raw["quantization_config"])
        for name in COMPANIONS:
            if (like / name).is_file():
                shutil.copyfile(like / name, partial / name)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return files


def _divided(config: ModelConfig, by: int, least_vocabulary: int) -> ModelConfig:
    """A narrower model with heads of the same size."""
    require_choice("divide", by, (1, 2, 4, 8, 16))
    v = config.visual
    visual = replace(v, width=v.width // by, heads=v.heads // by, output_dim=v.output_dim // by)
    return replace(
        config, visual=visual, hidden_size=config.hidden_size // by,
        intermediate_size=config.intermediate_size // by // 256 * 256,
        num_attention_heads=config.num_attention_heads // by,
        vocab_size=max(config.vocab_size // by, -(-least_vocabulary // 64) * 64),
    )  # fmt: skip


def _write_files(folder: Path, state: SyntheticState, most: int) -> dict[str, int]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in state:
        own = _nbytes(state, name)
        if groups[-1] and size + own > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        sizes[file] = _write_file(folder / file, names, state)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return sizes


def _write_file(path: Path, names: list[str], state: SyntheticState) -> int:
    tensors, at = {}, 0
    for name in names:
        shape, dtype = state.looks(name)
        tensors[name] = Written(CODES[dtype], shape, at, at + _nbytes(state, name), "")
        at = tensors[name].end
    header = header_of(tensors)
    header = header.ljust(-(-(LENGTH + len(header)) // LENGTH) * LENGTH - LENGTH)
    with TensorFile(path, LENGTH + len(header), digests=False) as out:
        for name in names:
            shape, dtype = state.looks(name)
            out.append([state[name]], dtype, shape)
            state.forget(name)
        out.finish(header)
    return LENGTH + len(header) + at


def _nbytes(state: SyntheticState, name: str) -> int:
    import torch

    shape, dtype = state.looks(name)
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)


def _raw_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that reads back as this configuration."""
    visual = asdict(config.visual)
    raw = asdict(config) | {"visual": visual, "architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
    raw.pop("dtype"), raw.pop("quantization")
    raw["bf16"] = True
    return raw if config.quantization is None else quantized_config(raw, config.quantization)

