"""The likelihood of given answers is that of a score of prompt and answer, whatever is in the cache."""

from __future__ import annotations

import math

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import CapacityError, PromptError

pytestmark = pytest.mark.cpu
PROMPT = "How many things are there?"
OPTIONS = ("1", "2", "3", "a red circle and a cat", "two", "no")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=300, max_step_tokens=64, max_running=8)


def test_likelihoods_are_those_of_scores(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    for _ in range(2):  # then from the cache
        choice = engine.choose({"token_ids": ids * 9}, OPTIONS)  # several prefill steps
        for option, got, own in zip(OPTIONS, choice.logprobs, choice.token_ids, strict=True):
            assert list(own) == engine.tokenizer.encode(option, "none")
            scored = engine.score({"token_ids": [*ids * 9, *own]})
            assert got == pytest.approx(float(scored.logprobs[-len(own) :].sum()), abs=2e-4)
        total = math.fsum(math.exp(value) for value in choice.logprobs)
        assert sum(choice.probabilities) == pytest.approx(1)
        assert choice.probabilities == pytest.approx([math.exp(v) / total for v in choice.logprobs])
        assert choice.best == OPTIONS[choice.index] and choice.logprobs[choice.index] == max(choice.logprobs)
        assert choice.mean_logprobs[3] == pytest.approx(choice.logprobs[3] / len(choice.token_ids[3]))
    engine.core.runner.cache.check_integrity()


def test_the_likeliest_of_all_is_the_greedy_answer(engine: Engine) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = engine.chat(messages, SamplingParams(temperature=0, max_tokens=1))
    choice = engine.choose(messages, [answer.text, "7", "cat"])
    assert choice.index == 0
    assert engine.choose(messages, [answer.text]).probabilities == (1.0,)


def test_running_requests_are_not_disturbed(engine: Engine) -> None:
    """Between the pieces of a stream, with a cache so full that the stream is preempted and computed again."""
    small = Engine(dtype="float32", max_model_len=300, kv_cache_bytes=320 * 6144, prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    want = small.generate(PROMPT * 8, params)[0]
    got: list[int] = []
    for i, piece in enumerate(small.stream(PROMPT * 8, params)):
        got += piece.token_ids
        if i in (3, 20):
            small.choose(PROMPT * 9, OPTIONS)
    assert tuple(got) == want.token_ids and small.core.scheduler.preemptions > 0
    small.core.runner.cache.check_integrity()


@pytest.mark.parametrize("options", [[], [""], ["a", ""], ["a", "a"], "ab", [1], [None]])
def test_options_that_cannot_be_told_apart(engine: Engine, options: object) -> None:
    with pytest.raises(PromptError, match=r"^options is .*; expected "):
        engine.choose(PROMPT, options)


def test_too_long(engine: Engine) -> None:
    with pytest.raises(CapacityError, match="the context holds 300"):
        engine.choose({"token_ids": [65] * 299}, ["yes of course, yes of course"])
