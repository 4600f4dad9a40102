"""What happens to every request before it is routed: its id, its log line, its key, and where it comes from.

Plain ASGI: a layer that wraps `receive`, as Starlette's BaseHTTPMiddleware does, would swallow the disconnect of a
client.
"""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Container, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvl_runtime.prompt.hosts import canonical
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.errors import PERMISSION, APIError
from qvl_runtime.server.http import Reply
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.requests import Caller, Exchange

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
GONE = 499  # nginx's status for a client that left before it had an answer
_LONGEST_PATH = 200  # characters in the log


class AccessLog:
    """Gives each request an id, and writes one line of JSON about it once it is answered.

    JSON escapes every control character, so a request cannot forge a second line. The query of an address is left out.
    """

    def __init__(
        self, app: ASGIApp, count: Callable[[str, int], None], write: Callable[[str], None] | None = None
    ) -> None:
        """count: takes route and status, for the metrics; write: takes a line without its end, None for no log."""
        self._app, self._count, self._write = app, count, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        state: dict[str, Any] = {"request_id": request_id, "caller": Caller(None)}
        scope["state"] = state
        status, began = 0, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._count(state.get("route", "other"), status or GONE)
            if self._write is not None:
                self._write(_line(scope, state, status, time.perf_counter() - began))


class Guard:
    """Refuses requests without a key, and those that a web page of another origin makes a browser send."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: Keys, public: Container[str]) -> None:
        """public: paths that need no key."""
        self._app, self._config, self._keys, self._public = app, config, keys, public
        self._hosts = None if config.hosts is None else {canonical(host) for host in config.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it with an error."""
        if scope["type"] == "http":
            try:
                self._check_origin(scope)
                if scope["path"] not in self._public:
                    scope["state"]["caller"] = self._keys.caller(
                        header(scope, b"authorization"), header(scope, b"x-api-key")
                    )
            except APIError as error:
                scope["state"]["outcome"] = error.code or error.type
                await Reply(send).error(error)
                return
        await self._app(scope, receive, send)

    def _check_origin(self, scope: Scope) -> None:
        """Against pages that resolve their own name to this machine, and pages that post forms here."""
        host = header(scope, b"host")
        if self._hosts is not None and _name_of(f"//{host}") not in self._hosts:
            raise APIError(403, "this server does not answer to that host name", PERMISSION, None, "wrong_host")
        origin = header(scope, b"origin")
        if not origin or "*" in self._config.cors_origins or origin in self._config.cors_origins:
            return
        if urlsplit(origin).netloc != host:
            raise APIError(403, "pages of other origins may not use this server", PERMISSION, None, "wrong_origin")


def header(scope: Scope, name: bytes) -> str:
    """The value of a header, as a string in Latin-1; empty if there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def standard_output(line: str) -> None:
    """Write a line of the access log."""
    print(line, file=sys.stdout, flush=True)


def _name_of(address: str) -> str:
    try:
        return canonical(urlsplit(address).hostname or "")
    except ValueError:
        return ""


def _line(scope: Scope, state: Mapping[str, Any], status: int, seconds: float) -> str:
    exchange: Exchange = state.get("exchange") or Exchange(state["caller"], None, state.get("outcome"))
    usage = exchange.usage or {}
    client = scope.get("client") or ("", 0)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": state["request_id"],
        "client": client[0],
        "key": state["caller"].name,
        "method": scope["method"][:20],
        "path": scope["path"][:_LONGEST_PATH],
        "status": status or GONE,
        "seconds": round(seconds, 4),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "outcome": exchange.outcome,
    }
    return json.dumps({name: value for name, value in entry.items() if value is not None})
