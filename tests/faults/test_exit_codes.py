"""What a script sees: 0, 1 for a bug, 2 for the user's error, 3 for failed requests, 130 and 141 for signals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.cli.app import main
from qvl_runtime.cli.options import ModelOptions
from qvl_runtime.cli.streams import Closed
from qvl_runtime.errors import CheckpointError, PromptError
from qvl_runtime.schedule.api import Completion, Timings, Usage
from tests.fakes import SCRIPT, FakeEngine, qvl

pytestmark = pytest.mark.unit
DONE = Completion("text", (1,), "stop", Usage(1, 1, 0, 0), Timings(0, 0, 0, 0, 1, 0))
REQUESTS = '{"raw": "a"}\n{"raw": "fail"}\n{"raw": "b"}\n'


class Answers:
    """An engine whose answers are given by the prompt."""

    raised: BaseException | None = None

    def as_completed(self, requests: Iterator[Any]) -> Iterator[Any]:
        for tag, prompt, _ in requests:
            if prompt == "raise":
                assert self.raised is not None
                raise self.raised
            yield tag, PromptError("no answer") if prompt == "fail" else DONE


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    engine = Answers()
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    return engine


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_failed_requests(answers: Answers, tmp_path: Path, quiet: tuple[str, ...]) -> None:
    """With -q nothing told them from answers."""
    source, target = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text(REQUESTS)
    assert qvl("batch", source, target, *quiet).exit_code == 3
    assert qvl("batch", source, target, *quiet).exit_code == 3, "also when they failed in an earlier run"
    source.write_text(REQUESTS + '{"raw": "c"}\n')
    again = qvl("batch", source, target, *quiet)
    assert again.exit_code == 3
    expected = f"3 of 4 requests already answered in {target} (1 of them errors)\nwrote 1 answers to {target} in"
    assert again.stderr.startswith("" if quiet else expected) and bool(again.stderr) != bool(quiet)
    target.unlink()
    source.write_text('{"raw": "a"}\n')
    assert qvl("batch", source, target, *quiet).exit_code == 0
    assert qvl("batch", source, "-", *quiet).exit_code == 0


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("shapes differ"), 1, "error: RuntimeError: shapes differ (a bug in qvl; --debug shows where)"),
        (CheckpointError("a bad shard"), 2, "error: a bad shard"),
        (OSError(5, "Input/output error", "disk"), 2, "error: disk: Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_ends_a_run(answers: Answers, tmp_path: Path, error: BaseException, code: int, words: str) -> None:
    source, target = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text(REQUESTS + '{"raw": "raise"}\n')
    answers.raised = error
    result = qvl("batch", source, target)
    assert (result.exit_code, result.stderr.strip()) == (code, words)
    assert len(target.read_text().splitlines()) == 3
    source.write_text(REQUESTS + '{"raw": "a"}\n')
    assert qvl("batch", source, target, "-q").exit_code == 3


def test_the_codes_are_in_the_help() -> None:
    text = " ".join(qvl("--help").stdout.split())
    for words in ("0 success", "1 a bug in qvl", "2 an error to fix", "3 requests of a batch failed", "130", "141"):
        assert words in text
    assert "The exit code is then 3" in " ".join(qvl("batch", "--help").stdout.split())


@pytest.mark.parametrize("prompt", ["- list the objects", "-\tlist", "- ", "-\nlist\n- more"])
def test_a_prompt_may_be_a_list(fake_engine: FakeEngine, prompt: str) -> None:
    """`- list the objects` was "No such option"."""
    for arguments in ((prompt,), (prompt, "--temperature", 0), ("--quiet", prompt), ("--", prompt)):
        result = qvl("generate", *arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"you said {prompt}\n"
    assert qvl("generate", "x", "--system", prompt, "--stop", prompt, "--stop", "y").exit_code == 0
    messages, params = fake_engine.calls[-1]
    assert messages[0]["content"] == prompt and params.stop == (prompt, "y")


def test_a_prompt_that_looks_like_an_option(fake_engine: FakeEngine) -> None:
    for prompt in ("-5 degrees, what is it", "--what is it"):
        result = qvl("generate", prompt)
        assert result.exit_code == 2 and "goes last, after --" in " ".join(result.stderr.replace("│", "").split())
        assert qvl("generate", "--", prompt).stdout == f"you said {prompt}\n"
    assert "after --" not in qvl("generate", "x", "--tempreature", "1").stderr


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    return engine


@pytest.mark.parametrize("command", [("generate", "x"), ("generate", "x", "--json"), ("chat",), ("batch", "q", "-")])
def test_a_closed_standard_output(
    fake_engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    (tmp_path / "q").write_text(REQUESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", Closed("standard output"))
    monkeypatch.setattr(sys, "argv", ["qvl", *command])
    monkeypatch.setattr("qvl_runtime.cli.app.prepare", lambda: None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and not fake_engine.calls


SHELL = """
{qvl} generate hello >&-; echo $?
{qvl} generate - <&-; echo $?
{qvl} generate hello 2>&-; echo $?
{qvl} generate hello >/dev/full; echo $?
{qvl} --help | true; echo ${{PIPESTATUS[0]}}
"""


def test_streams_that_a_shell_closed_or_that_are_full(tmp_path: Path) -> None:
    """They were an AttributeError, "a bug in qvl"."""
    (tmp_path / "run.py").write_text(
        SCRIPT.format(arguments="").replace('print("ready", file=sys.stderr, flush=True)', "pass")
    )
    script = SHELL.format(qvl=f"{sys.executable} {tmp_path}/run.py")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.stdout.split("\n") == ["2", "2", "you said hello", "0", "2", "141", ""]
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert errors == [
        "error: standard output: closed by the shell",
        "error: standard input: closed by the shell",
        "error: No space left on device",
    ]


def test_a_closed_stream_leaves_its_number_to_the_null_device() -> None:
    """Otherwise the next file that is opened is written to instead: descriptor 1 would be the model's weights."""
    code = (
        "import os; from qvl_runtime.cli.streams import prepare; prepare(); "
        "file = open(os.devnull); assert file.fileno() > 2; assert all(os.path.sameopenfile(n, 3) for n in (0, 1))"
    )
    command = f"{sys.executable} -c '{code}' <&- >&-"
    assert subprocess.run(["bash", "-c", command], timeout=60).returncode == 0
