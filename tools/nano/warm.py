"""The start of a second run: the weights and the vocabulary of a checkpoint that an earlier run exported."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError
from qvl_runtime.finetune.network import Network


def take_vocabulary(source: Path, run: Path) -> None:
    """Copy the checkpoint's vocabulary into the folder of the run, where there is none yet."""
    if not (run / "qwen.tiktoken").exists():
        shutil.copyfile(source / "qwen.tiktoken", run / "qwen.tiktoken")


def take_weights(model: Network, source: Path) -> None:
    """Load the checkpoint into the model. Raises `ConfigError` where the checkpoint is of another architecture."""
    config = ModelConfig.from_folder(source)
    if config.quantization is not None:
        raise ConfigError(f"{source} is quantized; a run starts from the bfloat16 checkpoint")
    here, there = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (model.state_dict(), _read(source)))
    if here != there:
        differ = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
        raise ConfigError(f"{source} does not fit the config of tools.train_nano: {', '.join(differ[:3])}")
    model.load_state_dict(_read(source))


def _read(source: Path) -> dict[str, Tensor]:
    return load_file(source / "model.safetensors")
