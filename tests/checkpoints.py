"""Fixtures: small checkpoints, written to disk in every form a checkpoint comes in."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.layout import expected_tensors
from tests.gptq_checkpoints import gptq
from tests.quantize.quantized import run

RAW: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "fp32": True,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 384,  # MLP width 192: a group of 128 and a half one
    "vocab_size": 160,
    "seq_length": 32,
    "visual": {
        "image_size": 28,
        "patch_size": 7,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "image_start_id": 150,
        "n_queries": 16,
        "positional_rows": 16,
    },
}
MakeState = Callable[..., "dict[str, torch.Tensor]"]
Write = Callable[..., Path]


@pytest.fixture
def raw() -> dict[str, Any]:
    """A `config.json`, free to be changed."""
    return json.loads(json.dumps(RAW))  # type: ignore[no-any-return]


@pytest.fixture
def make_state() -> MakeState:
    """A state of random weights for a configuration; optional tensors are in it, groups are in order."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, spec in expected_tensors(config).items():
            if name.endswith(".g_idx"):
                assert config.quantization is not None
                size = config.quantization.group_size
                state[name] = torch.arange(*spec.shape, dtype=torch.int32) // (size if size > 0 else spec.shape[0])
            elif spec.packed:
                state[name] = torch.randint(-(2**31), 2**31, spec.shape, generator=generator).to(torch.int32)
            else:
                state[name] = torch.randn(spec.shape, generator=generator).to(dtype)
        return state

    return make


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a state as a checkpoint folder: one file, or shards with their index, as safetensors or `.bin`."""

    def write_folder(
        raw: dict[str, Any], state: dict[str, torch.Tensor], suffix: str = ".safetensors", shards: int = 1
    ) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        names, weight_map = list(state), {}  # type: ignore[var-annotated]
        for number in range(shards):
            part = {name: state[name] for name in names[number::shards]}
            file = f"{stem}{suffix}" if shards == 1 else f"{stem}-{number + 1:05}-of-{shards:05}{suffix}"
            if suffix == ".safetensors":
                save_file(part, folder / file)
            else:
                torch.save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    return write_folder


@pytest.fixture
def int4(raw: dict[str, Any], make_state: MakeState, write: Write) -> Path:
    return write(raw, gptq(raw, make_state(ModelConfig.from_dict(raw)), "int4"), shards=2)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of two layers with a vocabulary of bytes; its numbers are whole in float16."""
    folder = tmp_path_factory.mktemp("quantize") / "float"
    folder.mkdir()
    raw = {**RAW, "vocab_size": 480, "seq_length": 512, "visual": {**RAW["visual"], "image_start_id": 470}}
    (folder / "config.json").write_text(json.dumps(raw))
    lines = [f"{b64encode(bytes([value])).decode()} {value}" for value in range(256)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    generator, state = torch.Generator().manual_seed(0), {}
    for name, spec in expected_tensors(ModelConfig.from_dict(raw)).items():
        scale = 1.0 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        state[name] = (torch.randn(spec.shape, generator=generator) * scale).half().float()
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def whole(source: Path) -> Path:
    """`source` quantized with FEW, without interruption."""
    run(source, source.parent / "whole")
    return source.parent / "whole"
