"""Every way in which a checkpoint's files can be broken: a one-line error that names the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from tests.weights.faults import fails

Fixture = Any


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_missing_shard_is_named(raw: dict[str, Any], make_state: Fixture, write: Fixture, suffix: str) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), suffix, 3)
    gone = next(folder.glob(f"*-00002-of-00003{suffix}"))
    gone.unlink()
    fails(folder, config, "lacks 1 of 3 shards", gone.name)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99999])
def test_truncated_file_is_named(
    raw: dict[str, Any], make_state: Fixture, write: Fixture, suffix: str, share: float
) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), suffix)
    path = next(folder.glob(f"*{suffix}"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    fails(folder, config, str(path), "damaged or truncated", f"{path.stat().st_size} bytes", "fetch the file again")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_git_lfs_pointer_is_recognized(raw: dict[str, Any], write: Fixture, suffix: str) -> None:
    folder = write(raw, {}, suffix)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9876543210\n"
    next(folder.glob(f"*{suffix}")).write_bytes(pointer)
    fails(folder, ModelConfig.from_dict(raw), "git-lfs pointer", "git lfs pull")


class Harmful:
    """Unpickled by a careless loader, it would end the test run."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return (exit, (1,))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"model": Harmful()}, ["more than tensors"]),
        ({"epoch": 3}, ["'epoch'", "int"]),
        ({"state_dict": {"lm_head.weight": [1.0]}}, ["'state_dict'", "dict"]),
        ([torch.ones(1)], ["list", "state_dict"]),
    ],
)
def test_bin_files_hold_tensors_only(raw: dict[str, Any], write: Fixture, content: object, parts: list[str]) -> None:
    folder = write(raw, {}, ".bin")
    torch.save(content, folder / "pytorch_model.bin")
    fails(folder, ModelConfig.from_dict(raw), "pytorch_model.bin", *parts)


def break_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_index_naming_a_shard_that_lacks_the_tensor(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = ({*index.values()} - {index["lm_head.weight"]}).pop()
    break_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": other}))
    fails(folder, config, "lm_head.weight", other, "lacks it")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda index: index.pop("weight_map"), ["weight_map"]),
        (lambda index: index["weight_map"].update({"a": "../secret.safetensors"}), ["'../secret.safetensors'"]),
        (lambda index: index["weight_map"].update({"a": "new.safetensors"}), ["lacks 1 of 3", "new.safetensors"]),
    ],
)
def test_broken_index(
    raw: dict[str, Any], make_state: Fixture, write: Fixture, change: Callable[[dict[str, Any]], None], parts: list[str]
) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    break_index(folder, change)
    fails(folder, config, *parts)


def test_unreadable_index(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    (folder / "model.safetensors.index.json").write_text("{")
    fails(folder, config, "model.safetensors.index.json is not JSON")


def test_shards_without_an_index(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    (folder / "model.safetensors.index.json").unlink()
    fails(folder, config, "holds 2 .safetensors files", "no index", "model.safetensors.index.json")


def test_two_indexes(raw: dict[str, Any], make_state: Fixture, write: Fixture) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    (folder / "other.safetensors.index.json").write_text("{}")
    fails(folder, config, "holds 2 indexes", "expected one")


def test_weights_that_the_index_forgot_are_still_checked(
    raw: dict[str, Any], make_state: Fixture, write: Fixture
) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, {**make_state(config), "extra.weight": torch.ones(1)}, shards=2)
    break_index(folder, lambda index: index["weight_map"].pop("extra.weight"))
    fails(folder, config, "extra.weight")


def test_folder_without_weights(raw: dict[str, Any], tmp_path: Path) -> None:
    fails(tmp_path, ModelConfig.from_dict(raw), "holds no weights", "model.safetensors")
    fails(tmp_path / "nowhere", ModelConfig.from_dict(raw), "nowhere is not a folder")
