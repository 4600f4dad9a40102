"""`AsyncEngine.choose`, `locate` and `score_boxes`: what `Engine` says, while others' answers go on; their end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from PIL import Image, ImageDraw

from qvl_runtime import AsyncEngine, Engine, SamplingParams
from qvl_runtime.engine.beams import likeliest_boxes
from qvl_runtime.errors import BusyError, PromptError, QVLError
from qvl_runtime.prompt.cancellation import Canceled

pytestmark = pytest.mark.cpu
ASK = "Box the {}."
YES_OR_NO = [{"role": "user", "content": "Is a square round? Answer yes or no."}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=512, max_running=8)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    scene = Image.new("RGB", (144, 144), (150, 160, 170))
    ImageDraw.Draw(scene).ellipse((20, 30, 70, 78), fill=(220, 30, 30))
    return scene


def all_free(engine: Engine) -> bool:
    cache = engine.core.runner.cache
    cache.check_integrity()
    return bool(cache.pool.available == cache.pool.num_blocks)


def test_they_say_what_the_engine_says_while_answers_go_on(engine: Engine, image: Any) -> None:
    boxes = [(130, 200, 490, 540), (0, 0, 1000, 1000)]
    want = (
        engine.choose(YES_OR_NO, ["yes", "no"]),
        engine.locate(image, "red circle", 3, ASK),
        engine.score_boxes(image, "red circle", boxes, ASK),
    )
    steady = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    answer = engine.generate(["Tell me"], steady)[0].token_ids

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            others = [asyncio.create_task(served.generate("Tell me", steady)) for _ in range(4)]
            chosen, found, scored = await asyncio.gather(
                served.choose(YES_OR_NO, ["yes", "no"]),
                served.locate(image, "red circle", 3, ASK),
                served.score_boxes(image, "red circle", boxes, ASK),
            )
            assert chosen.probabilities == pytest.approx(want[0].probabilities, rel=1e-4)
            assert found.boxes[0].corners(1000, 1000) == want[1].boxes[0].corners(1000, 1000)
            assert found.masses == pytest.approx(want[1].masses, rel=1e-3)
            for box, expected in zip(scored, want[2], strict=True):
                assert box.details is not None and expected.details is not None
                assert box.details.logprob == pytest.approx(expected.details.logprob, rel=1e-3)
            for completion in await asyncio.gather(*others):
                assert completion.token_ids == answer

    asyncio.run(main())
    assert all_free(engine)


def test_a_canceled_search_ends_at_its_next_step(engine: Engine, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ends = threading.Event(), list[BaseException]()

    def slow(prefix: Any, *rest: Any) -> Any:
        began.set()
        while not prefix.cancellation.is_set:
            threading.Event().wait(0.001)
        try:
            return likeliest_boxes(prefix, *rest)
        except Canceled as end:
            ends.append(end)
            raise

    monkeypatch.setattr("qvl_runtime.engine.locating.likeliest_boxes", slow)

    async def main() -> None:
        async with AsyncEngine(engine, max_pending=2) as served:
            searches = [asyncio.create_task(served.locate(image, "red circle", 2, ASK)) for _ in range(2)]
            await asyncio.to_thread(began.wait, 30)
            with pytest.raises(BusyError):
                await served.choose(YES_OR_NO, ["yes", "no"], wait=False)
            for search in searches:
                search.cancel()
            await asyncio.gather(*searches, return_exceptions=True)
            assert all(search.cancelled() for search in searches)
            assert (await served.choose(YES_OR_NO, ["yes", "no"])).index in (0, 1)  # the thread is free again
            began.clear()
            last = asyncio.create_task(served.locate(image, "red circle", 2, ASK))
            await asyncio.to_thread(began.wait, 30)
        with pytest.raises(QVLError, match="the engine is closed"):
            await last
        with pytest.raises(QVLError, match="the engine is closed"):
            await served.locate(image, "red circle")

    asyncio.run(main())
    assert len(ends) == 2  # the other one had not begun
    assert all_free(engine)


def test_what_is_wrong_is_said_at_once(engine: Engine, image: Any) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as served:
            with pytest.raises(PromptError, match="1 to 32 boxes"):
                await served.locate(image, "red circle", 0)
            with pytest.raises(PromptError, match="no area"):
                await served.score_boxes(image, "red circle", [(5, 5, 5, 9)])
            with pytest.raises(PromptError, match="the phrase is"):
                await served.locate(image, " ")
            with pytest.raises(PromptError, match="the same tokens"):
                await served.choose(YES_OR_NO, ["yes", "yes"])

    asyncio.run(main())
