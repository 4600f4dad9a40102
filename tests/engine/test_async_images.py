"""Images and texts of an `AsyncEngine`: no text waits for an image, and canceling a request frees what reads for it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from benchmarks.serving import hostile_images as hostile
from benchmarks.serving.workload import greedy
from qvl_runtime import AsyncEngine, Engine
from qvl_runtime.errors import DownloadError, ImageError, QVLError
from qvl_runtime.prompt import images
from qvl_runtime.prompt.isolation.pool import Pool
from qvl_runtime.prompt.limits import CAN_ISOLATE

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not CAN_ISOLATE, reason="needs a POSIX system")]
SLOW = [{"image": hostile.progressive_jpeg(1000, 20_000)}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(allow_private_addresses=True)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    own = Pool()
    monkeypatch.setattr(images, "shared_pool", lambda: own)
    yield own
    own.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"


def run(engine: Engine, body: Callable[[AsyncEngine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with AsyncEngine(engine, **options) as served:
            await asyncio.wait_for(body(served), 60)

    asyncio.run(main())


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("qvl-images", "qvl-lookup")]


async def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.01)
    return condition()


def test_texts_do_not_wait_for_addresses_that_do_not_answer(engine: Engine, silent: str) -> None:  # FAULTS H6
    async def body(served: AsyncEngine) -> None:
        waiting = [asyncio.create_task(served.generate([{"image": silent}], greedy(1))) for _ in range(40)]
        await asyncio.sleep(0.2)
        began = time.monotonic()
        for _ in range(5):
            await served.generate("Hello", greedy(1))
            await served.generate([{"image": hostile.png(9, 9)}], greedy(1))
        assert time.monotonic() - began < 5, "the addresses take 10 s"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await until(lambda: not reading()), "canceling ends the downloads"

    run(engine, body)


def test_canceling_a_request_ends_its_process_and_frees_its_slot(engine: Engine, pool: Pool) -> None:
    async def body(served: AsyncEngine) -> None:
        task = asyncio.create_task(served.generate(SLOW, greedy(1)))
        assert await until(lambda: bool(pool.pids()))
        await asyncio.sleep(0.2)
        before = pool.pids()
        task.cancel()
        await asyncio.sleep(0)
        assert (await served.generate("Hello", greedy(1), wait=True)).usage.images == 0
        assert await until(lambda: not set(before) & set(pool.pids()) and not reading())
        assert (await served.generate([{"image": hostile.png(9, 9)}], greedy(1))).usage.images == 1

    run(engine, body, max_pending=1)


def test_a_process_that_dies_fails_its_request_alone(engine: Engine, pool: Pool) -> None:
    async def body(served: AsyncEngine) -> None:
        await served.generate([{"image": hostile.png(9, 9)}], greedy(1))  # so that a process has started
        task = asyncio.create_task(served.generate(SLOW, greedy(1)))
        await asyncio.sleep(0.3)
        text = asyncio.create_task(served.generate("Hello", greedy(1)))
        for pid in pool.pids():
            os.kill(pid, 9)
        with pytest.raises(ImageError, match=r"image 1 \(.* bytes\) cannot be read: the process .* by SIGKILL"):
            await task
        assert (await text).usage.completion_tokens == 1

    run(engine, body)


def test_closing_fails_what_is_being_read(engine: Engine, silent: str) -> None:
    async def main() -> None:
        served = AsyncEngine(engine)
        tasks = [asyncio.create_task(served.generate(prompt, greedy(1))) for prompt in (SLOW, [{"image": silent}])]
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await served.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, QVLError) and "the engine was closed before the images" in str(result)
        assert time.monotonic() - began < 5 and await until(lambda: not reading())
        with pytest.raises(QVLError, match="the engine is closed"):
            await served.generate("Hello", greedy(1))

    asyncio.run(main())


def test_downloads_end_with_their_limit() -> None:
    engine = Engine(allow_private_addresses=True, image_timeout_s=0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"

        async def body(served: AsyncEngine) -> None:
            results = await served.generate_all([[{"image": url}]] * 100, greedy(1))
            assert all(isinstance(result, DownloadError) for result in results)
            assert await until(lambda: not reading())

        run(engine, body)


def test_encoding_between_steps_gives_the_same_in_the_thread_of_the_model(engine: Engine) -> None:
    prompt = [{"image": hostile.png(64, 64)}, "What is it?"]

    async def body(served: AsyncEngine) -> None:
        want = await served.generate(await served.encode(prompt), greedy(4))
        long = asyncio.create_task(served.generate("Count.", greedy(200)))
        encoded = await served.encode_between_steps(prompt)
        assert not reading() and not long.done()
        assert (await served.generate(encoded, greedy(4))).token_ids == want.token_ids
        with pytest.raises(ImageError):
            await served.encode_between_steps([{"image": b"no image"}])
        await long

    run(engine, body)
