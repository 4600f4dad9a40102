"""Bad input on the command line: one line that names the problem and the fix, and exit code 2."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from qvl_runtime.cli.app import app
from qvl_runtime.engine.engine import NANO

pytestmark = pytest.mark.cpu


def error_of(*arguments: object) -> str:
    """The error of `qvl generate`: one line on standard error, nothing on standard output, exit code 2."""
    result = CliRunner().invoke(app, ["generate", "--quiet", *map(str, arguments)], env={"NO_COLOR": "1"})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line, *rest = result.stderr.splitlines()
    assert not rest and line.startswith("error: "), result.stderr
    return line


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint, to damage."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def test_truncated_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    message = error_of("Hello", "--model", copy)
    assert "model.safetensors" in message and "truncated" in message


def test_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    message = error_of("Hello", "--model", copy)
    assert "model-00002-of-00002.safetensors" in message and "fetch" in message


def test_unknown_architecture(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    (copy / "config.json").write_text(json.dumps(config))
    message = error_of("Hello", "--model", copy)
    assert "qwen2_vl" in message and "Qwen-VL-Chat-Int4" in message


def test_misshapen_weight(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    message = error_of("Hello", "--model", copy)
    assert "transformer.h.0.mlp.w1.weight" in message and "expected (256, 256)" in message


def test_no_such_model() -> None:
    assert "Qwen/Qwen-VL-Chat-Int4" in error_of("Hello", "--model", "Qwen/Qwen-VL-Chat-Int4")
    assert "nowhere" in error_of("Hello", "--model", "./nowhere")


def test_broken_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert "broken.jpg" in error_of("What is this?", "--image", path)


def test_enormous_image(tmp_path: Path) -> None:
    """A PNG header of 20,000 x 20,000 pixels, which would take 1.2 GB to decode."""
    path = tmp_path / "enormous.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, empty, b"IEND"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    message = error_of("What is this?", "--image", path)
    assert "enormous.png" in message and "over the limit of 67,108,864 pixels with 400,000,000" in message


def test_empty_prompt() -> None:
    assert "empty" in error_of("", "--raw")
    assert "empty" in error_of("")


def test_unclosed_image_tag() -> None:
    message = error_of("<img>cat.jpg What is this?", "--raw")
    assert "<img>" in message and "</img>" in message


def test_prompt_longer_than_the_context() -> None:
    message = error_of("word " * 10_000)
    assert "8192" in message and "tokens" in message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--max-tokens", 0, "at least 1"), ("--temperature", -1, "0 (greedy) or more"), ("--top-p", 2, "at most 1")],
)
def test_sampling_out_of_range(option: str, value: float, expected: str) -> None:
    message = error_of("Hello", option, value)
    assert str(value) in message and expected in message


def test_kernels_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_KERNELS", "refernce")
    message = error_of("Hello")
    assert "'refernce'" in message and "expected 'reference'" in message
