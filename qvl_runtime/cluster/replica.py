"""A replica of Ray Serve: the server's own application over an engine, called with whole requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import Message

from qvl_runtime.errors import QVLError
from qvl_runtime.server.app import make_app
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.garbage import loaded_for_good
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.middleware import standard_output
from qvl_runtime.server.service import Service

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine

_END: Message = {}


class Replica:
    """Answers requests as `qvl serve` does. A plain class, of which Ray makes an actor."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engine: Mapping[str, Any], server: Mapping[str, Any], keys: str | None, threads: int | None, log: bool
    ) -> None:
        """Load the engine: Serve sends requests once this returns. engine, server: arguments of `Engine` and
        `ServerConfig`. Raises what keeps the engine from loading."""

        def load() -> Engine:
            import torch

            from qvl_runtime.engine.engine import Engine

            if threads is not None:
                torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS to 1
            return Engine(**engine)

        self._service = Service(partial(loaded_for_good, load), server_config(server))
        key_file = Keys(Path(keys) if keys is not None else None)
        self._app = make_app(self._service, key_file, standard_output if log else None)
        self._service.start()
        while self._service.state == "loading":
            await asyncio.sleep(0.02)
        if self._service.failure is not None:
            raise self._service.failure

    async def answer(self, key: str | None, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """The messages of ASGI that answer a request. key: its affinity, which the router has used.

        Closing or canceling it is what a client's leaving is to the server.
        """
        messages: asyncio.Queue[Message] = asyncio.Queue()
        gone = asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self._app({**scope, "root_path": "", "state": {}}, receive, messages.put)
            finally:
                messages.put_nowait(_END)

        task = asyncio.ensure_future(work())
        try:
            while (message := await messages.get()) is not _END:
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()

    async def process(self, key: str | None = None) -> dict[str, Any]:
        """The process's id and what its caches have done. key: routes the call."""
        images = self._service.engine.engine.core.runner.images
        return {"pid": os.getpid(), "hits": images.hits, "misses": images.misses, "active": self._service.active}

    async def check_health(self) -> None:
        """Raise `QVLError` if the model's thread has ended: Serve replaces the replica then."""
        if self._service.state == "failed":
            raise QVLError("the thread of the model has ended; its log says why")


def server_config(values: Mapping[str, Any]) -> ServerConfig:
    """The server's options, from JSON, which has lists for tuples. Raises `ConfigError`."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return ServerConfig(**given)
