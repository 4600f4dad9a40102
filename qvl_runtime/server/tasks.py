"""Several answers at once: all of them or the first error, and streams joined into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def gathered(works: Iterable[Awaitable[T]], at_once: int | None = None) -> list[T]:
    """Run works together, and return their results in order; the first error cancels the others and is raised.

    at_once: how many run at a time; None: all.
    """
    limit = asyncio.Semaphore(at_once or 2**31)

    async def one(work: Awaitable[T]) -> T:
        async with limit:
            return await work

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def joined(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams as they come, each with its stream's number; the first error closes all.

    No stream is more than one item ahead of the reader, so a slow reader slows each of them.
    """
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(1)

    async def read(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                await ready.put((number, item))
            await ready.put(None)
        except Exception as error:
            await ready.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.ensure_future(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
