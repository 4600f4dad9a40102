"""The state of a server: its engine as it loads, answers and ends, and the requests that it has taken."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qvl_runtime.errors import QVLError
from qvl_runtime.prompt.isolation.pool import start_ahead
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.errors import APIError, busy, unavailable
from qvl_runtime.server.metrics import Metrics

if TYPE_CHECKING:
    from qvl_runtime.engine.async_engine import AsyncEngine
    from qvl_runtime.engine.engine import Engine

_log = logging.getLogger("qvl_runtime")
_RETRY_LOADING_S = 5


class Service:
    """Loads an engine in a thread, and admits requests to it. Used in one event loop, except `load`."""

    def __init__(self, load: Callable[[], Engine], config: ServerConfig) -> None:
        self.config = config
        self.failure: BaseException | None = None  # why loading failed
        self.active = 0  # requests that were admitted and are not answered
        self.draining = False
        self.created = int(time.time())
        self.metrics = Metrics(config.model_names[0])
        self.on_ready: Callable[[Engine], None] = lambda engine: None  # called once requests are taken
        self._load = load
        self._engine: AsyncEngine | None = None
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._seconds = 1.0  # that a request has taken of late

    @property
    def state(self) -> str:
        """One of loading, ready, draining and failed."""
        dead = self._engine is not None and not self._engine.is_alive and not self._closed
        if dead or self.failure is not None:
            return "failed"
        return "draining" if self.draining else "loading" if self._engine is None else "ready"

    @property
    def is_over(self) -> bool:
        """Whether the process should end: nothing could be loaded, or the model's thread has ended."""
        return self.failure is not None or (self.state == "failed" and self.config.exit_on_failure)

    @property
    def engine(self) -> AsyncEngine:
        """The engine. Raises `APIError` 503 while it loads, and when it has failed."""
        if self._engine is None or self.failure is not None:
            raise self._unavailable()
        return self._engine

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        engine = self.engine.engine
        return min(engine.max_model_len, engine.core.runner.cache.num_slots)

    @property
    def max_active(self) -> int:
        """The requests that run together, and those that may wait."""
        return self.engine.engine.engine_config.max_running + self.config.max_waiting

    def start(self) -> None:
        """Begin to load the engine, in a thread that does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._run_load, args=(loop,), name="qvl-load", daemon=True).start()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request while the body runs. Raises `APIError` 503 if none is taken now, and 429 if too many are."""
        if self.state != "ready":
            raise self._unavailable()
        if self.active >= self.max_active:
            raise busy(f"{self.active} requests are pending, which is the limit: try again later", self._wait_s())
        began = time.monotonic()
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            self._seconds += (time.monotonic() - began - self._seconds) / 8
            if not self.active:
                self._idle.set()

    async def drain(self) -> None:
        """Take no more requests, and wait for those that run, as long as the configuration allows."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), self.config.drain_s)
        except asyncio.TimeoutError:
            _log.warning("%d requests are cut off after %g s", self.active, self.config.drain_s)

    async def close(self) -> None:
        """End the engine's thread; requests that still run fail."""
        if self._engine is not None:
            self._closed = self._closed or self._engine.is_alive
            await self._engine.close()

    def _run_load(self, loop: asyncio.AbstractEventLoop) -> None:
        engine, failure = None, None
        try:
            engine = self._load()
            if engine.engine_config.image_limits.isolate_images:
                start_ahead()
        except BaseException as error:  # `serve` raises it
            failure = error
        try:
            loop.call_soon_threadsafe(self._loaded, engine, failure)
        except RuntimeError:  # the server ended in the meantime
            return

    def _loaded(self, engine: Engine | None, failure: BaseException | None) -> None:
        from qvl_runtime.engine.async_engine import AsyncEngine

        self.failure = failure
        if engine is not None:
            running = engine.engine_config.max_running
            self.metrics.watch(engine)
            self._engine = AsyncEngine(engine, max_pending=running + self.config.max_waiting)
            self.on_ready(engine)

    def _unavailable(self) -> APIError:
        if self.state == "failed":
            return unavailable("the engine has failed: the server must be restarted", 60, "engine_dead")
        if self.draining:
            return unavailable("the server is about to end: try another, or later", 5, "draining")
        return unavailable("the model is being loaded: try again", _RETRY_LOADING_S, "loading")

    def _wait_s(self) -> int:
        """About when a place will be free, for Retry-After: those that run leave about every `_seconds`."""
        running = self.engine.engine.engine_config.max_running
        return max(1, min(60, round(self._seconds * (1 + self.config.max_waiting / running) / 4)))


def raise_failure(service: Service) -> None:
    """Raise what kept the engine from being loaded, or `QVLError` if its thread has ended."""
    if service.failure is not None:
        raise service.failure
    if service.state == "failed":
        raise QVLError("the thread of the model has ended; its log says why")
