"""The ASGI application in front of replicas: reads a request, names its affinity, and passes the answer on."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from qvl_runtime.cluster.affinity import HEADER, affinity_key
from qvl_runtime.cluster.connect import first_line
from qvl_runtime.server.errors import APIError, unavailable
from qvl_runtime.server.http import DONE, Disconnected, Reply, event, read_body, while_connected
from qvl_runtime.server.middleware import header

_PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
_CODE = "replica_lost"


class Gateway:
    """Passes requests to the replicas of a deployment and their answers back."""

    def __init__(self, replicas: Any, max_body_bytes: int, body_timeout_s: float) -> None:
        """replicas: a handle whose `answer` streams messages of ASGI."""
        self._answer = replicas.options(stream=True).answer
        self._limit, self._timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            with suppress(Disconnected):
                await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        try:
            body = await read_body(scope, receive, reply, self._limit, self._timeout_s)
        except APIError as error:
            await reply.error(error)
            return
        key = header(scope, HEADER.lower().encode()) or _key(body)
        await while_connected(receive, self._stream(key, scope, body, reply, send))

    async def _stream(self, key: str | None, scope: Scope, body: bytes, reply: Reply, send: Send) -> None:
        passed = {name: scope[name] for name in _PASSED if name in scope}
        messages = self._answer.remote(key or None, passed, body)
        is_stream = False
        try:
            async for message in messages:
                if message["type"] == "http.response.start":
                    reply.started = True
                    is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
                await send(message)
        except asyncio.CancelledError:  # the client has gone: so that the replica stops, too
            messages.cancel()
            raise
        except Exception as error:  # of Ray: the replica has died, or is gone
            lost = unavailable(
                f"the server that had this request is gone; send it again ({first_line(error)})", 1, _CODE
            )
            if not reply.started:
                await reply.error(lost)
            elif is_stream:
                await send({"type": "http.response.body", "body": event(lost.body()) + DONE})
            else:
                raise


async def _live(receive: Receive, send: Send) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


def _key(body: bytes) -> str | None:
    """The affinity of a body, which need not be valid: the replica says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return affinity_key(request) if isinstance(request, dict) else None
