"""A limit on pending requests that any number of event loops share."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress


class Slots:
    """A semaphore for event loops: `asyncio.Semaphore` serves only one. First come, first served."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()  # held for a few instructions, never while waiting
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def locked(self) -> bool:
        """Whether a new request would have to wait."""
        return self._free <= 0

    async def acquire(self) -> None:
        """Take a slot, once one is free."""
        with self._lock:
            if self._free > 0 and not self._waiting:
                self._free -= 1
                return
            loop = asyncio.get_running_loop()
            granted: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, granted))
        try:
            await granted
        except BaseException:
            with self._lock, suppress(ValueError):
                self._waiting.remove((loop, granted))
                raise
            self.release()  # it had been granted already
            raise

    def release(self) -> None:
        """Give a slot back, to the request that has waited longest."""
        with self._lock:
            while self._waiting:
                loop, granted = self._waiting.popleft()
                with suppress(RuntimeError):  # its loop is closed
                    loop.call_soon_threadsafe(self._grant, granted)
                    return
            self._free += 1

    def _grant(self, granted: asyncio.Future[None]) -> None:
        if granted.done():  # canceled in between: `acquire` did not find it and gives the slot back
            return
        granted.set_result(None)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()
