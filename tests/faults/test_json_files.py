"""JSON files of a checkpoint, and what may stand in their places: an error of one line, at once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime.config.checks import LARGEST_JSON, read_json
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import CheckpointError, ConfigError, PromptError, QVLError
from qvl_runtime.prompt.conversations import read_conversations
from qvl_runtime.reading.json_text import MAX_DEPTH, parse_json
from qvl_runtime.weights.checkpoint import Checkpoint
from qvl_runtime.weights.loader import load_weights, model_config
from tests.checkpoints import MakeState, Write

BAD = {  # what a file holds, and a part of the message
    "deep list": ("[" * 100_000, "nested more than 64 levels"),
    "deep object": ('{"a":' * 100_000, "nested more than 64 levels"),
    "deep and closed": ('{"a":' * 100 + "1" + "}" * 100, "nested more than 64 levels"),
    "long number": ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    "two values": ('{"a": 1, "b": {"c": 1, "c": 2}}', "two values under the key 'c'"),
    "long key": ('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 2}', "two values under the key 'kkk"),
    "text after it": ('{"a": 1} trailing', "after the end of its JSON"),
    "cut": ('{"a": [1, 2', "is not JSON"),
    "empty": ("", "is not JSON"),
    "list": ("[1]", "holds a JSON list"),
    "number": ("3", "holds a JSON int"),
    "nan alone": ("NaN", "holds a JSON float"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is UTF-16"),
    "escape characters": ('{"a": 1} \x1b[31m\nforged line', "after the end of its JSON"),
}
READERS: dict[str, Callable[[Path], Any]] = {  # by the file that they read
    "config.json": ModelConfig.from_folder,
    "generation_config.json": GenerationDefaults.from_folder,
    "quantize_config.json": ModelConfig.from_folder,
    "qvl_manifest.json": model_config,
    "model.safetensors.index.json": Checkpoint.open,
}


@pytest.fixture
def folder(raw: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with a configuration alone: the weights are read after the index."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def refused(folder: Path, name: str) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        READERS[name](folder)
    message = str(caught.value)
    assert name in message and message.isprintable() and len(message) < 700
    return message


@pytest.mark.parametrize("content, expected", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", READERS)
def test_damaged_and_hostile_json(folder: Path, name: str, content: str | bytes, expected: str) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refused(folder, name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has 108 bytes at most
        server.bind(path.name)
        os.chdir(here)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (pipe, "named pipe"),
    "folder": (Path.mkdir, "a folder"),
    "device without an end": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "empty device": (lambda path: path.symlink_to("/dev/null"), "a device"),
    "socket": (socket_file, "a socket"),
    "link to nothing": (lambda path: path.symlink_to("absent"), "a link to a file that is missing"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the special files of a Unix")
@pytest.mark.parametrize("make, expected", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(folder: Path, name: str, make: Callable[[Path], object], expected: str) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert expected in refused(folder, name)


def test_a_file_of_another_size_than_such_files_have(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(ConfigError, match=f"larger than {LARGEST_JSON:,} bytes"):
        read_json(tmp_path / "config.json")


def test_what_is_unusual_and_right(tmp_path: Path, raw: dict[str, Any]) -> None:
    text = json.dumps({**raw, "model_max_length": 10**30, "other": float("nan"), "deep": [[[[[[[1]]]]]]]}, indent=2)
    text = text.replace('"deep"', '"fp32": true, "deep"')  # twice with one value
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf  \r\n" + text.encode())
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "num_hidden_layers", "layer_norm_epsilon", "rotary_pct", "rotary_emb_base", "seq_length", "visual"],
)
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "[]", "true"])
def test_numbers_that_are_none(folder: Path, raw: dict[str, Any], name: str, value: str) -> None:
    (folder / "config.json").write_text(json.dumps({**raw, name: "VALUE"}).replace('"VALUE"', value))
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" + "0" * 400, "-" + "1" * 400])
def test_numbers_for_sampling_that_are_none(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"do_sample": true, "{name}": {value}}}')
    with pytest.raises(ConfigError, match=name):
        GenerationDefaults.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '[{"conversations": ' + "[" * 100_000, "9" * 5000, "[" + "9" * 5000]
)
def test_calibration_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(PromptError) as caught:
        read_conversations(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_calibration_file_with_a_name_that_no_file_has(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        read_conversations(tmp_path / ("x" * 300))


@pytest.mark.parametrize("depth, fits", [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (900, False)])
def test_depth_is_the_same_wherever_the_reader_is_called(depth: int, fits: bool) -> None:
    text = "[" * depth + "]" * depth

    def parse() -> Any:
        return parse_json(text, "x", QVLError)

    def deeply(levels: int) -> Any:
        return deeply(levels - 1) if levels else parse()

    for call in (parse, lambda: deeply(300)):
        if fits:
            assert call() == json.loads(text)
        else:
            with pytest.raises(QVLError, match="nested more than"):
                call()


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the special files of a Unix")
def test_pipe_in_the_place_of_a_shard(raw: dict[str, Any], make_state: MakeState, write: Write) -> None:
    config = ModelConfig.from_dict(raw)
    folder = write(raw, make_state(config), shards=2)
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="named pipe"):
        load_weights(folder, config, torch.float32, torch.device("cpu"))
