"""Requests, prompts and arguments in other encodings: a bad line is an error line, and a whole file is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine
from qvl_runtime.cli.chat import ChatSession, converse
from qvl_runtime.cli.options import ModelOptions
from qvl_runtime.cli.streams import argument_text, input_decoded
from qvl_runtime.cli.terminal import print_json
from qvl_runtime.errors import PromptError
from tests.fakes import FakeEngine, qvl

pytestmark = pytest.mark.cpu
BOM = b"\xef\xbb\xbf"
CHINESE = '{"id": "图", "prompt": "图里有什么"}\n' * 5
ASCII = '{"id": "a", "prompt": "what is it"}\n' * 5


def zipped(text: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("q.jsonl", text)
    return file.getvalue()


WHOLE: list[tuple[Callable[[str], bytes], str]] = [  # encodings of a whole file, and words of the error
    (lambda text: text.encode("utf-16"), "line 1 is UTF-16"),  # PSOpenAI#19
    (lambda text: text.encode("utf-16-le"), "UTF-16"),
    (lambda text: text.encode("utf-16-be"), "UTF-16"),
    (lambda text: text.encode("utf-32"), "line 1 is UTF-32"),
    (lambda text: gzip.compress(text.encode()), "is compressed by gzip: unpack it with gunzip"),
    (lambda text: bz2.compress(text.encode()), "is compressed by bzip2"),
    (lambda text: lzma.compress(text.encode()), "is compressed by xz"),
    (lambda text: b"\x28\xb5\x2f\xfd\x04\x00" + text.encode(), "is compressed by zstd"),
    (zipped, "is compressed by zip, as those of spreadsheets are"),
    (lambda text: b"\0" * 5000, "line 1 holds a NUL character"),
]
OF_CHINESE: list[tuple[Callable[[str], bytes], str]] = [
    (lambda text: text.encode("gbk"), "line 1 is not UTF-8 (byte 0xc0 at 27, which looks like GBK)"),
    (lambda text: text.encode("gb18030"), "which looks like GBK"),
    (lambda text: text.replace("图里有什么", "圖裡").replace("图", "圖").encode("big5"), "line 1 is not UTF-8"),
    (lambda text: text.replace("图里有什么", "ネコ").replace("图", "ネ").encode("shift_jis"), "line 1 is not UTF-8"),
    (lambda text: text.replace("图里有什么", "naïve café").replace("图", "é").encode("cp1252"), "line 1 is not UTF-8"),
]


@pytest.fixture(scope="module")
def loaded() -> Engine:
    return Engine(dtype="float32", max_running=8)


@pytest.fixture
def engine(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(ModelOptions, "open", lambda self: loaded)
    return loaded


def batch(tmp_path: Path, data: bytes, piped: bool = False) -> tuple[Any, list[dict[str, Any]]]:
    source, target = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(data)
    given: Any = ("-", target) if piped else (source, target)
    stdin: Any = data if piped else None
    result = qvl("batch", *given, "--temperature", 0, "--max-tokens", 2, stdin=stdin)
    lines = target.read_text(encoding="utf-8").splitlines() if target.exists() else []
    return result, [json.loads(line) for line in lines]


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        BOM + CHINESE.encode(),  # jsonlines#68, ragflow#19179: the first record was lost
        BOM + CHINESE.replace("\n", "\r\n").encode(),
        b"\r\n\r\n" + CHINESE.replace("\n", "\r\n\r\n").encode() + b"\x20\r\n",
        CHINESE.replace("\n", "\r").encode(),
        CHINESE.encode().rstrip(),
        b"".join(BOM + line + b"\n" for line in CHINESE.encode().splitlines()),  # files put together
        CHINESE.replace("图", "\\u56fe").encode(),
        ("{" + " " * 70_000 + CHINESE[1:]).encode(),  # a character is cut where a chunk ends
    ],
)
def test_marks_and_line_ends(engine: Engine, tmp_path: Path, data: bytes, piped: bool) -> None:
    result, lines = batch(tmp_path, data, piped)
    assert result.exit_code == 0, result.stderr
    assert [line["id"] for line in lines] == ["图"] * 5


@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(
    ("text", "encoded", "words"), [(ASCII, *case) for case in WHOLE] + [(CHINESE, *case) for case in OF_CHINESE]
)
def test_a_file_in_another_encoding_is_named(
    engine: Engine, tmp_path: Path, text: str, encoded: Callable[[str], bytes], words: str, piped: bool
) -> None:
    result, lines = batch(tmp_path, encoded(text), piped)
    assert (result.exit_code, lines) == (2, [])
    assert words in result.stderr and ("standard input" if piped else "q.jsonl") in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"prompt": "na\xefve"}', "q.jsonl line 3 is not UTF-8 (byte 0xef at 15)"),
        ('{"prompt": "图里有什么"}'.encode("gbk"), "line 3 is not UTF-8 (byte 0xc0 at 15, which looks like GBK)"),
        (b'{"prompt": "a\0b"}', "line 3 holds a NUL character"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 3 is not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "line 3 is not UTF-8"),  # a surrogate, encoded
        (b'{"prompt": "a\x01"}', "line 3 is not JSON (Invalid control character"),
        (gzip.compress(b"{}", mtime=0).replace(b"\n", b"").replace(b"\r", b""), "line 3 is not UTF-8"),
    ],
)
def test_a_bad_line_is_an_error_line(engine: Engine, tmp_path: Path, bad: bytes, words: str) -> None:
    first, *others = ASCII.encode().splitlines()
    result, lines = batch(tmp_path, b"\n".join([first, b"", bad, *others]))
    assert result.exit_code == 3, result.stderr
    assert [("error" in line) for line in lines] == [False, True, False, False, False, False]
    assert words in lines[1]["error"] and lines[1]["line"] == 3
    assert "6 of 6 requests already answered" in batch(tmp_path, (tmp_path / "q.jsonl").read_bytes())[0].stderr


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("图里有什么".encode("gbk"), "standard input line 1 is not UTF-8 (byte 0xc0 at 3, which looks like GBK)"),
        ("a\n图里有什么".encode("gbk"), "standard input line 2 is not UTF-8"),
        ("图里有什么".encode("utf-16"), "standard input line 1 is UTF-16"),
        ("what is it".encode("utf-16-le"), "standard input line 1 holds a NUL character, as text in UTF-16 does"),
        (gzip.compress(b"what is it", mtime=0), "standard input is compressed by gzip"),
        (b"a" * (16 * 2**20 + 1), "standard input has more than 16,777,216 bytes"),
    ],
)
def test_a_prompt_on_standard_input(fake_engine: FakeEngine, data: Any, words: str) -> None:
    """It was answered as if it were a question in garbage."""
    result = qvl("generate", "-", stdin=data)
    assert result.exit_code == 2 and words in result.stderr and not fake_engine.calls


def test_a_prompt_with_a_mark(fake_engine: FakeEngine) -> None:
    stdin: Any = BOM + "图里有什么\r\n".encode()
    assert qvl("generate", "-", stdin=stdin).stdout == "you said 图里有什么\n"


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    return engine


def test_a_conversation_in_another_encoding(fake_engine: FakeEngine) -> None:
    stdin: Any = BOM + "你好\r\n\r\n".encode() + "图里有什么\n".encode("gbk")
    result = qvl("chat", stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "you said 你好\n")
    assert "standard input line 3 is not UTF-8 (byte 0xc0 at 3, which looks like GBK)" in result.stderr


def test_a_terminal_with_an_encoding_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("你好\n图里有什么".encode("gbk")), encoding="gbk")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert input_decoded("图里有什么".encode("gbk")) == "图里有什么"
    engine: Any = FakeEngine()
    session = ChatSession(engine, None)
    assert converse(session) == 0
    assert [message["content"] for message in session.messages[1::2]] == ["you said 你好", "you said 图里有什么"]


@pytest.mark.parametrize("option", [[], ["--system"], ["--stop"]])
def test_arguments_in_another_encoding(fake_engine: FakeEngine, option: list[str]) -> None:
    """Python gives each byte that is not UTF-8 as a lone surrogate."""
    argument = "图里有什么".encode("gbk").decode("utf-8", "surrogateescape")
    arguments = ["a", *option, argument] if option else [argument]
    result = qvl("generate", *arguments)
    name = option[0] if option else "the prompt"
    assert result.exit_code == 2 and f"{name}: line 1 is not UTF-8 (byte 0xc0 at 3" in result.stderr
    assert "set the terminal to UTF-8" in result.stderr and not fake_engine.calls
    with pytest.raises(PromptError, match="which looks like GBK"):
        argument_text(argument, "x")


def test_a_file_name_in_another_encoding(loaded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelOptions, "open", lambda self: loaded)
    source = tmp_path / b"\xcd\xbc.jsonl".decode("utf-8", "surrogateescape")
    try:
        source.write_text(ASCII)
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    result = qvl("batch", source, tmp_path / "out.jsonl", "--max-tokens", 2)
    assert result.exit_code == 0, result.stderr


def test_json_loses_no_character_in_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", stdout)
    print_json({"text": "图里有什么"})
    stdout.flush()
    written = stdout.buffer.getvalue()
    assert json.loads(written) == {"text": "图里有什么"}
