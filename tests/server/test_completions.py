"""Completions: texts, token ids, lists, echo with log probabilities; and the endpoints of the tokenizer."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from qvl_runtime import SamplingParams
from tests.server.conftest import Live, data_url, png, say

pytestmark = pytest.mark.cpu


def test_echo_scores_prompts_as_lm_eval_asks(live: Live) -> None:
    """SERVING 1b, 6: lm-eval's local-completions: token prompts in a list, echo, logprobs 1, max_tokens 1."""
    tokenizer = live.engine.tokenizer
    prompts = [tokenizer.encode(text, "none") for text in ("The cat is red", "What is the number", "Box 你好")]
    answer = live.openai().completions.create(
        model="nano", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for ids, choice in zip(prompts, answer.choices, strict=True):
        score = live.engine.score({"token_ids": ids}, return_logits=True)
        found = choice.logprobs
        assert found.token_logprobs[0] is None and len(found.token_logprobs) == len(ids) + 1
        assert found.token_logprobs[1:-1] == pytest.approx(score.logprobs.tolist(), abs=2e-4)
        assert score.logits is not None
        best = score.logits.log_softmax(-1).max(-1)
        for i, top in enumerate(found.top_logprobs[1:-1]):
            assert max(top.values()) == pytest.approx(best.values[i].item(), abs=2e-4)
            assert (found.token_logprobs[i + 1] == max(top.values())) == (best.indices[i].item() == ids[i + 1])
        assert choice.text.startswith(tokenizer.decode(ids))
    assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.usage.completion_tokens == 3


def test_the_token_that_ends_an_answer_is_counted(live: Live) -> None:
    """1b, 6: lm-eval drops the last entry as the one token that it asked for, also where that token is the end."""
    (end,) = live.engine.tokenizer.encode("<|endoftext|>")
    options: dict[str, Any] = {"model": "nano", "prompt": "The cat", "max_tokens": 1, "logprobs": 1, "echo": True}
    options |= {"logit_bias": {str(end): 100}}
    choice = live.openai().completions.create(**options).choices[0]
    count = len(live.engine.tokenizer.encode("The cat"))
    assert choice.finish_reason == "stop" and choice.text == "The cat"
    assert len(choice.logprobs.token_logprobs) == count + 1 and choice.logprobs.tokens[-1] == "<|endoftext|>"
    stream = list(live.openai().completions.create(**options, stream=True))
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in stream) == count + 1


def test_max_tokens_0_scores_alone(live: Live) -> None:
    """1c: completions without echo log-probs put lm-eval at chance: here they are there, whole and for each token."""
    answer = live.openai().completions.create(model="nano", prompt="The cat", max_tokens=0, logprobs=2, echo=True)
    assert answer.choices[0].text == "The cat" and answer.usage.completion_tokens == 0
    assert "".join(answer.choices[0].logprobs.tokens) == "The cat"
    assert answer.choices[0].logprobs.text_offset == [0, *_offsets(answer.choices[0].logprobs.tokens)]
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
        live.openai().completions.create(model="nano", prompt="The cat", max_tokens=0)


def _offsets(tokens: list[str]) -> list[int]:
    return [sum(map(len, tokens[:i])) for i in range(1, len(tokens))]


@pytest.mark.parametrize("echo", [False, True])
def test_lists_of_prompts_streamed_and_whole(live: Live, echo: bool) -> None:
    """1b, 1 and 2: two prompts with two answers each, whose chunks alternate, are what the engine gives."""
    options: dict[str, Any] = {"model": "nano", "prompt": ["The cat", "A red"], "n": 2, "seed": 3, "temperature": 1.3}
    options |= {"max_tokens": 8, "logprobs": 1, "echo": echo}
    whole = live.openai().completions.create(**options)
    params = SamplingParams(n=2, seed=3, temperature=1.3, max_tokens=8)
    want = [
        (prompt if echo else "") + answer.text
        for prompt, completion in zip(options["prompt"], live.engine.generate(options["prompt"], params), strict=True)
        for answer in completion.answers
    ]
    assert [choice.text for choice in whole.choices] == want
    texts, tokens = [""] * 4, [list[str](), [], [], []]
    stream = live.openai().completions.create(**options, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == want and chunk.usage.completion_tokens == whole.usage.completion_tokens
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_images_in_raw_prompts(live: Live) -> None:
    """A base model's way of asking: the tag holds a data URL; a path or an address is not read."""
    url = data_url(png("blue"))
    answer = live.openai().completions.create(
        model="nano", prompt=f"<img>{url}</img>Generate the caption in English with grounding:", max_tokens=5
    )
    assert answer.usage.prompt_tokens_details.image_tokens > 0
    for source in ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png"):
        with pytest.raises(openai.BadRequestError) as refused:
            live.openai().completions.create(model="nano", prompt=f"<img>{source}</img>What?")
        assert refused.value.code == "invalid_image"


def test_tokenize_and_back(live: Live) -> None:
    """1b, 2 (test_tokenize): text to ids and back, with pieces; messages count the tokens of their images."""
    text = "Box the cat: 你好 🙂 <box>"
    made = live.post("/tokenize", {"content": text, "return_token_strs": True}).json()
    assert made["tokens"] == live.engine.tokenizer.encode(text) and made["count"] == len(made["tokens"])
    assert made["max_model_len"] == 2048 and len(made["token_strs"]) == made["count"]
    assert live.post("/detokenize", {"tokens": made["tokens"]}).json()["content"] == text
    plain = live.post("/tokenize", {"prompt": text, "parse_special": False}).json()
    assert plain["count"] > made["count"]
    messages = say("What is it?", data_url(png()))
    count = live.post("/v1/chat/completions/input_tokens", {"messages": messages, "temperature": 1}).json()
    assert count["input_tokens"] == len(live.engine.encode(messages).prompt.token_ids)
    assert live.post("/tokenize", {"messages": messages}).json()["count"] == count["input_tokens"]
    for wrong in ({}, {"prompt": "a", "messages": messages}, {"prompt": 5}, {"prompt": None}):
        assert live.post("/tokenize", wrong).status == 400
    assert live.post("/detokenize", {"tokens": [10**7]}).json()["error"]["param"] == "tokens"
