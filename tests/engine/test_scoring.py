"""Log probabilities of prompts, by chunks and next to other requests, and of continuations of one prefix."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from benchmarks.serving.workload import greedy, image, prompt_of
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import CapacityError, PromptError, SamplingError

pytestmark = pytest.mark.cpu
CLOSE = {"rel": 0, "abs": 2e-4}  # float32, other chunks: sums in another order


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=1024, max_step_tokens=48, max_running=8)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    cache = engine.core.runner.cache
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks


def text(engine: Engine, length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(engine.tokenizer.n_ranks) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 2, 47, 48, 49, 300])
def test_a_prompt_in_chunks_is_scored_as_one_at_once(engine: Engine, length: int) -> None:
    prompt = prompt_of(engine, text(engine, length, length), image(3), text(engine, 5, 1))
    want = engine.score(prompt, return_logits=True)
    params = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2, ignore_eos=True)
    others = [prompt_of(engine, text(engine, 30, seed)) for seed in range(4)]
    got, *_ = engine.generate([prompt, *others], [params, *[greedy(9)] * 4])
    assert got.prompt_logprobs is not None and want.logits is not None
    assert tuple(entry.token_id for entry in got.prompt_logprobs) == want.token_ids[1:]
    assert [entry.logprob for entry in got.prompt_logprobs] == pytest.approx(want.logprobs.tolist(), **CLOSE)
    best = want.logits[:-1].log_softmax(-1).topk(2).values
    assert [p for entry in got.prompt_logprobs for _, p in entry.top] == pytest.approx(best.flatten().tolist(), **CLOSE)
    assert got.token_ids == engine.generate([prompt], greedy(3))[0].token_ids


def test_a_cached_prompt_and_a_preempted_one_are_scored_whole(engine: Engine) -> None:
    prompt = prompt_of(engine, text(engine, 200, 5))
    want = engine.score(prompt).logprobs.tolist()
    params = SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=0, ignore_eos=True)
    for _ in range(2):  # the second time it is in the prefix cache
        assert [e.logprob for e in engine.generate([prompt], params)[0].prompt_logprobs or ()] == pytest.approx(
            want, **CLOSE
        )
    request = engine.submit(engine.encode(prompt), params)
    for _ in range(3):
        engine.core.step()
    engine.core.scheduler.make_room(engine.core.runner.cache.pool.num_blocks)
    while not request.done:
        engine.core.step()
    assert [e.logprob for e in request.completion().prompt_logprobs or ()] == pytest.approx(want, **CLOSE)
    from_100 = SamplingParams(max_tokens=1, prompt_logprobs=0, logprob_start=100)
    (late,) = engine.generate([prompt], from_100)
    assert late.usage.cached_tokens == 99 and len(late.prompt_logprobs or ()) == 100


def test_continuations_share_their_prefix(engine: Engine) -> None:
    prefix = prompt_of(engine, text(engine, 100, 7), image(1), text(engine, 3, 8))
    answers: list[str | list[int]] = ["yes", "no", "<ref>cat</ref><box>(1,2),(3,4)</box>", text(engine, 60, 9)]
    before = engine.core.steps
    got = engine.score_continuations(prefix, answers, top=1)
    assert engine.core.steps - before < 4 + len(engine.encode(prefix).prompt.token_ids) // 48 + 3
    start = len(engine.encode(prefix).prompt.token_ids)
    for answer, entries in zip(answers, got, strict=True):
        ids = engine.tokenizer.encode(answer, "grounding") if isinstance(answer, str) else answer
        whole = {"token_ids": [*prefix["token_ids"], *ids], "images": prefix["images"]}
        want = engine.score(whole).logprobs.tolist()[start - 1 :]
        assert [entry.token_id for entry in entries] == ids
        assert [entry.logprob for entry in entries] == pytest.approx(want, **CLOSE)
        assert all(entry.logprob <= entry.top[0][1] + 1e-6 for entry in entries)
    greedy_ids = engine.generate([prefix], greedy(5))[0].token_ids
    (best,) = engine.score_continuations(prefix, [greedy_ids], top=1)
    assert all(entry.token_id == entry.top[0][0] for entry in best)
    assert engine.score_continuations(prefix, []) == []


def test_what_cannot_be_scored(engine: Engine) -> None:
    with pytest.raises(PromptError, match="continuation is empty"):
        engine.score_continuations("a", ["b", ""])
    with pytest.raises(PromptError, match="token_ids holds"):
        engine.score_continuations("a", [[10**6]])
    with pytest.raises(CapacityError):
        engine.score_continuations("a", [[1] * 1100])
    with pytest.raises(SamplingError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=101)
    assert not math.isnan(engine.score_continuations("a", ["b"])[0][0].logprob)
