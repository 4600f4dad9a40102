"""Text files in other encodings are named with their line; a byte order mark is read over."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qvl_runtime
from qvl_runtime import Engine
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.convert.convert import convert
from qvl_runtime.convert.restore import restore
from qvl_runtime.errors import QVLError
from qvl_runtime.prompt.conversations import read_conversations
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.weights.checkpoint import Checkpoint
from tests.gptq_checkpoints import same_files

NANO = Path(qvl_runtime.__file__).parent / "nano"
BOM = b"\xef\xbb\xbf"
CONVERSATION = [{"conversations": [{"from": "user", "value": "描述这张图片"}]}]
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": ModelConfig.from_folder,
    "quantize_config.json": ModelConfig.from_folder,
    "generation_config.json": GenerationDefaults.from_folder,
    "model.safetensors.index.json": Checkpoint.open,
    "calibration.json": lambda folder: read_conversations(folder / "calibration.json"),
}


@pytest.fixture
def folder(int4: Path) -> Path:
    """A checkpoint with two shards, and every text file that is read."""
    raw = json.loads((int4 / "config.json").read_text())
    (int4 / "quantize_config.json").write_text(json.dumps(raw["quantization_config"]))
    (int4 / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 3}))
    (int4 / "calibration.json").write_text(json.dumps(CONVERSATION, ensure_ascii=False), encoding="utf-8")
    return int4


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_dropped(folder: Path, name: str) -> None:  # promptflow#4172, MedQA-ChatGLM#2
    path = folder / name
    expected = READERS[name](folder)
    path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    found = READERS[name](folder)
    if isinstance(found, Checkpoint) and isinstance(expected, Checkpoint):
        assert found.names == expected.names
    else:
        assert found == expected


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (lambda text: text.encode("utf-16"), ["line 1", "UTF-16"]),  # PSOpenAI#19
        (lambda text: text.encode("utf-16-le"), ["line 1", "UTF-16"]),
        (lambda text: text.encode("utf-16-be"), ["line 1", "UTF-16"]),
        (lambda text: text.encode("utf-32"), ["line 1", "UTF-32"]),
        (lambda text: f'{{\n"名称": "描述"}}{text}'.encode("gbk"), ["line 2", "0xc3", "GBK"]),
        (lambda text: b'{\n\n"a": "na\xefve"}', ["line 3", "0xef at 9"]),
        (lambda text: f"\n{text}".encode() + b"\x80", ["line 2", "0x80"]),
        (lambda text: gzip.compress(text.encode()), ["gzip", "gunzip"]),
    ],
)
def test_other_encodings_are_named(folder: Path, name: str, encoded: Callable[[str], bytes], words: list[str]) -> None:
    path = folder / name
    path.write_bytes(encoded(path.read_text(encoding="utf-8")))
    with pytest.raises(QVLError) as caught:
        READERS[name](folder)
    assert all(word in str(caught.value) for word in (str(path), *words)), str(caught.value)


def test_latin_letters_are_not_taken_for_chinese(folder: Path) -> None:
    (folder / "config.json").write_bytes('{"straße": "größer, naïve café"}'.encode("latin-1"))
    with pytest.raises(QVLError, match="0xdf at 7") as caught:
        ModelConfig.from_folder(folder)
    assert "GBK" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda text: BOM + text, lambda text: text.replace(b"\n", b"\r\n") + b" \r\n"])
def test_a_vocabulary_of_windows(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    original = (NANO / "qwen.tiktoken").read_bytes()
    (tmp_path / "qwen.tiktoken").write_bytes(change(original))
    assert Tokenizer.from_folder(tmp_path).encode("a cat") == Tokenizer.from_folder(NANO).encode("a cat")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_vocabulary_in_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes((NANO / "qwen.tiktoken").read_text().encode(encoding))
    with pytest.raises(QVLError, match=r"qwen\.tiktoken is text in UTF-16"):
        Tokenizer.from_folder(tmp_path)


def test_an_engine_of_a_folder_saved_by_notepad(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "nano")
    for path in (tmp_path / "nano").glob("*.json"):
        path.write_bytes(BOM + path.read_bytes())
    assert (
        Engine(tmp_path / "nano", device="cpu").generate("a cat")[0].text
        == Engine(device="cpu").generate("a cat")[0].text
    )


def test_marks_and_line_ends_are_restored(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes(BOM + (folder / name).read_bytes().replace(b", ", b",\r\n"))
    convert(folder, tmp_path / "converted")
    restore(tmp_path / "converted", tmp_path / "again")
    same_files(folder, tmp_path / "again")
