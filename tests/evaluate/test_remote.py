"""Questions to a server: the same answers as from the engine, and what a server may do wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvl_runtime import Engine
from qvl_runtime.errors import ConfigError, DownloadError
from qvl_runtime.evaluate.asking import EngineAsker
from qvl_runtime.evaluate.comparison import compare
from qvl_runtime.evaluate.http_client import Client
from qvl_runtime.evaluate.judge import Judge
from qvl_runtime.evaluate.prompts import Question, Style
from qvl_runtime.evaluate.remote import ServerAsker
from qvl_runtime.evaluate.report import report_task
from qvl_runtime.evaluate.runner import RunOptions, run_task
from qvl_runtime.evaluate.session import evaluate
from qvl_runtime.evaluate.tasks.table import TASKS
from tests.evaluate.data_cases import CASES
from tests.evaluate.data_files import write
from tests.evaluate.fake_server import Reply, answering, as_json, said

pytestmark = pytest.mark.cpu
QUESTION = Question([{"role": "user", "content": [{"text": "Hello"}]}], raw=False, max_tokens=8)


@pytest.fixture(scope="module")
def nano() -> Engine:
    return Engine(dtype="float32", max_model_len=2048, allow_urls=False, progress=False)


@pytest.fixture(scope="module")
def address(nano: Engine) -> Iterator[str]:
    """A server of nano's."""
    pytest.importorskip("starlette", reason="needs the extra server")
    from tests.server.conftest import serving

    with serving(lambda: nano, model_names=("nano",)) as live:
        yield f"{live.url}/v1"


@pytest.mark.parametrize(
    ("task", "style"),
    [
        ("refcoco_val", "original"),
        ("flickr", "original"),
        ("scienceqa_test_img", "original"),
        ("seed_bench", "original"),
        ("mmbench_dev_20230712", "original"),
        ("mme", "original"),
        ("vqav2_val", "chat"),
        ("touchstone_en", "chat"),
    ],
)
def test_the_server_answers_as_the_engine_does(
    task: str, style: str, nano: Engine, address: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", next(case for case in CASES if case.task == task))
    options = RunOptions(data, Style(style), max_tokens=12)
    here = run_task(TASKS[task], EngineAsker(nano, "nano"), options, tmp_path / "here" / task)
    there = run_task(TASKS[task], ServerAsker(Client(address)), options, tmp_path / "there" / task)
    assert [answer.text for answer in there.answers] == [answer.text for answer in here.answers]
    assert not any(answer.error for answer in here.answers)
    differences = compare(report_task(here, "chatml"), tmp_path / "there")
    assert all((d.interval.value, d.same) == (0.0, d.of) for d in differences)


def test_a_busy_server_is_asked_again() -> None:
    calls: list[float] = []

    def handler(path: str, body: object) -> Reply:
        calls.append(time.monotonic())
        if len(calls) < 3:
            return as_json({"error": {"message": "too many"}}, 429, **{"Retry-After": "0.05"})
        return said("hi")

    with answering(handler) as url:
        [(number, reply)] = ServerAsker(Client(url), "m").answers([(7, QUESTION)])
    assert (number, getattr(reply, "text", reply), len(calls)) == (7, "hi", 3)
    assert calls[1] - calls[0] >= 0.05


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (as_json({"error": {"message": "the prompt is too long"}}, 400), "400: the prompt is too long"),
        ((404, {}, b"<html>"), "404"),
        ((200, {}, b"<html>"), "expected a JSON object"),
        (as_json({"choices": []}), "without choices"),
        (as_json({"nothing": 1}), "without choices"),
    ],
)
def test_an_error_of_the_server_is_the_sample_s(reply: Reply, message: str) -> None:
    with answering(lambda path, body: reply) as url:
        [(_, error)] = ServerAsker(Client(url), "m").answers([(0, QUESTION)])
    assert isinstance(error, DownloadError)
    assert message in str(error)


def test_addresses_that_are_none_and_servers_that_are_off() -> None:
    with pytest.raises(DownloadError, match="http://"):
        Client("localhost:8000")
    with pytest.raises(DownloadError, match="cannot be reached"):
        Client("http://127.0.0.1:9/v1").get("/models")
    with answering(lambda path, body: as_json({"data": []})) as url, pytest.raises(DownloadError, match="no models"):
        ServerAsker(Client(url))


def test_choices_in_chat_turns_are_refused() -> None:
    question = Question(QUESTION.prompt, raw=False, choices=("A", "B"))
    with answering(lambda path, body: said("")) as url:
        [(_, error)] = ServerAsker(Client(url), "m").answers([(0, question)])
    assert isinstance(error, ConfigError)


def test_the_judge_sees_both_orders_and_its_errors_are_left_out(tmp_path: Path) -> None:
    data = write(tmp_path / "data", next(case for case in CASES if case.task == "touchstone_en"))
    queries: list[str] = []

    def handler(path: str, body: dict[str, object]) -> Reply:
        if path.endswith("/models"):
            return as_json({"data": [{"id": "model"}]})
        text = json.dumps(body["messages"])
        if "Assistant 1" not in text:
            return said("my answer")
        queries.append(text)
        if "It is a cat." in text and text.index("It is a cat.") > text.index("my answer"):
            return said("no marks at all")
        first_is_mine = text.index("my answer") < text.index("It is a")
        return said("8 5" if first_is_mine else "9 6")

    with answering(handler) as url:
        client = Client(url)
        options = RunOptions(data, Style("chat"))
        evaluation = evaluate(
            [TASKS["touchstone_en"]], ServerAsker(client), options, tmp_path / "out", {}, judge=Judge(client, "judge")
        )
        again = evaluate(
            [TASKS["touchstone_en"]], ServerAsker(client), options, tmp_path / "out", {}, judge=Judge(client, "judge")
        )
    report = evaluation.reports[0]
    scores = {score.name: score.value for score in report.scores}
    # Three of four judgments: 6 as second of question 0, 8 as first of it, 6 as second of question 1.
    assert scores == pytest.approx({"score": 2000 / 3, "reference answers": 2300 / 3, "basic": 2000 / 3})
    assert any("1 judgments gave no marks" in note for note in report.notes)
    assert len(queries) == 4  # the second run asks nothing
    assert {score.name: score.value for score in again.reports[0].scores} == scores
