"""Requests and answers through pipes, standard streams and devices: each is opened once, or refused by name."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.batch import Batch, run_batch
from qvl_runtime.cli.endpoints import Input, Output
from qvl_runtime.cli.options import ModelOptions
from qvl_runtime.errors import PromptError
from tests.fakes import qvl

pytestmark = pytest.mark.cpu
REQUESTS = b'{"id": "a", "prompt": "hello"}\n\n{"id": "b", "raw": "a cat"}\n'
PARAMS = SamplingParams(max_tokens=3, temperature=0)


@pytest.fixture(scope="module")
def loaded() -> Engine:
    return Engine(dtype="float32", max_running=4)


@pytest.fixture
def engine(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(ModelOptions, "open", lambda self: loaded)
    return loaded


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_bytes(REQUESTS)
    return path


@pytest.fixture
def piped() -> Iterator[Path]:
    """A pipe that holds the requests, as `<(...)` gives it."""
    reading, writing = os.pipe()
    os.write(writing, REQUESTS)
    os.close(writing)
    yield Path(f"/dev/fd/{reading}")
    os.close(reading)


def ids(text: str | bytes) -> list[Any]:
    return [json.loads(line)["id"] for line in text.splitlines()]


def batch(*arguments: object, stdin: bytes | None = None) -> Any:
    return qvl("batch", *arguments, "--temperature", 0, "--max-tokens", 3, stdin=stdin)


def test_a_pipe_is_read_once(
    engine: Engine, piped: Path, tmp_path: Path
) -> None:  # json2parquet#100, jonq#1, jellex#12
    """It answered nothing, with code 0: counting had consumed the pipe."""
    target = tmp_path / "out.jsonl"
    result = batch(piped, target)
    assert result.exit_code == 0, result.stderr
    assert ids(target.read_bytes()) == ["a", "b"] and "wrote 2 answers" in result.stderr


def test_a_dash_is_standard_input_and_standard_output(
    engine: Engine, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = batch("-", "-", stdin=REQUESTS)
    assert (result.exit_code, ids(result.stdout)) == (0, ["a", "b"]), result.stderr
    assert ids(batch(source, "-").stdout) == ["a", "b"]
    assert batch("-", "out.jsonl", stdin=REQUESTS).exit_code == 0
    assert ids(Path("out.jsonl").read_bytes()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "q.jsonl"], "no file named -"


def test_a_pipe_resumes_with_the_same_requests(engine: Engine, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    batch(source, target)
    whole = target.read_bytes()
    target.write_bytes(whole[: whole.index(b"\n") + 5])
    result = batch("-", target, stdin=REQUESTS)
    assert result.exit_code == 0 and "1 requests already answered" in result.stderr
    assert ids(target.read_bytes()) == ["a", "b"]
    other = batch("-", target, stdin=REQUESTS.replace(b'"b"', b'"c"'))
    assert other.exit_code == 2 and "line 2 of" in other.stderr and "does not answer standard input" in other.stderr


def test_a_named_pipe_on_either_side(engine: Engine, source: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(REQUESTS))
    writer.start()
    assert ids(batch(pipe, "-").stdout) == ["a", "b"]
    writer.join()
    read: list[bytes] = []

    def read_later() -> None:
        time.sleep(0.2)
        read.append(pipe.read_bytes())

    reader = threading.Thread(target=read_later)
    reader.start()
    result = batch(source, pipe)
    reader.join()
    assert ids(read[0]) == ["a", "b"]
    assert f"waiting for a program that reads {pipe}" in result.stderr


def test_a_pipe_as_the_output_is_not_read(engine: Engine, source: Path) -> None:
    """`/dev/stdout` in a pipeline never ended: the answers of earlier runs were read from the pipe first."""
    reading, writing = os.pipe()
    result = batch(source, f"/dev/fd/{writing}")
    os.close(writing)
    assert result.exit_code == 0
    with open(reading, "rb") as file:
        assert ids(file.read()) == ["a", "b"]


def test_a_full_device(engine: Engine, source: Path) -> None:
    """It was read for earlier answers, without end."""
    result = batch(source, "/dev/full")
    assert (result.exit_code, result.stderr) == (2, "error: /dev/full: No space left on device\n")
    assert batch(source, "/dev/null").exit_code == 0


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/dev/urandom", "/", "/dev/tty"])
def test_what_has_no_lines_is_refused(engine: Engine, tmp_path: Path, name: str) -> None:
    result = batch(name, tmp_path / "out.jsonl")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {name} is a ")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
def test_no_requests_are_a_mistake(engine: Engine, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    for arguments, stdin, name in ((path, None, "empty.jsonl"), ("-", content, "standard input"), ("/dev/null",) * 3):
        result = batch(arguments, tmp_path / "out.jsonl", stdin=stdin)
        assert result.exit_code == 2 and f"{name} holds no request" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_do_not_go_where_the_requests_are(engine: Engine, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for given, target in ((source, "link"), (source, "hard"), (tmp_path / "pipe", "pipe")):
        result = batch(given, tmp_path / target)
        assert result.exit_code == 2 and "holds the requests" in result.stderr
    assert source.read_bytes() == REQUESTS


@pytest.mark.parametrize("name", ["folder", "missing/out.jsonl"])
def test_where_nothing_can_be_written(engine: Engine, source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    result = batch(source, tmp_path / name)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {tmp_path / name} ")


def test_two_batches_with_the_same_answers(engine: Engine, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    for existing in (True, False):
        first = Output(target)
        first.begin(0)
        result = batch(source, target)
        assert result.exit_code == 2 and "another process is writing" in result.stderr
        first.close()
        if existing:
            second = Output(target)  # looks before the first creates it
            target.unlink()
            second.close()


def test_answers_come_as_soon_as_requests_do(loaded: Engine) -> None:
    """A program that sends a request and waits for its answer, mistakes included, must not wait for ever."""
    to_batch, from_batch = os.pipe(), os.pipe()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            list(run_batch(loaded, Path(f"/dev/fd/{to_batch[0]}"), Path(f"/dev/fd/{from_batch[1]}"), PARAMS))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with open(from_batch[0], encoding="utf-8", closefd=True) as answers:
        for number, line in enumerate([b'{"raw": "a"}', b"nonsense", b'{"raw": "b"}\n{"raw": "c"}', b"{}"]):
            os.write(to_batch[1], line + b"\n")
            for _ in range(line.count(b"\n") + 1):
                record = json.loads(answers.readline())
                assert ("error" in record) == (number in (1, 3))
    os.close(to_batch[1])
    thread.join(20)
    assert not thread.is_alive() and not failure
    os.close(to_batch[0])
    os.close(from_batch[1])


def test_a_pipe_that_does_not_block(loaded: Engine) -> None:
    """A shell or a parent may have set this on a pipe that it shares; a read then gives nothing rather than waits."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    source = Input(Path("/dev/null"))
    source._file = open(reading, "rb", buffering=0)  # noqa: SIM115
    source.path = None

    def send() -> None:
        os.write(writing, REQUESTS)
        os.close(writing)

    threading.Timer(0.2, send).start()
    target = Output(Path("/dev/null"))
    job = Batch(source, target, PARAMS)
    assert not job.is_complete()
    assert [progress.done for progress in job.run(loaded)] == [1, 2]
    source.close()
    target.close()


def test_errors_do_not_pile_up(loaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million lines of nonsense are written as they are read, also while an answer before them is not ready."""
    monkeypatch.setattr("qvl_runtime.cli.batch.MAX_WAITING", 10)
    source, target, most = Input(Path("/dev/null")), Output(Path("/dev/null")), 0
    source._file = io.BytesIO(b'{"raw": "a"}\n' + b"?\n" * 20_000)
    job = Batch(source, target, SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    for _ in job.run(loaded):
        most = max(most, len(job._ready))
    assert most <= 11
    assert job.progress == (20_001, 20_000, 30)


def test_a_line_without_an_end(loaded: Engine) -> None:
    source, target = Input(Path("/dev/null")), Output(Path("/dev/null"))
    source._file = io.BytesIO(b"a" * 2**20)
    job = Batch(source, target, PARAMS, limit=1000)
    with pytest.raises(PromptError, match="line 1 has no end after"):
        list(job.run(loaded))
