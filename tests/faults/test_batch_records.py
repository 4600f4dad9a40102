"""No record ends a batch: each that cannot be answered gets an error line, and the others get their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.cli.batch import Progress, run_batch
from qvl_runtime.cli.options import ModelOptions
from qvl_runtime.reading.lines import read_lines
from tests.fakes import qvl

pytestmark = pytest.mark.cpu
PARAMS = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
GOOD = '{"id": "good", "raw": "a"}'
HUGE = "9" * 400  # overflows a float
DEEP = "[" * 100_000 + "]" * 100_000
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "timeout_s", "logprobs", "n")
ODD: dict[str, tuple[str, str]] = {  # record, and words of its error
    "not JSON": ("nonsense", "line 2 is not JSON"),
    "cut": (GOOD[:-4], "line 2 is not JSON"),
    "two on a line": (GOOD + GOOD, "after the end of its JSON"),
    "a list": ("[1]", "holds a JSON list; expected an object"),
    "null": ("null", "holds a JSON NoneType; expected an object"),
    "nothing in it": ("{}", "found 0 of them"),
    "deep brackets": (f'{{"raw": {DEEP}}}', "line 2 is nested more than 64 levels deep"),
    "deep objects": ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested more than 64 levels deep"),
    "65 levels": (f'{{"raw": {"[" * 64}{"]" * 64}}}', "nested more than 64 levels deep"),
    "a number of 5000 digits": (f'{{"raw": "a", "id": {"9" * 5000}}}', "line 2 holds a number of thousands of digits"),
    "id NaN": ('{"raw": "a", "id": NaN}', '"id" is nan; expected a string, or a finite number'),
    "id in which NaN is": ('{"raw": "a", "id": [1, {"x": -Infinity}]}', '"id" is [1,'),
    "id that overflows": ('{"raw": "a", "id": 1e999}', '"id" is inf'),
    "a key twice": ('{"raw": "a", "raw": "b"}', "two values under the key 'raw'"),
    "unknown keys": ('{"raw": "a", "temperature": 1, "x": 2}', "unknown keys 'temperature', 'x'"),
    "two forms": ('{"raw": "a", "prompt": "a"}', "found 2 of them"),
    "images with raw": ('{"raw": "a", "images": ["x.png"]}', '"images" goes with "prompt"'),
    "images a number": ('{"prompt": "a", "images": 5}', '"prompt" must be a string and "images" a list'),
    "images a string": ('{"prompt": "a", "images": "x.png"}', '"images" a list'),
    "images of numbers": ('{"prompt": "a", "images": [5]}', '"images" a list'),
    "images of ids": ('{"raw": {"token_ids": [5, 6], "images": 5}}', "images"),  # M6: a TypeError
    "images of ids, an object": ('{"raw": {"token_ids": [5, 6], "images": {"a": 1}}}', "images"),
    "ids of strings": ('{"raw": {"token_ids": ["5"]}}', "token_ids"),
    "ids of huge numbers": (f'{{"raw": {{"token_ids": [{HUGE}]}}}}', "token_ids holds"),
    "ids null": ('{"raw": {"token_ids": null}}', "token_ids"),
    "prompt a number": ('{"prompt": 5}', '"prompt" must be a string'),
    "prompt null": ('{"prompt": null}', '"prompt" must be a string'),
    "raw a number": (f'{{"raw": {HUGE}}}', '"raw" is 9999'),
    "raw parts of numbers": ('{"raw": [1, 2]}', "part of type int"),
    "raw an empty list": ('{"raw": []}', "empty"),
    "messages a string": ('{"messages": "a"}', '"messages" is \'a\'; expected a list'),
    "messages an object": ('{"messages": {"role": "user", "content": "a"}}', '"messages" is'),
    "messages that are parts": ('{"messages": [{"text": "a"}]}', 'expected a list of objects with "role"'),
    "messages with a null": ('{"messages": [{"role": "user", "content": "a"}, null]}', '"messages" is'),
    "a role that is a list": ('{"messages": [{"role": [], "content": "a"}]}', "unknown role"),
    "content a number": ('{"messages": [{"role": "user", "content": 5}]}', "content of type int"),
    "a box of huge numbers": (f'{{"raw": [{{"ref": "a", "box": [{HUGE}, 1, 2, 3]}}]}}', "box"),
    "params a list": ('{"raw": "a", "params": [1]}', '"params" is [1]; expected an object'),
    "params unknown": ('{"raw": "a", "params": {"max_tokns": 1}}', "max_tokns"),
    "ignore_eos a string": ('{"raw": "a", "params": {"ignore_eos": "yes"}}', "ignore_eos is 'yes'"),
    "cache_salt a number": ('{"raw": "a", "params": {"cache_salt": 5}}', "cache_salt is 5"),
    "cache_salt an object": ('{"raw": "a", "params": {"cache_salt": {}}}', "cache_salt is {}"),
    "logit_bias a list": ('{"raw": "a", "params": {"logit_bias": [5]}}', "logit_bias"),
    "logit_bias by word": ('{"raw": "a", "params": {"logit_bias": {"cat": 5}}}', '"logit_bias" is'),
    "logit_bias a string": ('{"raw": "a", "params": {"logit_bias": {"5": "x"}}}', "logit_bias"),
    "stop of numbers": ('{"raw": "a", "params": {"stop": [5]}}', "stop"),
    "a lone surrogate as a path": ('{"prompt": "a", "images": ["\\ud800.png"]}', "image"),
    "a NUL in a path": ('{"prompt": "a", "images": ["a\\u0000b.png"]}', "image"),
    "a path of 5000 letters": (f'{{"prompt": "a", "images": ["{"x" * 5000}"]}}', "too long"),
    **{
        f"{name} of 400 digits": (f'{{"raw": "a", "params": {{"{name}": {HUGE}}}}}', f"{name} is")
        for name in NUMBERS
    },
    **{
        f"{name} a string": (f'{{"raw": "a", "params": {{"{name}": "1"}}}}', f"{name} is '1'")
        for name in ("temperature", "max_tokens", "seed", "n", "timeout_s")
    },
    **{
        f"{name} NaN": (f'{{"raw": "a", "params": {{"{name}": NaN}}}}', f"{name} is nan")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "timeout_s", "max_tokens")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_running=4)


def answered(engine: Engine, source: Path) -> tuple[list[dict[str, Any]], Progress]:
    target = source.with_suffix(".out")
    *_, last = run_batch(engine, source, target, PARAMS)
    assert list(run_batch(engine, source, target, PARAMS)) == [], "a rerun accepts its own answers"
    return [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]], last


def test_each_odd_record_has_its_error_and_the_others_their_answers(engine: Engine, tmp_path: Path) -> None:
    for name, (record, words) in ODD.items():
        source = tmp_path / "q.jsonl"
        source.write_text(f"{GOOD}\n{record}\n\n{GOOD}\n", encoding="utf-8")
        (tmp_path / "q.out").unlink(missing_ok=True)
        lines, last = answered(engine, source)
        assert (last.done, last.errors) == (3, 1), name
        assert [("error" in line, line.get("line")) for line in lines] == [(False, None), (True, 2), (False, None)], (
            name
        )
        assert words in lines[1]["error"], (name, lines[1]["error"])
        assert len(lines[1]["error"]) <= 600 and lines[1]["error"].isprintable(), name
        assert lines[0]["text"] == lines[2]["text"], name
    pool = engine.core.runner.cache.pool
    assert pool.available == pool.num_blocks


@pytest.mark.parametrize(
    "record",
    [
        '{"raw": "a", "id": {"b": [null, true, 1.5, "\\ud800", "\\u2028"]}}',
        f'{{"raw": "a", "id": {HUGE}}}',
        '{"raw": "a", "id": ""}',
        '{"raw": "a", "params": null, "images": null, "id": null}',
        '{"raw": "a", "images": [], "params": {}}',
        '{"raw": "a", "params": {"logit_bias": {"5": -Infinity}, "stop": "x", "seed": 9223372036854775807}}',
        '{"raw": "\\ud800 a lone surrogate"}',
        f'{{"raw": "a", "id": {"[" * 62}{"]" * 62}}}',
        '{"raw": {"token_ids": [5, 6], "images": null}}',
        '  {"raw"\t: "a"}  ',
    ],
)
def test_what_is_unusual_and_right_is_answered(engine: Engine, tmp_path: Path, record: str) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text(f"{GOOD}\n{record}", encoding="utf-8")
    lines, last = answered(engine, source)
    assert last.errors == 0, lines[1]
    assert lines[1]["id"] == json.loads(record).get("id")


def test_equal_ids_are_told_apart_by_their_index(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text(f"{GOOD}\n" * 3)
    assert [(line["index"], line["id"]) for line in answered(engine, source)[0]] == [(i, "good") for i in range(3)]


def test_a_line_over_the_limit_is_an_error(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelOptions, "open", lambda self: engine)
    source, target = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'{GOOD}\n{{"raw": "{"a" * 5000}"}}\n{GOOD}')
    result = qvl("batch", source, target, "--max-line-bytes", "2k", "--max-tokens", 2)
    assert result.exit_code == 3, result.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert "line 2 has 5,011 bytes, over the limit of 2,000" in lines[1]["error"]
    assert "raise --max-line-bytes" in lines[1]["error"] and lines[1]["line"] == 2
    assert ["error" in line for line in lines] == [False, True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_lines_are_split_alike_however_they_arrive(size: int) -> None:
    data = b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\n\r \n\tfour\r\r\n" + b"x" * 300 + "\n五".encode()
    chunks = [data[start : start + size] for start in range(0, len(data), size)] + [b""]
    lines = list(read_lines(iter(chunks).__next__, "q", limit=100, any_encoding=True))
    numbers = [(line.number, line.data[:8], line.size) for line in lines if line is not None]
    expected = [(1, b"\xef\xbb\xbfone", 6), (3, b"two", 3), (4, b"three", 5), (7, b"\tfour", 5)]
    assert numbers == [*expected, (9, b"x" * 8, 300), (10, "五".encode(), 3)]
