"""Sizes in config.json that no model has: refused before a loop over them begins, by everything that reads one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.cli.plan import plan_report
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.engine.engine import NANO, Engine
from qvl_runtime.errors import CheckpointError, ConfigError, QVLError
from qvl_runtime.plan.options import PlanOptions
from qvl_runtime.quantize.quantizer import Quantizer

SIZES = ["num_hidden_layers", "vocab_size", "seq_length", "max_position_embeddings", "intermediate_size"]
SIZES += [f"visual.{name}" for name in ("layers", "width", "image_size", "patch_size", "n_queries", "mlp_ratio")]
READERS: dict[str, Callable[[Path], object]] = {
    "engine": lambda folder: Engine(folder, device="cpu", max_model_len=64, kv_cache_bytes=2 << 20),
    "plan": lambda folder: plan_report(folder, None, PlanOptions(), measure=False),
    "convert": lambda folder: convert(folder, folder.parent / "new"),
    "quantize": lambda folder: Quantizer.open(folder, folder.parent / "new"),
}


def changed(tmp_path: Path, name: str, value: Any) -> Path:
    """Nano with another value of one field of config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in NANO.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    raw = json.loads((NANO / "config.json").read_text())
    section, _, key = name.rpartition(".")
    (raw[section] if section else raw)[key] = value
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.timeout(30)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_no_model_has(tmp_path: Path, name: str, reader: str) -> None:
    folder = changed(tmp_path, name, 2**40)
    with pytest.raises(ConfigError, match=name.replace("patch_size", "image_size")) as caught:
        READERS[reader](folder)
    assert len(str(caught.value)) < 300


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["num_hidden_layers", "visual.layers"])
@pytest.mark.parametrize("value", [1024, 1025, 10**6, 10**9])
def test_layers(tmp_path: Path, name: str, value: int) -> None:
    """As many as are supported are looked for, and not found; more are refused at once."""
    folder = changed(tmp_path, name, value)
    expected = CheckpointError if value == 1024 else ConfigError
    with pytest.raises(expected):
        convert(folder, tmp_path / "new")
    if value > 1024:
        for read in READERS.values():
            with pytest.raises(ConfigError, match=f"{name} is {value}; supported are values up to 1,024"):
                read(folder)


@pytest.mark.parametrize("ratio", [1e-300, 1e-10, 1e300, 65.0])
def test_mlp_ratio(tmp_path: Path, ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"visual.mlp_ratio is"):
        plan_report(changed(tmp_path, "visual.mlp_ratio", ratio), None, PlanOptions(), measure=False)


@pytest.mark.parametrize("base", [1e19, 1e308])
def test_rotary_base(tmp_path: Path, base: float) -> None:
    with pytest.raises(ConfigError, match="rotary_emb_base"):
        ModelConfig.from_folder(changed(tmp_path, "rotary_emb_base", base))


def test_contexts_of_too_many_training_lengths(tmp_path: Path) -> None:
    """A prompt would need a 17th NTK factor."""
    folder = changed(tmp_path, "seq_length", 2)
    raw = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1 << 20}
    with pytest.raises(ConfigError, match="training lengths"):
        ModelConfig.from_dict(raw)
    assert ModelConfig.from_dict(raw | {"use_dynamic_ntk": False}).seq_length == 2
    assert ModelConfig.from_dict(raw | {"max_position_embeddings": 1 << 15}).context_limit == 1 << 15


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "-1e400"])
def test_temperatures_of_hundreds_of_digits(tmp_path: Path, value: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"do_sample": true, "temperature": {value}}}')
    with pytest.raises(ConfigError, match="temperature"):
        GenerationDefaults.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"!!!! 0\n", b"QQ== x", b"QQ== 0 1", b"\xff\xfe\0\0", b"QQ== " + b"9" * 5000, b""])
def test_vocabularies_that_are_none(tmp_path: Path, content: bytes) -> None:
    folder = changed(tmp_path, "seq_length", 512)
    (folder / "qwen.tiktoken").unlink()
    (folder / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken"):
        READERS["engine"](folder)


def test_vocabularies_with_holes_and_bombs(tmp_path: Path) -> None:
    folder = changed(tmp_path, "seq_length", 512)
    lines = (NANO / "qwen.tiktoken").read_bytes().splitlines()
    path = folder / "qwen.tiktoken"
    path.unlink()
    damages = (lines[:-1], lines[1:], [*lines[:300], *lines[301:]], [*lines[:-1], lines[-1] + b"0"])
    for damaged in (*damages, [*lines[:-1], b"QUFB" * 10**6 + b" " + lines[-1].split()[1]]):
        path.write_bytes(b"\n".join(damaged))
        with pytest.raises(QVLError, match=r"qwen\.tiktoken"):
            READERS["engine"](folder)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(CheckpointError, match="larger than"):
        READERS["engine"](folder)
