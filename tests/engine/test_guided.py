"""Answers that follow a JSON Schema, a regular expression, a choice or a grammar: each that is finished does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import ConfigError, ConstraintError, SamplingError

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(find_spec("llguidance") is None, reason="llguidance is not installed: the extra guided"),
]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=80)
QUESTION = [{"role": "user", "content": "How many things are there?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=512, speculative_tokens=2)


def valid(text: str, schema: Any) -> None:
    import jsonschema

    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_every_kind(engine: Engine) -> None:
    hot = replace(GREEDY, temperature=4.0, n=6, seed=1)
    for answer in engine.chat(QUESTION, replace(hot, json_schema=PERSON)).answers:
        assert answer.finish_reason == "stop"
        valid(answer.text, PERSON)
    for answer in engine.chat(QUESTION, replace(hot, regex=r"[a-c]{2,5}-\d{3}")).answers:
        assert answer.finish_reason == "stop" and re.fullmatch(r"[a-c]{2,5}-\d{3}", answer.text)
    options = ("yes", "no", 'it is "so"\n', "红色", "yes and no")
    found = {
        answer.text for answer in engine.chat(QUESTION, replace(hot, n=20, temperature=1e6, choice=options)).answers
    }
    assert found <= set(options) and len(found) > 2
    lark = 'start: "(" start ")" | "x"'
    for answer in engine.chat(QUESTION, replace(hot, grammar=lark)).answers:
        assert answer.finish_reason == "length" or re.fullmatch(r"\(*x\)*", answer.text)
    for answer in engine.chat(QUESTION, replace(hot, max_tokens=200, json_object=True)).answers:
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.text), dict)


def test_the_likeliest_legal_answer_stays(engine: Engine) -> None:
    """A greedy answer that follows the constraint by itself is the same with it, and so are its log probabilities."""
    free = engine.chat(QUESTION, GREEDY)
    for params in (
        replace(GREEDY, regex=r"[0-9]+"),
        replace(GREEDY, choice=("1", "2", "3", "none")),
        replace(GREEDY, json_schema={"type": "integer"}),
        replace(GREEDY, grammar="start: /[0-9]/"),
    ):
        held = engine.chat(QUESTION, params)
        assert held.text == free.text and held.token_ids == free.token_ids[: len(held.token_ids)]
        assert held.finish_reason == "stop"
    cut = engine.chat(QUESTION, replace(GREEDY, json_schema=PERSON, max_tokens=4))
    assert cut.finish_reason == "length" and len(cut.token_ids) == 4  # text as it is: max_tokens is the user's


def test_the_end_is_legal_only_where_the_grammar_accepts(engine: Engine) -> None:
    longer = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 6, "maxItems": 6}
    pushed = replace(GREEDY, json_schema=longer, logit_bias={engine.tokenizer.im_end: 1000.0})
    assert len(json.loads(engine.chat(QUESTION, pushed).text)) == 6
    finite = replace(GREEDY, choice=("a", "b"), ignore_eos=True)  # nothing ends it but the grammar, which does
    assert engine.chat(QUESTION, finite).finish_reason == "stop"
    held = replace(GREEDY, choice=("a", "b"), min_tokens=30)  # the constraint comes first
    assert engine.chat(QUESTION, held).text in ("a", "b")
    spaces = replace(GREEDY, json_schema=PERSON, logit_bias={32: 1000.0, 10: 900.0}, max_tokens=300)
    answer = engine.chat(QUESTION, spaces)
    assert answer.finish_reason == "stop" and max(map(len, re.findall(r"\s+", answer.text))) <= 34
    valid(answer.text.strip(), PERSON)


def schemas() -> st.SearchStrategy[Any]:
    """Schemas of what is supported, small enough for random answers to end."""
    numbers = st.builds(
        lambda kind, low, size: {"type": kind, "minimum": low, "maximum": low + size},
        st.sampled_from(["integer", "number"]), st.integers(-20, 20), st.integers(0, 500),
    )  # fmt: skip
    texts = st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
                      st.integers(0, 2), st.integers(0, 3))  # fmt: skip
    leaves = st.one_of(
        numbers, texts, st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
        st.lists(st.one_of(st.integers(-9, 9), st.text("ab\"\\é", max_size=3), st.none()), min_size=1, max_size=3).map(
            lambda values: {"enum": values}),
        st.sampled_from([{"const": {"a": [1, "x"]}}, {"type": "string", "pattern": "^[ab]{1,3}$"},
                         {"type": "string", "format": "date"}]),
    )  # fmt: skip

    def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        objects = st.dictionaries(st.text("abc \"é", min_size=1, max_size=3), inner, max_size=3).flatmap(
            lambda fields: st.builds(
                lambda required: {"type": "object", "properties": fields, "required": sorted(required),
                                  "additionalProperties": False},
                st.sets(st.sampled_from(sorted(fields))) if fields else st.just(set()),
            )
        )  # fmt: skip
        lists = st.builds(lambda items, least, more: {"type": "array", "items": items, "minItems": least,
                                                      "maxItems": least + more}, inner, st.integers(0, 2),
                          st.integers(0, 2))  # fmt: skip
        named = inner.map(lambda one: {"$defs": {"x/y": one}, "type": "array", "maxItems": 2,
                                       "items": {"$ref": "#/$defs/x~1y"}})  # fmt: skip
        either = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
        return st.one_of(objects, lists, named, either)

    return st.recursive(leaves, grown, max_leaves=4)


def test_answers_to_made_up_schemas_validate(engine: Engine) -> None:
    """By jsonschema's judgment, for schemas that hypothesis makes and answers at a temperature of noise."""
    finished = [0, 0]

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(schemas(), st.integers(0, 1 << 30))
    def check(schema: Any, seed: int) -> None:
        params = SamplingParams(temperature=5.0, seed=seed, n=3, max_tokens=120, json_schema=schema)
        try:
            answers = engine.chat(QUESTION, params).answers
        except ConstraintError as error:
            assert "cannot be used" in str(error) or "not supported" in str(error), error
            return
        for answer in answers:
            finished[answer.finish_reason == "stop"] += 1
            if answer.finish_reason == "stop":
                valid(answer.text, schema)

    check()
    assert finished[1] > 40 and finished[1] > 2 * finished[0]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json_schema": {"properties": {"a": {"items": {"not": {}}}}}}, "not supported: #/properties/a/items/not"),
        ({"json_schema": {"$defs": {"a/b": {"if": True}}, "$ref": "#/$defs/a~1b"}}, "#/$defs/a~1b/if"),
        ({"json_schema": {"allOf": [{"uniqueItems": True}]}}, "#/allOf/0/uniqueItems"),
        ({"json_schema": {"const": {"not": 1}, "type": "object"}}, None),
        ({"json_schema": {"items": {"$ref": "https://example.com/x.json"}}}, "another document at #/items/$ref 'https"),
        ({"json_schema": {"$ref": "#/$defs/none"}}, "'/$defs/none' does not exist"),
        ({"json_schema": {"properties": {"when": {"format": "moon"}}}}, "format 'moon', which does not exist, at"),
        ({"json_schema": {"type": "strin"}}, "type 'strin', which does not exist"),
        ({"json_schema": {"enum": []}}, "cannot be used: Unsatisfiable"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: nothing"}, "unknown name"),
    ],
)
def test_what_cannot_be_followed_is_named(engine: Engine, params: dict[str, Any], message: str | None) -> None:
    asked = SamplingParams(**params, max_tokens=40)
    if message is None:
        engine.chat(QUESTION, asked)
        return
    with pytest.raises(ConstraintError) as error:
        engine.chat(QUESTION, asked)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json_schema": [1]}, "json_schema is .*; expected a JSON Schema"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[]"}, "expected a JSON Schema"),
        ({"json_schema": '{"a": NaN}'}, "json_schema has NaN"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not JSON"),
        ({"json_schema": {"title": "x" * (1 << 18)}}, "characters; expected at most 262,144"),
        ({"json_schema": "[" * 10_000}, "levels"),
        ({"regex": ""}, "regex is ''; expected a string"),
        ({"regex": 5}, "regex is 5"),
        ({"grammar": "x" * (1 << 20)}, "grammar has 1,048,576 characters"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"choice": ()}, "choice is"),
        ({"choice": "yes"}, "choice is 'yes'"),
        ({"choice": ["a", ""]}, "at least one character"),
        ({"choice": ["a"] * 1001}, "choice has 1001 strings"),
        ({"json_object": 1}, "json_object is 1; expected True or False"),
        ({"regex": "a", "boxes": "force"}, "regex and boxes are set, but an answer follows only one"),
        ({"json_object": True, "json_schema": {}}, "json_schema and json_object are set"),
    ],
)
def test_what_is_malformed_is_refused_at_once(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**params)


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError("No module named 'llguidance'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    plain = Engine(dtype="float32", max_model_len=256)
    with pytest.raises(ConfigError, match=r"pip install 'qvl-runtime\[guided\]'"):
        plain.generate("Hi", SamplingParams(choice=("a", "b")))
    assert plain.generate("Hi", SamplingParams(boxes="allow", max_tokens=5))
