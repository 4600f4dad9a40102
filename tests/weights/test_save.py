"""Saved checkpoints: they load again, are complete or absent, and never replace another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.checkpoint import load_state
from qvl_runtime.weights.save import quantized_config, save_checkpoint
from tests.gptq_checkpoints import quantize_state


def test_float_checkpoint_comes_back(raw: dict[str, Any], make_state: Any, tmp_path: Path) -> None:
    state = make_state(ModelConfig.from_dict(raw), torch.bfloat16)
    folder = tmp_path / "new" / "model"
    save_checkpoint(folder, state, raw)
    config = ModelConfig.from_folder(folder)
    assert config == ModelConfig.from_dict(raw)
    loaded = load_state(folder, config, torch.bfloat16)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_int4_sibling_comes_back_in_the_published_layout(raw: dict[str, Any], make_state: Any, tmp_path: Path) -> None:
    config, quantization = ModelConfig.from_dict(raw), QuantizationConfig(4, 64, sym=True)
    state = quantize_state(make_state(config), config, quantization)
    companions = tmp_path / "float"
    companions.mkdir()
    (companions / "generation_config.json").write_text('{"chat_format": "raw"}')
    (companions / "qwen.tiktoken").write_text("IQ== 0\n")
    (companions / "README.md").write_text("stays")
    save_checkpoint(tmp_path / "int4", state, quantized_config(raw, quantization), companions)
    again = ModelConfig.from_folder(tmp_path / "int4")
    assert (again.quantization, again.dtype) == (quantization, "float16")
    loaded = load_state(tmp_path / "int4", again, torch.float16)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    files = {"config.json", "generation_config.json", "model.safetensors", "quantize_config.json", "qwen.tiktoken"}
    assert {path.name for path in (tmp_path / "int4").iterdir()} == files
    written = json.loads((tmp_path / "int4" / "quantize_config.json").read_text())
    assert QuantizationConfig.from_dict(written) == quantization


def test_tied_embeddings_are_stored_once(raw: dict[str, Any], make_state: Any, tmp_path: Path) -> None:
    raw["tie_word_embeddings"] = True
    config = ModelConfig.from_dict(raw)
    state = make_state(config)
    save_checkpoint(tmp_path / "tied", {**state, "lm_head.weight": state["transformer.wte.weight"]}, raw)
    loaded = load_state(tmp_path / "tied", config, torch.float32)
    assert loaded["lm_head.weight"] is loaded["transformer.wte.weight"]


def test_what_exists_is_never_replaced(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="mine exists already"):
        save_checkpoint(tmp_path / "mine", {}, raw)


def test_a_failure_leaves_nothing_behind(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "broken", {"a": torch.ones(1)}, {**raw, "note": object()})
    assert list(tmp_path.iterdir()) == []
