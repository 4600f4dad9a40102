"""Sampling parameters of any kind: a `SamplingError` of one line, or an answer, and never the error of others."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl_runtime import AsyncEngine, Completion, Engine, SamplingParams
from qvl_runtime.cli.batch import run_batch
from qvl_runtime.config.generation import GenerationDefaults
from qvl_runtime.errors import MAX_MESSAGE, PromptError, QVLError, SamplingError
from qvl_runtime.prompt.streaming import StopMatcher
from qvl_runtime.schedule.api import MAX_ANSWERS

pytestmark = pytest.mark.cpu
PROMPT = {"token_ids": [5, 4, 6]}
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
LONG = 10**5000  # Python writes no int of more than 4300 digits
NAMES = [field.name for field in fields(SamplingParams)]
WHOLE = ["max_tokens", "top_k", "seed", "n", "logprobs"]
REAL = ["temperature", "top_p", "min_p", "repetition_penalty", "timeout_s"]


class Unreadable:
    """A value whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def kind(value: object) -> str:
    return type(value).__name__


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=1024)


def refused(name: str, value: object) -> str:
    with pytest.raises(SamplingError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and "expected" in message
    assert message.isprintable() and len(message) <= MAX_MESSAGE
    return message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1e-46),  # 0 in float32
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e39),
        ("logit_bias", {5: 1e308}),  # infinite in float32
        ("logit_bias", {5: 1, 6: 3.5e38}),
        ("logit_bias", {5: 10**400}),
        ("temperature", 1e300),
        ("temperature", 3.5e38),
        ("seed", 2**63),
        ("seed", -1),
        ("n", MAX_ANSWERS + 1),
        ("n", 200_000),
        ("stop", ["x"] * 129),
        ("stop", "x" * 1001),
    ],
)
def test_checked_as_the_dtype_that_uses_it(name: str, value: object) -> None:
    refused(name, value)


@pytest.mark.parametrize("name", [*WHOLE, *REAL, "logit_bias"])
@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, np.float32("nan"), -LONG, "1", b"1", [1], {}, 1j, None], ids=kind
)
def test_numbers_that_are_none(name: str, value: object) -> None:
    if name == "logit_bias":
        if isinstance(value, (float, int)) and value < 0:
            assert SamplingParams(logit_bias={5: value}).logit_bias == {5: -math.inf}
            return
        value = {5: value}
    if value is None and name not in ("n", "min_p"):
        assert getattr(SamplingParams(**{name: value}), name) is None
        return
    refused(name, value)


ODD = [
    *("yes", "", b"", 1, 0, 1.5, math.nan, LONG, True, None, (), [1.5], {}, {"a": 1}, set(), object(), Unreadable()),
    *(lambda: 1, SamplingParams, np.array([]), np.array([1, 2]), np.array(1), np.bool_(True), np.int8(1), np.str_("a")),
    *(np.datetime64("2023-01-01"), torch.tensor(1), torch.tensor([]), Decimal("0.5"), Fraction(1, 2), 10**400),
    *("\ud800", "\x1b[2J", "a" * 10**6, ["\x00"], [""], [[]], {5: "x"}, {5: True}, {"5": 1.0}, {1.0: 1.0}, {LONG: "x"}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ODD, ids=kind)
def test_any_value_of_any_field(name: str, value: Any) -> None:
    """Accepted as a value of Python's own type, or refused in one line; True and False are no numbers."""
    try:
        params = SamplingParams(**{name: value})
    except SamplingError as error:
        assert str(error).isprintable() and len(str(error)) <= MAX_MESSAGE
        return
    found = getattr(params, name)
    kinds = {**dict.fromkeys(WHOLE, int), **dict.fromkeys(REAL, float), "ignore_eos": bool}
    if name in kinds:
        assert found is None or type(found) is kinds[name]
        assert not isinstance(value, (bool, np.bool_)) or name == "ignore_eos"
    elif name in ("stop", "stop_token_ids"):
        assert type(found) is tuple
    json.dumps(found)  # the types of Python


def test_scalars_of_numpy_are_numbers(engine: Engine) -> None:
    plain = SamplingParams(
        max_tokens=4, temperature=0.5, top_k=7, seed=3, n=2, logprobs=1, logit_bias={8: 0.25}, ignore_eos=True
    )
    numpy: Any = np
    scalars = SamplingParams(
        max_tokens=numpy.int64(4),
        temperature=numpy.float32(0.5),
        top_k=numpy.uint8(7),
        seed=numpy.int16(3),
        n=numpy.int32(2),
        logprobs=numpy.int8(1),
        logit_bias={numpy.int64(8): numpy.float16(0.25)},
        ignore_eos=numpy.bool_(True),
    )
    assert scalars == plain
    one, other = engine.generate([PROMPT, PROMPT], [plain, scalars])
    assert [a.token_ids for a in one.answers] == [a.token_ids for a in other.answers]


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-46},
        {"temperature": 3.4e38},
        {"temperature": 1e30, "logit_bias": {5: -math.inf}},
        {"top_p": 1.2e-38},
        {"top_p": 1.0 - 1e-12},
        {"min_p": 1e-46},
        {"min_p": 1.0},
        {"top_k": 2**31},
        {"top_k": 2**63 - 1},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"logit_bias": {5: 3.4e38, 6: -3.4e38, 7: -1e308}},
        {"seed": 2**63 - 1, "n": 2},
        {"logprobs": 100},
        {"timeout_s": 1e30},
        {"max_tokens": 2**63 - 1, "stop_token_ids": list(range(1152))},
        {"stop": ["x" * 1000] * 128},
        {"cache_salt": "\ud800"},
        {"n": MAX_ANSWERS, "max_tokens": 1},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_give_answers(engine: Engine, given: dict[str, Any]) -> None:
    usual = {"max_tokens": 3, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    one, greedy = engine.generate([PROMPT, PROMPT], [SamplingParams(**usual | given), GREEDY])
    assert len(one.answers) == given.get("n", 1) and all(0 <= t < 1152 for t in one.token_ids)
    assert greedy.token_ids == engine.generate([PROMPT], GREEDY)[0].token_ids


def test_a_forbidden_vocabulary_is_refused_at_once(engine: Engine) -> None:
    for least in (-math.inf, -1e39):
        bias = dict.fromkeys(range(1152), least)
        with pytest.raises(SamplingError, match="logit_bias forbids every token of 1152: leave one without -inf"):
            engine.generate([PROMPT], SamplingParams(logit_bias=bias))
    almost = dict.fromkeys(range(1151), -math.inf)
    assert engine.generate([PROMPT], SamplingParams(logit_bias=almost, max_tokens=2))[0].token_ids == (1151, 1151)


@pytest.mark.parametrize("value", [{"temperature": 0}, "greedy", 5, [None, 1], Unreadable()], ids=kind)
def test_params_of_another_type(engine: Engine, value: Any) -> None:
    with pytest.raises(QVLError, match=r"SamplingParams|sampling parameters"):
        engine.generate([PROMPT, PROMPT], value)
    with pytest.raises(SamplingError):
        next(engine.stream(PROMPT, value))


@pytest.mark.parametrize("value", [np.array([]), lambda: [], 5, 0, False, "", {}], ids=kind)
def test_images_of_another_type(engine: Engine, value: Any) -> None:
    with pytest.raises(PromptError, match=r"images is .*; expected a list"):
        engine.generate([{"token_ids": [1, 2], "images": value}], GREEDY)
    assert engine.generate([{"token_ids": [1, 2], "images": None}], GREEDY)[0].token_ids
    with pytest.raises(PromptError, match="token_ids holds a value of type int; expected ids from 0"):
        engine.generate([{"token_ids": [LONG]}], GREEDY)


HOSTILE: list[dict[str, Any]] = [
    {"top_p": 1e-46, "temperature": 1.0},
    {"repetition_penalty": 1e-46},
    {"logit_bias": {"5": 1e308}, "temperature": 1.0},
    {"logit_bias": {str(token): -1e39 for token in range(1152)}, "temperature": 1.0},
    {"temperature": 1e300, "logit_bias": {"5": -1e39}},
    {"cache_salt": {}},
    {"cache_salt": []},
    {"cache_salt": 5},
    {"ignore_eos": "yes"},
    {"temperature": 10**400},
    {"min_p": math.nan},
    {"n": 200_000},
]


def test_a_batch_goes_past_every_one(engine: Engine, tmp_path: Path) -> None:
    """Each of them ended the file, and again at each restart."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"raw": PROMPT, "params": params} for params in HOSTILE]
    source.write_text("\n".join(map(json.dumps, [{"raw": PROMPT}, *records, {"raw": PROMPT}])))
    *_, last = run_batch(engine, source, target, GREEDY)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [("error" in line) for line in lines] == [False, *[True] * len(HOSTILE), False]
    assert (last.done, last.errors) == (len(HOSTILE) + 2, len(HOSTILE))


def test_beside_them_readers_of_an_async_engine_get_their_answers(engine: Engine) -> None:
    want = engine.generate([PROMPT], GREEDY)[0].token_ids

    async def hostile(served: AsyncEngine, given: dict[str, Any]) -> None:
        with pytest.raises(SamplingError):
            bias = {int(token): value for token, value in given.get("logit_bias", {}).items()}
            await served.generate(PROMPT, SamplingParams(**given | {"logit_bias": bias}))

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            innocent = served.generate_all([PROMPT] * 20, GREEDY)
            task = asyncio.gather(*(hostile(served, given) for given in HOSTILE))
            found = await innocent
            await task
            assert [one.token_ids for one in found if isinstance(one, Completion)] == [want] * 20

    asyncio.run(main())


@pytest.mark.parametrize(
    "raw",
    [
        {"do_sample": True, "top_p": 1e-46},
        {"do_sample": True, "temperature": 1e300},
        {"do_sample": True, "temperature": math.nan},
        {"do_sample": True, "repetition_penalty": 1e-46},
        {"do_sample": True, "temperature": 10**400},
        {"max_new_tokens": 10**400},
    ],
    ids=lambda raw: list(raw)[-1],
)
def test_defaults_of_a_checkpoint_are_checked_when_it_loads(raw: dict[str, Any]) -> None:
    with pytest.raises(QVLError) as error:
        GenerationDefaults.from_dict(raw)
    assert "generation_config.json" in str(error.value) and str(error.value).isprintable()


@settings(max_examples=150, deadline=None)
@given(stop=st.text("ab", min_size=1, max_size=8), other=st.text("abc", min_size=1), text=st.text("abc", max_size=40))
def test_the_stop_matcher_holds_back_what_may_still_match(stop: str, other: str, text: str) -> None:
    """Character by character as all at once: up to the first stop string that is complete."""
    matcher, shown = StopMatcher((stop, other)), ""
    for letter in text:
        emitted, stopped = matcher.feed(letter)
        shown += emitted
        if stopped:
            break
    else:
        shown += matcher.flush()
    ends = [(text.find(one) + len(one), text.find(one)) for one in (stop, other) if one in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
