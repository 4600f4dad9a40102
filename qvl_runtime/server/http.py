"""Bodies in, JSON and server-sent events out, over bare ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from qvl_runtime.server.bodies import parse_body
from qvl_runtime.server.errors import APIError

T = TypeVar("T")
Events = AsyncGenerator[dict[str, Any], None]

_THREADED = 256 * 1024  # bytes of a body from which it is parsed in a thread
_DISCARDED = 64 * 2**20  # bytes of a refused body that are read, so that its sender gets to see the answer
_DISCARD_S = 5.0


class Disconnected(Exception):
    """The client has gone: nothing reads an answer."""


class Reply:
    """Sends one answer, in JSON or as a stream of events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def json(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        """Send a whole answer in JSON."""
        await self.data(status, dumps(content), "application/json", headers)

    async def data(
        self,
        status: int,
        data: bytes,
        kind: str,
        headers: Mapping[str, str] | None = None,
        more: bool = False,
        head: bool = False,
    ) -> None:
        """Send a whole answer of any type. more: `end` follows; head: without its body."""
        await self._start(status, kind, {"content-length": str(len(data)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": b"" if head else data, "more_body": more})

    async def end(self) -> None:
        """End an answer that was sent with `more`."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: APIError) -> None:
        """Send an error; in a stream that has begun it is an event, the last one."""
        if self.started:
            await self._send({"type": "http.response.body", "body": event(error.body()) + DONE})
        else:
            await self.json(error.status, error.body(), error.headers)

    async def events(self, events: Events) -> None:
        """Send events as they come. The answer begins with the first, so an error before it has its own status."""
        first = await anext(events)
        await self._start(200, "text/event-stream; charset=utf-8", {"cache-control": "no-cache, no-transform"})
        await self._send({"type": "http.response.body", "body": event(first), "more_body": True})
        async for content in events:
            await self._send({"type": "http.response.body", "body": event(content), "more_body": True})
        await self._send({"type": "http.response.body", "body": DONE})

    async def _start(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.started = True
        fields = {"content-type": kind, "x-content-type-options": "nosniff", "cache-control": "no-store"}
        fields |= {name.lower(): value for name, value in headers.items()}
        raw = [(name.encode("ascii"), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One server-sent event. JSON has no line break, which would end it."""
    return b"data: " + dumps(content) + b"\n\n"


def dumps(content: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 does not have, stays escaped. Raises `ValueError` for NaN."""
    try:
        return _ENCODER.encode(content).encode()
    except UnicodeEncodeError:
        return json.dumps(content, allow_nan=False).encode()


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)


async def read_json(scope: Scope, receive: Receive, reply: Reply, limit: int, timeout_s: float) -> Any:
    """The body of a request, parsed. Raises `APIError` 400, 408 or 413, and `Disconnected`."""
    body = await read_body(scope, receive, reply, limit, timeout_s)
    if len(body) > _THREADED:
        return await asyncio.to_thread(parse_body, body)
    return parse_body(body)


async def read_body(scope: Scope, receive: Receive, reply: Reply, limit: int, timeout_s: float) -> bytes:
    """The body of a request. Raises `APIError` 408 or 413, and `Disconnected`."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    too_large = APIError(413, f"the body has more than {limit:,} bytes, the limit", code="body_too_large")
    if declared.isdigit() and int(declared) > limit:
        await _refuse(receive, reply, too_large)
    try:
        body = await asyncio.wait_for(_read(receive, limit), timeout_s)
    except asyncio.TimeoutError:
        raise APIError(
            408, f"the body took longer than {timeout_s:g} s", code="body_timeout", headers={"Connection": "close"}
        ) from None
    if body is None:
        await _refuse(receive, reply, too_large)
        raise Disconnected
    return body


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` until it is done or the client goes, and return its result.

    Canceling it ends what it waits for: an answer is generated no further, images are no longer read. Raises
    `Disconnected`.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for future in (task, gone):
            future.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnect(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body; None for one over the limit, of which no more is kept."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(receive: Receive, reply: Reply, error: APIError) -> None:
    """Send an error before the body has come, and discard the body: a closed connection could take the answer along."""
    headers = {**error.headers, "Connection": "close"}
    await reply.data(error.status, dumps(error.body()), "application/json", headers, more=True)

    async def discard() -> None:
        size = 0
        while size < _DISCARDED:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), _DISCARD_S)
    await reply.end()
    raise Disconnected
