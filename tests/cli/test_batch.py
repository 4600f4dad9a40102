"""`qvl batch`: order, errors as lines, resuming after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.batch import run_batch
from qvl_runtime.cli.options import ModelOptions
from qvl_runtime.errors import PromptError
from tests.fakes import make_image, qvl

pytestmark = pytest.mark.cpu
PARAMS = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_running=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight records: long and short, with and without images, one that is not JSON and two that are invalid."""
    image = str(make_image(tmp_path / "dog.png"))
    records: list[Any] = [
        {"id": "long", "prompt": "Describe it", "images": [image], "params": {"max_tokens": 40, "ignore_eos": True}},
        {"id": "short", "prompt": "Hello", "params": {"max_tokens": 1}},
        "not json",
        {"id": "gone", "prompt": "What is this?", "images": ["no/such.png"]},
        {"messages": [{"role": "user", "content": "Hello!"}]},
        {"id": 7, "raw": f"<img>{image}</img>Describe", "params": {"n": 2, "temperature": 1.0, "seed": 1}},
        {"id": "odd", "prompt": "Hello", "params": {"max_tokns": 1}},
        {"id": "last", "prompt": "Hello", "params": {"stop": ["e"]}},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_come_in_order_and_errors_are_lines(engine: Engine, source: Path) -> None:
    target = source.with_name("out.jsonl")
    *_, last = run_batch(engine, source, target, PARAMS)
    lines = answers(target)
    assert [line["index"] for line in lines] == list(range(8))
    assert [line["id"] for line in lines] == ["long", "short", None, "gone", None, 7, "odd", "last"]
    assert [i for i, line in enumerate(lines) if "error" in line] == [2, 3, 6]
    assert "no/such.png" in lines[3]["error"] and "max_tokns" in lines[6]["error"]
    assert (last.done, last.errors) == (8, 3)
    assert (lines[0]["usage"]["completion_tokens"], lines[1]["usage"]["completion_tokens"]) == (40, 1)
    assert len(lines[5]["alternatives"]) == 1
    greeting = engine.chat([{"role": "user", "content": "Hello!"}], PARAMS)
    assert lines[4]["text"] == greeting.text


def test_an_interrupted_run_resumes(engine: Engine, source: Path) -> None:
    whole, target = source.with_name("whole.jsonl"), source.with_name("out.jsonl")
    list(run_batch(engine, source, whole, PARAMS))
    for stop in (1, 3, 6):
        target.unlink(missing_ok=True)
        running = run_batch(engine, source, target, PARAMS)
        while next(running).done < stop:
            pass
        running.close()  # type: ignore[attr-defined]
        with target.open("a") as file:
            file.write('{"index": 99, "tex')  # cut off in the middle of a line
        first, *_ = run_batch(engine, source, target, PARAMS)
        assert first.done == stop + 1
        for mine, expected in zip(answers(target), answers(whole), strict=True):
            mine.get("usage", {}).pop("cached_tokens", 0), expected.get("usage", {}).pop("cached_tokens", 0)
            assert mine == expected
    assert list(run_batch(engine, source, target, PARAMS)) == []
    pool = engine.core.runner.cache.pool
    assert pool.available == pool.num_blocks


def test_answers_to_other_requests_are_left_unchanged(engine: Engine, source: Path) -> None:
    target = source.with_name("other.jsonl")
    target.write_text('{"index": 0, "id": "another", "text": ""}\n')
    with pytest.raises(PromptError, match=r"line 1 of .*other\.jsonl does not answer .*in\.jsonl"):
        list(run_batch(engine, source, target, PARAMS))
    assert "another" in target.read_text()


def test_the_command(engine: Engine, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    target = source.with_name("out.jsonl")
    result = qvl("batch", source, target, "--temperature", 0, "--max-tokens", 4)
    assert (result.exit_code, result.stdout) == (3, ""), result.stderr
    assert "wrote 8 answers (3 of them errors)" in result.stderr and f"to {target} in" in result.stderr
    again = qvl("batch", source, target)
    assert again.exit_code == 3 and "8 of 8 requests already answered" in again.stderr
    missing = qvl("batch", source.with_name("none.jsonl"), target)
    assert missing.exit_code == 2 and "none.jsonl" in missing.stderr


def test_a_file_without_answers_is_left_unchanged(engine: Engine, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "Hello!"}')  # no newline at its end
    with pytest.raises(PromptError, match="holds the requests"):
        list(run_batch(engine, requests, requests, PARAMS))
    notes = tmp_path / "notes.txt"
    notes.write_text("keep me")
    with pytest.raises(PromptError, match="does not end with a batch answer"):
        list(run_batch(engine, requests, notes, PARAMS))
    assert requests.read_text() == '{"prompt": "Hello!"}' and notes.read_text() == "keep me"


def test_openai_s_batch_form_with_completions(engine: Engine, tmp_path: Path) -> None:
    """Lines for /v1/completions: texts, token ids, echo with scores; each of the others says what it wants."""
    ids = engine.tokenizer.encode("One two three", "none")
    bodies: list[Any] = [
        {"prompt": "One two three", "max_tokens": 4},
        {"prompt": [ids], "max_tokens": 0, "echo": True, "logprobs": 2},
        {"prompt": ["One", "two"]},
        {"prompt": "One", "max_tokens": 0},
        {"prompt": "One", "stream": True},
        {"messages": []},
    ]
    lines = [{"custom_id": i, "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)]
    lines.append({"custom_id": 6, "method": "POST", "url": "/v1/embeddings", "body": {"input": "One"}})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    *_, last = run_batch(engine, source, target, PARAMS)
    found = [line["response"] for line in answers(target)]
    assert [one["status_code"] for one in found] == [200, 200, *[400] * 5] and last.errors == 5
    text, scored = (one["body"] for one in found[:2])
    free = engine.generate(["One two three"], SamplingParams(max_tokens=4, temperature=0))[0]
    assert text["object"] == "text_completion" and text["choices"][0]["text"] == free.text
    assert text["usage"]["completion_tokens"] == len(free.token_ids)
    (choice,) = scored["choices"]
    assert choice["text"] == "One two three" and scored["usage"]["completion_tokens"] == 0
    expected = engine.score("One two three").logprobs.tolist()
    assert choice["logprobs"]["token_logprobs"] == [None, *map(pytest.approx, expected)]
    reasons = [one["body"]["error"]["message"] for one in found[2:]]
    wanted = ("write a line for each", "needs echo", "stream is true", "prompt", "no embeddings")
    assert all(word in reason for word, reason in zip(wanted, reasons, strict=True)), reasons


def test_openai_s_batch_form_is_answered_in_it(engine: Engine, tmp_path: Path) -> None:
    """SERVING 1b, 3 (run_batch): custom_id, method, url and body on each line; a run that was stopped resumes."""
    image = str(make_image(tmp_path / "dog.png"))
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What?"}]
    bodies: list[Any] = [
        {"model": "any", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, "logprobs": True},
        {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3, "n": 2, "seed": 1},
        {"messages": [{"role": "user", "content": "Hello!"}], "temperature": "hot"},
        {"messages": [{"role": "user", "content": "Hello!"}], "stream": True},
        None,
    ]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": b} for i, b in enumerate(bodies)
    ]
    lines.append({"custom_id": "r5", "method": "POST", "url": "/v1/embeddings", "body": {}})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    *_, last = run_batch(engine, source, target, PARAMS)
    found = answers(target)
    assert [line["custom_id"] for line in found] == [f"r{i}" for i in range(6)] and last.errors == 4
    assert [line["response"]["status_code"] for line in found] == [200, 200, 400, 400, 400, 400]
    assert all(line["error"] is None and line["id"].startswith("batch_req_") for line in found)
    first, second = (line["response"]["body"] for line in found[:2])
    greeting = engine.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=4, temperature=0))
    assert first["choices"][0]["message"]["content"] == greeting.text and first["object"] == "chat.completion"
    assert len(first["choices"][0]["logprobs"]["content"]) == 4
    assert len(second["choices"]) == 2 and second["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert "temperature" in found[2]["response"]["body"]["error"]["message"]
    assert "/v1/embeddings" in found[5]["response"]["body"]["error"]["message"]
    whole = target.read_text()
    target.write_text("".join(whole.splitlines(keepends=True)[:3]))
    assert [p.done for p in run_batch(engine, source, target, PARAMS)] == [4, 5, 6]
    assert [line["custom_id"] for line in answers(target)] == [f"r{i}" for i in range(6)]
