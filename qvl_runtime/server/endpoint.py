"""A way to ask the model something: read the body, answer it while the client is there, count what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from qvl_runtime.prompt.limits import ImageLimits
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.errors import api_error
from qvl_runtime.server.http import Disconnected, Events, Reply, read_json, while_connected
from qvl_runtime.server.requests import Exchange, guide_field
from qvl_runtime.server.service import Service

Handler = Callable[[Service, Any, Exchange], Awaitable["dict[str, Any] | Events"]]
"""Answers the JSON of a request: with an object, or with the events of a stream."""

_SLACK = 2**20  # bytes of a body besides its images


class ModelEndpoint:
    """An ASGI application for one path whose requests take a place in the queue.

    The place is taken before the body is read, so that bodies in memory are bounded as well.
    """

    def __init__(self, service: Service, handler: Handler, param: str) -> None:
        """param: the field that holds the prompt, for errors."""
        self._service, self._handler, self._param = service, handler, param

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = None
        reply, exchange = Reply(send), Exchange(scope["state"]["caller"], record=self._service.metrics.finished)
        scope["state"]["exchange"] = exchange
        try:
            with self._service.admit():
                body = await read_json(scope, receive, reply, self._limit(), self._service.config.body_timeout_s)
                await while_connected(receive, self._answer(body, exchange, reply))
        except Disconnected:
            exchange.outcome = "disconnected"
        except Exception as error:
            failure = api_error(error, self._param, guide_field(body))
            exchange.outcome = failure.code or failure.type
            await reply.error(failure)

    async def _answer(self, body: Any, exchange: Exchange, reply: Reply) -> None:
        answer = await self._handler(self._service, body, exchange)
        if isinstance(answer, dict):
            await reply.json(200, answer)
            return
        async with aclosing(answer) as events:
            await reply.events(events)

    def _limit(self) -> int:
        config = self._service.config
        if config.max_body_bytes is not None:
            return config.max_body_bytes
        return body_limit(config, self._service.engine.engine.engine_config.image_limits)


def body_limit(config: ServerConfig, images: ImageLimits) -> int:
    """The longest body: all images in base64, and 1 MiB of text, unless the server has a limit of its own."""
    if config.max_body_bytes is not None:
        return config.max_body_bytes
    return images.max_images * images.max_image_bytes * 4 // 3 + _SLACK
