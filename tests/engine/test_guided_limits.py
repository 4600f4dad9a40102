"""Grammars that are too large, too slow to compile, or compiled while others are answered."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from qvl_runtime import AsyncEngine, Engine, SamplingParams
from qvl_runtime.engine import guided
from qvl_runtime.errors import ConstraintError
from qvl_runtime.schedule.guide_checks import Guide

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(find_spec("llguidance") is None, reason="llguidance is not installed: the extra guided"),
]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=80)
QUESTION = [{"role": "user", "content": "How many things are there?"}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=512, speculative_tokens=2)


def bombs() -> list[dict[str, Any]]:
    nested: dict[str, Any] = {"type": "integer"}
    for _ in range(11):
        nested = {"anyOf": [nested, {"type": "array", "items": nested}]}
    many = {"allOf": [{"properties": {f"a{i}": {"anyOf": [{"minimum": j} for j in range(10)]}}} for i in range(200)]}
    rules = [f"{c}: {d} {d} {d} {d}\n" for c, d in zip("abcdefg", "bcdefgh", strict=True)]
    return [
        {"json_schema": nested},
        {"json_schema": many},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"type": "string", "pattern": "(a|b|c|d)*a(a|b|c|d){30}"}},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}},
        {"regex": "(x+x+)+y" * 20},
        {"regex": "((a{1,100}){1,100}){1,100}"},
        {"grammar": "start: a a a a\n" + "".join(rules) + 'h: "x" | h h | h h h'},
        {"grammar": 'start: "a"{1,100000000}'},
    ]  # fmt: skip


@pytest.mark.parametrize("params", bombs(), ids=range(len(bombs())))
def test_bombs_take_seconds_at_most(engine: Engine, params: dict[str, Any]) -> None:
    """Compiled, followed for some tokens, or refused; and the engine answers the next request."""
    began = time.perf_counter()
    try:
        engine.chat(QUESTION, SamplingParams(max_tokens=8, temperature=5.0, seed=1, **params))
    except ConstraintError as error:
        assert len(str(error)) <= 600
    assert time.perf_counter() - began < 8
    assert engine.chat(QUESTION, GREEDY).text == "2" or engine.chat(QUESTION, GREEDY).text.isdigit()


def test_compiling_has_a_time_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after its time; four at once at most, those included that were given up on; others are not delayed."""
    release = threading.Event()
    compile_ = guided._compile

    def slow(guide: Any, tokenizer: Any) -> Any:
        if "slow" in guide.text:
            release.wait(20)
        return compile_(guide, tokenizer)

    monkeypatch.setattr(guided, "_compile", slow)
    monkeypatch.setattr(guided, "COMPILE_S", 0.2)
    try:
        for i in range(4):
            with pytest.raises(ConstraintError, match=r"regex takes more than 0.2 seconds to compile"):
                engine.chat(QUESTION, SamplingParams(regex=f"slow{i}"))
        with pytest.raises(ConstraintError, match="4 grammars are still being compiled: try again later"):
            engine.chat(QUESTION, SamplingParams(regex="abc"))
    finally:
        release.set()
    monkeypatch.setattr(guided, "COMPILE_S", 5.0)
    assert engine.chat(QUESTION, SamplingParams(regex="abc", max_tokens=9)).text == "abc"


def test_asyncio_compiles_outside_of_the_steps(engine: Engine) -> None:
    """The model's thread finds the grammar compiled; an error is that request's alone."""
    names = []
    compile_ = engine.constraints._guides.compile

    def noted(guide: Any) -> Any:
        if guide not in engine.constraints._guides._compiled:
            names.append(threading.current_thread().name)
        return compile_(guide)

    engine.constraints._guides.compile = noted  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        async with AsyncEngine(engine) as both:
            asked = [replace(GREEDY, regex="[xy]{3}"), replace(GREEDY, regex="("), GREEDY]
            return await asyncio.gather(*(both.generate("Hi", one) for one in asked), return_exceptions=True)

    try:
        held, refused, free = asyncio.run(ask())
    finally:
        del engine.constraints._guides.compile
    assert re.fullmatch("[xy]{3}", held.text) and isinstance(refused, ConstraintError) and free.text
    assert names and not any("qvl-model" in name for name in names)


@pytest.mark.parametrize("regex", ["(a{1001}){1000}", "[ab](a{1001}){1000}", "(abc){80000}"])
def test_what_is_forced_in_a_row_is_bounded(engine: Engine, regex: str) -> None:
    """llguidance spells it all at once with Python's lock held, while all other requests wait."""
    followed = engine.constraints._guides.begin(Guide("regex", regex, "regex"), [1])
    followed.advance(ord("a"))
    assert len(followed.forced()) < 100_000
