"""A request with many answers (H7): bounded, started over several steps, and never in the way of others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serving.workload import image, prompt_of
from qvl_runtime import AsyncEngine, Completion, Engine, SamplingParams
from qvl_runtime.errors import SamplingError
from qvl_runtime.schedule.api import MAX_ANSWERS
from qvl_runtime.schedule.request import TURNS, Request
from tests.faults.test_rows import check_books

pytestmark = pytest.mark.cpu
PROMPT = {"token_ids": [5, 4, 6] * 9}
MANY = SamplingParams(max_tokens=4, temperature=1.0, seed=7, n=MAX_ANSWERS, repetition_penalty=1.1, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=1024)


@pytest.fixture(scope="module")
def want(engine: Engine) -> list[tuple[int, ...]]:
    """Each answer as a request of its own."""
    each = [replace(MANY, n=1, seed=7 + i) for i in range(MAX_ANSWERS)]
    return [one.token_ids for one in engine.generate([PROMPT] * MAX_ANSWERS, each)]


@pytest.fixture
def few(engine: Engine) -> Iterator[Engine]:
    """The engine as an `AsyncEngine` runs it."""
    engine.core.share_steps(8)
    yield engine
    engine.core.share_steps(None)
    check_books(engine)


def submit(engine: Engine, prompt: Any, params: SamplingParams) -> Request:
    return engine.submit(engine.encode(prompt), params)


def running(engine: Engine, request: Request) -> int:
    return sum(branch.running for branch in request.branches)


@pytest.mark.parametrize("n", [0, MAX_ANSWERS + 1, 20_000, 10**30])
def test_the_number_is_bounded(n: int) -> None:
    with pytest.raises(SamplingError, match=f"expected 1 to {MAX_ANSWERS} answers: make more requests for more"):
        SamplingParams(n=n)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_caching": False},
        {"max_running": 5},
        {"max_running": 1},
        {"kv_cache_bytes": 2**20},
        {"speculative_tokens": 3},
        {"graphs": False, "max_step_tokens": 64},
    ],
    ids=str,
)
def test_each_answer_is_that_of_a_request(want: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    engine = Engine(dtype="float32", max_model_len=512, **options)
    params = replace(MANY, n=20 if "max_running" in options else MAX_ANSWERS)
    for parallel in (None, 8):
        engine.core.share_steps(parallel)
        found = engine.generate([{"token_ids": [9]}, PROMPT], [GREEDY, params])[1]
        assert [answer.token_ids for answer in found.answers] == want[: params.n]
        check_books(engine)


def test_answers_about_an_image_share_its_blocks(few: Engine) -> None:
    prompt, params = prompt_of(few, [1] * 20, image(1), [2, 3]), replace(MANY, n=30)
    alone = [few.generate([prompt], replace(params, n=1, seed=7 + i))[0].token_ids for i in range(30)]
    request = submit(few, prompt_of(few, [1] * 20, image(2), [2, 3]), params)
    while not request.done:
        few.core.step()
        used = few.core.runner.cache.pool.num_blocks - few.core.runner.cache.pool.available
        assert used <= 7 + 2 * 9, "the prompt's blocks, and two for each answer that runs"
    assert [answer.token_ids for answer in few.generate([prompt], params)[0].answers] == alone


def test_few_run_at_a_time_and_nothing_is_kept_for_the_others(few: Engine) -> None:
    request = submit(few, PROMPT, MANY)
    while not request.done:
        few.core.step()
        assert running(few, request) <= 8 and len(few.core.scheduler.waiting) <= 8
        assert len(request.branches) - len(request.completions) <= 8
    assert len(request.completion().answers) == MAX_ANSWERS


def test_an_innocent_request_has_its_first_token_in_the_next_step(few: Engine) -> None:
    """Further answers sit out that step, but no two in a row, however many requests arrive."""
    hostile = [submit(few, {"token_ids": [i] * 30}, replace(MANY, max_tokens=100)) for i in range(3)]
    innocent = []
    for turn in range(40):
        few.core.step()
        if turn % 4 == 3 or turn > 30:
            before = [answered(request) for request in hostile]
            innocent.append(submit(few, {"token_ids": [turn, 200, 7]}, GREEDY))
            few.core.step()
            assert len(innocent[-1].branches[0].output.token_ids) == 1
            assert sum(running(few, request) for request in hostile) <= 3 * 8
            added = [answered(request) - earlier for request, earlier in zip(hostile, before, strict=True)]
            assert added == [1, 1, 1] or turn > 30, "the first answers continue"
    assert min(map(answered, hostile)) > 8 * 20
    for request in (*hostile, *innocent):
        few.core.cancel(request)


def answered(request: Request) -> int:
    return sum(len(branch.output.token_ids) for branch in request.branches)


def test_further_answers_continue_where_no_first_token_can_be_had() -> None:
    """A long prompt waits for the blocks that further answers hold, and there is nothing else to compute."""
    engine = Engine(dtype="float32", max_model_len=512, kv_cache_bytes=2**21, prefix_caching=False)
    engine.core.share_steps(8)
    slots = engine.core.runner.cache.num_slots
    many = submit(engine, PROMPT, replace(MANY, n=8, max_tokens=40))
    engine.core.step()
    engine.core._finish(many.branches[0], "stop")
    long = submit(engine, {"token_ids": [7] * (slots - 40)}, GREEDY)
    while not (many.done and long.done):
        assert engine.core.step()
    check_books(engine)


def test_first_answers_take_the_slots_of_further_ones() -> None:
    engine = Engine(dtype="float32", max_model_len=512, max_running=6)
    params = replace(MANY, n=20, max_tokens=12)
    want = engine.generate([PROMPT], params)[0]
    hostile = submit(engine, PROMPT, params)
    engine.core.step()
    assert running(engine, hostile) == 6
    others = [submit(engine, {"token_ids": [i, 3]}, replace(GREEDY, max_tokens=8)) for i in range(5)]
    engine.core.step()
    assert all(len(other.branches[0].output.token_ids) == 1 for other in others), "all start at once"
    assert running(engine, hostile) == 1, "the first keeps its slot"
    while not hostile.done:
        assert engine.core.step()
    assert all(other.done for other in others)
    assert [a.token_ids for a in hostile.completion().answers] == [a.token_ids for a in want.answers]
    check_books(engine)


def test_further_answers_get_their_turn_in_a_crowd() -> None:
    """Two answers, while ever more requests arrive than can run."""
    engine = Engine(dtype="float32", max_model_len=512, max_running=2)
    request = submit(engine, PROMPT, replace(MANY, n=2, max_tokens=3))
    others: list[Request] = []
    while not request.done and len(others) < 4 * TURNS:
        others += [submit(engine, {"token_ids": [len(others) % 200]}, replace(GREEDY, max_tokens=1)) for _ in range(3)]
        engine.core.step()
    assert request.done and sum(other.done for other in others) >= TURNS
    for other in others:
        engine.core.cancel(other)
    check_books(engine)


def test_a_cancelled_or_late_request_starts_no_more(few: Engine) -> None:
    cancelled = submit(few, PROMPT, MANY)
    few.core.step()
    few.core.cancel(cancelled)
    late = submit(few, PROMPT, replace(MANY, max_tokens=500, timeout_s=0.05))
    while not late.done:
        assert few.core.step()
    answers = late.completion().answers
    assert len(answers) == MAX_ANSWERS and answers[0].finish_reason == "deadline"
    assert not few.core.step() and len(cancelled.branches) <= 8


def test_beside_it_readers_get_their_answers(engine: Engine, want: list[tuple[int, ...]]) -> None:
    alone = engine.generate([{"token_ids": [9]}], GREEDY)[0].token_ids

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            assert engine.core.answers.max_parallel == 8
            many = asyncio.create_task(served.generate(PROMPT, MANY))
            for _ in range(20):
                assert (await served.generate({"token_ids": [9]}, GREEDY)).token_ids == alone
            found = await many
            assert isinstance(found, Completion) and [a.token_ids for a in found.answers] == want

    asyncio.run(main())
    assert engine.core.answers.max_parallel is None
