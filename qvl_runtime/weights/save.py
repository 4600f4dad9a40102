"""Write a checkpoint folder: all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_kernels.util import cdiv, dtype_name
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.weights.files import sync, write_json
from qvl_runtime.weights.partial import write_folder
from qvl_runtime.weights.tensor_file import CODES, LENGTH, TensorFile, Written, header_of
from qvl_runtime.weights.tensor_info import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_COMPANIONS = ("generation_config.json", "tokenizer_config.json", "qwen.tiktoken")
SHARD = 2 * 10**9  # bytes per file, about those of the published checkpoints


def save_checkpoint(
    folder: Path, state: Mapping[str, Tensor], raw_config: Mapping[str, Any], companions: Path | None = None
) -> None:
    """Write the weights and `config.json` (with `quantize_config.json` where it is quantized) as a new folder.

    companions: a folder whose tokenizer and generation files are copied. The folder appears by a rename when it is
    complete; raises `CheckpointError` if the name exists already.
    """
    tied = raw_config.get("tie_word_embeddings", False)
    infos = {
        name: TensorInfo(tuple(tensor.shape), dtype_name(tensor.dtype))
        for name, tensor in state.items()
        if not (tied and name == "lm_head.weight")
    }

    def write(partial: Path) -> None:
        write_shards(partial, infos, lambda name: [state[name]])
        write_config(partial, raw_config)
        if companions is not None:
            copy_companions(companions, partial)

    write_folder(folder, "save", write)


def write_config(folder: Path, raw_config: Mapping[str, Any]) -> None:
    """Write `config.json`, and `quantize_config.json` where the model is quantized."""
    write_json(folder / "config.json", raw_config)
    quantization = raw_config.get("quantization_config")
    if quantization is not None:
        write_json(folder / "quantize_config.json", quantization)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files of a folder, those that it has."""
    for path in (source / name for name in _COMPANIONS):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def quantized_config(raw_config: Mapping[str, Any], quantization: QuantizationConfig) -> dict[str, Any]:
    """The `config.json` of a GPTQ version: float16, with the section that AutoGPTQ writes."""
    section = {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "desc_act": quantization.desc_act,
        "sym": quantization.sym,
        "checkpoint_format": quantization.checkpoint_format,
    }
    if quantization.desc_act:  # Optimum 2.3 takes it for true otherwise, and refuses it together with desc_act
        section["act_group_aware"] = False
    dtype = {"bf16": False, "fp16": True, "fp32": False, "torch_dtype": "float16"}
    return {**raw_config, **dtype, "quantization_config": section}


def write_shards(
    folder: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Iterable[Tensor]], limit: int = SHARD
) -> dict[str, int]:
    """Write tensors as safetensors files of up to `limit` bytes, with an index if several: {file: its bytes}.

    tensors: names in order, with shape and dtype. read: yields a tensor in pieces, so that memory holds one piece.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if filled and filled + info.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        sizes[file] = _write_file(folder / file, {name: tensors[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    sync(folder)
    return sizes


def _write_file(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Iterable[Tensor]]) -> int:
    entries: dict[str, Written] = {}
    end = 0
    for name, info in tensors.items():
        entries[name] = Written(CODES[info.dtype], info.shape, end, end + info.nbytes, "")
        end += info.nbytes
    header = header_of(entries)
    start = cdiv(LENGTH + len(header), LENGTH) * LENGTH
    with TensorFile(path, start, digests=False) as out:
        for name, info in tensors.items():
            written = out.append(read(name), info.dtype, info.shape)
            if written != entries[name]:
                raise ValueError(f"{name} was written as {written}; expected {entries[name]}")
        out.finish(header)
    return start + end
