"""Writing a checkpoint folder: all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_runtime.config import QuantizationConfig
from qvl_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_COMPANIONS = ("generation_config.json", "tokenizer_config.json", "qwen.tiktoken")


def save_checkpoint(
    folder: Path, state: Mapping[str, Tensor], raw_config: Mapping[str, Any], companions: Path | None = None
) -> None:
    """Write `model.safetensors` and `config.json` (with `quantize_config.json` where it is quantised) as a new folder.

    `companions` is a folder whose tokenizer and generation files come along. The folder appears by a rename when it is
    complete; raises `CheckpointError` if there is one of that name already.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another name or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        tied = raw_config.get("tie_word_embeddings", False)
        stored = {k: v.contiguous() for k, v in state.items() if not (tied and k == "lm_head.weight")}
        save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "config.json", raw_config)
        quantization = raw_config.get("quantization_config")
        if quantization is not None:
            write_json(partial / "quantize_config.json", quantization)
        sources = [companions / name for name in _COMPANIONS] if companions is not None else []
        for source in filter(Path.is_file, sources):
            shutil.copyfile(source, partial / source.name)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def quantized_config(raw_config: Mapping[str, Any], quantization: QuantizationConfig) -> dict[str, Any]:
    """The `config.json` of a GPTQ sibling: float16, with the section that AutoGPTQ writes."""
    section = {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "desc_act": quantization.desc_act,
        "sym": quantization.sym,
        "checkpoint_format": quantization.checkpoint_format,
    }
    dtype = {"bf16": False, "fp16": True, "fp32": False, "torch_dtype": "float16"}
    return {**raw_config, **dtype, "quantization_config": section}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
