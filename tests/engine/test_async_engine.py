"""The model in a thread of its own: streams side by side, readers that leave or lag, refusals, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serving.workload import greedy, image, prompt_of
from qvl_runtime import AsyncEngine, Box, Engine, SamplingParams
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.errors import CapacityError, ImageError, PromptError, QVLError, StepError

pytestmark = pytest.mark.cpu
PROMPT = {"token_ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=8192)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    cache = engine.core.runner.cache
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks
    assert not engine.core.scheduler.running and not engine.core.scheduler.waiting


def run(engine: Engine, body: Callable[[AsyncEngine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with AsyncEngine(engine, **options) as served:
            await asyncio.wait_for(body(served), 60)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_streams_side_by_side_are_what_generate_gives(engine: Engine) -> None:
    prompts = [prompt_of(engine, [i, 2], image(i % 2), [9, i]) for i in range(6)]
    want = engine.generate(prompts, greedy(12))

    async def body(served: AsyncEngine) -> None:
        async def one(prompt: Any) -> list[Any]:
            return [piece async for piece in served.stream(prompt, greedy(12))]

        for pieces, expected in zip(await asyncio.gather(*map(one, prompts)), want, strict=True):
            assert tuple(t for piece in pieces for t in piece.token_ids) == expected.token_ids
            assert "".join(piece.text for piece in pieces) == expected.text
            assert pieces[-1].completion.token_ids == expected.token_ids
        several = SamplingParams(max_tokens=5, temperature=1.0, seed=1, n=3, ignore_eos=True)
        assert len((await served.generate(PROMPT, several)).answers) == 3
        assert (await served.report())["requests"]["running"] == 0

    run(engine, body)


def test_closing_the_iterator_or_cancelling_the_task_frees_the_blocks(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        pool = engine.core.runner.cache.pool
        stream = served.stream(PROMPT, greedy(8000))
        await anext(stream)
        task = asyncio.create_task(served.generate({"token_ids": [4, 5]}, greedy(8000)))
        await until(lambda: len(engine.core.scheduler.running) == 2)
        await stream.aclose()
        task.cancel()
        await until(lambda: pool.available == pool.num_blocks and not engine.core.scheduler.running)
        assert (await served.generate(PROMPT, greedy(3))).usage.completion_tokens == 3

    run(engine, body)


def test_a_stream_of_several_answers_is_what_generate_gives(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3, ignore_eos=True, logprobs=2)
    want = engine.generate([PROMPT], params)[0].answers

    async def body(served: AsyncEngine) -> None:
        encoded = await served.encode(PROMPT)
        assert served.is_alive
        for _ in range(2):  # what `encode` returned may be used again
            pieces = [piece async for piece in served.stream(encoded, params)]
            for index, answer in enumerate(want):
                own = [piece for piece in pieces if piece.answer == index]
                assert "".join(piece.text for piece in own) == answer.text
                assert tuple(entry for piece in own for entry in piece.logprobs) == answer.logprobs
                assert own[-1].completion is not None and own[-1].completion.text == answer.text
        late = replace(params, n=12, timeout_s=0.01, max_tokens=4000, temperature=0.5)
        pieces = [piece async for piece in served.stream(encoded, late)]
        assert sorted(piece.answer for piece in pieces if piece.completion) == [*range(12)]

    run(engine, body)


def test_boxes_come_with_the_text_that_closes_them(engine: Engine) -> None:
    demo = DemoPlan.from_folder()
    prompt = [{"role": "user", "content": [{"image": str(demo.image)}, {"text": demo.caption_prompt}]}]
    text, boxes, completion = "", list[Box](), None
    for piece in engine.stream(prompt, SamplingParams(temperature=0)):
        text += piece.text
        boxes += piece.boxes
        assert all(text.endswith("</box>") and box.span and box.span[1] == len(text) for box in piece.boxes)
        completion = piece.completion
    assert len(boxes) == 3 and completion is not None and tuple(boxes) == completion.boxes


def test_a_reader_that_lags_is_held_and_others_go_on(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        slow = served.stream_batches(PROMPT, greedy(60))
        first = await anext(slow)
        assert (await served.generate({"token_ids": [7]}, greedy(100))).usage.completion_tokens == 100
        (request,) = [branch.request for branch in engine.core.scheduler.running]
        made = len(request.branches[0].output.token_ids)
        taken = sum(len(piece.token_ids) for piece in first)  # several on a busy machine
        assert request.paused and made <= taken + 8 + 1, "the limit, and what was on its way"
        rest = [piece async for pieces in slow for piece in pieces]
        assert sum(len(piece.token_ids) for piece in [*first, *rest]) == 60

    run(engine, body, max_unread=8)


def test_beyond_the_limit_a_request_waits_or_is_refused(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        stream = served.stream(PROMPT, greedy(8000))
        await anext(stream)
        assert served.busy
        with pytest.raises(CapacityError, match="1 requests are pending"):
            await served.generate(PROMPT, greedy(1), wait=False)
        queued = asyncio.create_task(served.generate(PROMPT, greedy(1)))
        await asyncio.sleep(0.02)
        assert not queued.done()
        await stream.aclose()
        assert (await queued).usage.completion_tokens == 1

    run(engine, body, max_pending=1)


def test_errors_go_to_whom_they_belong(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(served: AsyncEngine) -> None:
        bad = [{"token_ids": [1] * 9000}, "<img>nowhere.jpg</img>", PROMPT, ""]
        long, missing, fine, empty = await served.generate_all(bad, greedy(2))
        assert isinstance(long, CapacityError) and isinstance(missing, ImageError) and isinstance(empty, PromptError)
        assert not isinstance(fine, BaseException) and fine.usage.completion_tokens == 2
        with monkeypatch.context() as patched:
            patched.setattr(engine.core.runner, "compute", lambda chunks: 1 / 0)
            with pytest.raises(StepError, match="ZeroDivisionError") as error:
                await served.generate(PROMPT, greedy(2))
            assert isinstance(error.value.__cause__, ZeroDivisionError)
        assert (await served.generate(PROMPT, greedy(2))).usage.completion_tokens == 2

    run(engine, body)


def test_closing_the_engine_ends_what_is_open(engine: Engine) -> None:
    async def body(served: AsyncEngine) -> None:
        stream = served.stream(PROMPT, greedy(8000))
        await anext(stream)
        await served.close()
        with pytest.raises(QVLError, match="closed before the answer"):
            async for _ in stream:
                pass
        with pytest.raises(QVLError, match="the engine is closed"):
            await served.generate(PROMPT)

    run(engine, body)
