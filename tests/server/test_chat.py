"""Chat completions as OpenAI's client sees them: whole, streamed, with images, boxes and log probabilities."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import product
from typing import Any

import openai
import pytest

from qvl_runtime import SamplingParams
from qvl_runtime.cli.demo import DemoPlan
from tests.server.conftest import KEY, Live, say

pytestmark = pytest.mark.cpu


def test_models(live: Live) -> None:
    """SERVING 1b, 1: list models; and each has OpenAI's fields, with what the server accepts."""
    names = [model.id for model in live.openai().models.list()]
    assert names == ["nano", "another-name"]
    model = live.get("/v1/models/nano").json()
    assert model["object"] == "model" and model["qvl"]["limits"]["max_images"] == 16
    with pytest.raises(openai.NotFoundError):
        live.openai().models.retrieve("gpt-4")


def test_an_answer_has_its_boxes_as_data(live: Live, demo: DemoPlan, demo_url: str) -> None:
    """1b, 1: a base64 picture."""
    answer = live.openai().chat.completions.create(model="nano", messages=say(demo.caption_prompt, demo_url))
    choice = answer.choices[0]
    (want,) = live.engine.generate([say(demo.caption_prompt, demo_url)], SamplingParams(temperature=0))
    assert choice.message.content == want.text and choice.finish_reason == "stop"
    qvl = choice.message.qvl
    assert [box["label"] for box in qvl["boxes"]] == ["cat", "number", "red star"]
    cat = want.boxes[0]
    assert qvl["boxes"][0]["box"] == [cat.x1, cat.y1, cat.x2, cat.y2] and qvl["boxes"][0]["score"] == cat.score
    width, height = qvl["pictures"][0]["width"], qvl["pictures"][0]["height"]
    assert qvl["boxes"][0]["pixels"] == list(want.boxes[0].pixels(width, height))
    assert answer.usage.prompt_tokens == want.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.image_tokens == want.usage.image_tokens > 0


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream(live: Live, demo: DemoPlan, demo_url: str, usage: bool) -> None:
    """1b, 1 and 2: role first with null content, one id and model, content, boxes as they close, finish, usage."""
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    stream = live.openai().chat.completions.create(
        model="nano", messages=say(demo.caption_prompt, demo_url), stream=True, **options
    )
    chunks = list(stream)
    assert len({(chunk.id, chunk.model, chunk.object, chunk.created) for chunk in chunks}) == 1
    first, *content = [chunk for chunk in chunks if chunk.choices]
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content is None
    *content, last = content
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].finish_reason is None for chunk in content)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    boxes, text = [], ""
    for chunk in content:
        text += chunk.choices[0].delta.content
        if found := getattr(chunk.choices[0].delta, "qvl", None):
            boxes += found["boxes"]
            assert all(text[: box["span"][1]].endswith("</box>") for box in boxes)
    assert boxes == last.choices[0].delta.qvl["boxes"] and len(boxes) == 3
    assert [not chunk.choices for chunk in chunks[-1:]] == [usage]
    if usage:
        assert chunks[-1].usage.total_tokens > 0 and all(chunk.usage is None for chunk in chunks[:-1])


def test_async_and_several_at_once(live: Live) -> None:
    """1b, 1: the asynchronous client, with answers that do not mix."""

    async def main() -> None:
        made: Any = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0)
        async with made as client:

            async def one(number: int) -> str:
                text = ""
                stream = await client.chat.completions.create(
                    model="nano", messages=say(f"What is {number}?"), stream=True, max_tokens=12
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            got = await asyncio.gather(*map(one, range(8)))
        params = SamplingParams(temperature=0, max_tokens=12)
        want = live.engine.generate([say(f"What is {number}?") for number in range(8)], params)
        assert got == [answer.text for answer in want]

    asyncio.run(main())


def test_n_and_seed(live: Live) -> None:
    """1b, 1: n=2 and seed, whole and streamed, give what the engine gives."""
    options: dict[str, Any] = {"model": "nano", "messages": say("Tell me"), "temperature": 1.5}
    options |= {"n": 2, "seed": 7, "max_tokens": 9}
    client = live.openai()
    whole = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    params = SamplingParams(temperature=1.5, n=2, seed=7, max_tokens=9)
    assert texts == [answer.text for answer in live.engine.generate([say("Tell me")], params)[0].answers]
    streamed = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [streamed[0], streamed[1]] == texts and texts[0] != texts[1]


def test_logprobs_join_to_the_text(live: Live) -> None:
    """1b, 2: joined log-prob tokens give the text exactly, and carry bytes; also where a stop string cut it."""
    client = live.openai()
    options: dict[str, Any] = {"model": "nano", "messages": say("你好 🙂"), "temperature": 1.2, "seed": 5}
    options |= {"logprobs": True, "top_logprobs": 3, "max_tokens": 40}
    for stop in (None, "a", "e"):
        answer = client.chat.completions.create(**options, stop=stop).choices[0]
        entries = answer.logprobs.content
        joined = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
        assert joined.startswith(answer.message.content) and (stop or joined == answer.message.content)
        assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
        streamed = [
            entry
            for chunk in client.chat.completions.create(**options, stop=stop, stream=True)
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert [entry.token for entry in streamed] == [entry.token for entry in entries]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_json_answers(live: Live) -> None:
    """1b, 2: json_object and json_schema: the output parses; a bad type or a bad schema is 400."""
    pytest.importorskip("llguidance")
    client = live.openai()
    formats: list[Any] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    ]
    for response_format, stream in product(formats, (False, True)):
        options: dict[str, Any] = {"response_format": response_format, "max_tokens": 200, "temperature": 1, "seed": 1}
        answer = client.chat.completions.create(model="nano", messages=say("JSON"), stream=stream, **options)
        text = (
            "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        )
        if response_format["type"] == "json_schema":
            assert set(json.loads(text)) == {"name", "count"}
        else:
            assert text.lstrip().startswith("{")
    for wrong, param in (
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1/x"}}}, "response_format"),
    ):
        for stream in (False, True):
            refused = live.post(
                "/v1/chat/completions", {"messages": say("a"), "response_format": wrong, "stream": stream}
            )
            assert refused.status == 400 and refused.json()["error"]["param"] == param, refused.body


def test_structured_outputs(live: Live) -> None:
    """SERVING 3d: choice and regex, in vLLM's spelling; two at once are refused."""
    pytest.importorskip("llguidance")

    def ask(**options: Any) -> Any:
        return live.post("/v1/chat/completions", {"messages": say("Which?"), "max_tokens": 20, **options}).json()

    chosen = ask(structured_outputs={"choice": ["red", "blue"]})["choices"][0]
    assert chosen["message"]["content"] in ("red", "blue") and chosen["finish_reason"] == "stop"
    assert re.fullmatch("[0-9]{4}", ask(structured_outputs={"regex": "[0-9]{4}"})["choices"][0]["message"]["content"])
    both = ask(structured_outputs={"choice": ["a"]}, response_format={"type": "json_object"})
    assert both["error"]["param"] == "structured_outputs.choice"
    assert ask(structured_outputs={"regex": "("})["error"]["param"] == "structured_outputs"


def test_boxes_can_be_forced(live: Live, demo_url: str) -> None:
    """An answer that is held to boxes has nothing else, also where the model would rather talk."""
    messages, client = say("What is the number?", demo_url), live.openai()
    free = client.chat.completions.create(model="nano", messages=messages)
    assert not free.choices[0].message.qvl["boxes"]
    forced = client.chat.completions.create(model="nano", messages=messages, extra_body={"qvl": {"boxes": "force"}})
    assert forced.choices[0].message.qvl["boxes"] and forced.choices[0].message.content.endswith("</box>")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="nano", messages=messages, extra_body={"qvl": {"boxes": "maybe"}})
    assert wrong.value.param == "qvl.boxes"
