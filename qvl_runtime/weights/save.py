"""Writing a checkpoint folder: all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
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
        if companions is not None:
            copy_companions(companions, partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files that a folder has."""
    for path in (source / name for name in _COMPANIONS):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


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


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file that appears as `path` when it is on the disk."""
    partial = path.with_name(f"{path.name}.part-{os.getpid()}")
    partial.touch()
    mode = partial.stat().st_mode
    write(partial)
    partial.chmod(mode)  # safetensors makes files that only their owner may read
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def write_shards(folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], limit: int) -> None:
    """Write tensors, taken from `read` by name, as safetensors files of up to `limit` bytes, with an index if several.

    sizes: the names in order, and what each takes in bytes. Memory: one file's tensors.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    from safetensors.torch import save_file

    files = _shard_names(len(groups))
    for file, names in zip(files, groups, strict=True):
        tensors = {name: read(name) for name in names}
        replace(folder / file, lambda path, t=tensors: save_file(t, path, metadata={"format": "pt"}))  # type: ignore[misc]
        del tensors
    if len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        replace(folder / "model.safetensors.index.json", lambda path: path.write_text(text, encoding="utf-8"))


def _shard_names(count: int) -> Sequence[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename then lasts through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
