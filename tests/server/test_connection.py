"""Clients that connect and then do nothing: none of them holds a connection or a place for long."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from qvl_runtime.server.connection import Connection
from qvl_runtime.server.launch import listening_socket
from tests.server.conftest import Live, say

pytestmark = pytest.mark.cpu
CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


LARGE = 8 * 2**20  # bytes, more than a socket takes


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, with `LARGE` bytes at /large, and reads no body."""
    body = bytes(LARGE) if scope["path"] == "/large" else b"early"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def connected(keep_alive_s: int = 75) -> Iterator[socket.socket]:
    """A client of `app` on a server of its own."""
    config = uvicorn.Config(app, http=Connection, lifespan="off", log_config=None, timeout_keep_alive=keep_alive_s)
    server = uvicorn.Server(config)
    with listening_socket("127.0.0.1", 0) as sock, socket.socket() as raw:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            raw.settimeout(20)
            raw.connect(sock.getsockname())
            yield raw
        finally:
            raw.close()
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def ask(content: object) -> tuple[bytes, bytes]:
    """The head and the body of a request."""
    body = json.dumps(content).encode()
    return f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode(), body


def read_answer(raw: socket.socket) -> bytes:
    """The status line of an answer with a declared length, which is read whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += raw.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += raw.recv(65536)
    return head.split(b"\r\n")[0]


@pytest.mark.parametrize("first", [b"", HEALTH], ids=["new", "kept alive"])
@pytest.mark.parametrize("part", [b"GET /health HTTP/1.1\r\nHost", b"GET / HTTP/1.1\r\n", b"G"])
def test_a_head_that_does_not_come(live: Live, monkeypatch: pytest.MonkeyPatch, first: bytes, part: bytes) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.5)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
        if first:
            raw.sendall(first)
            assert b"200" in read_answer(raw)
        raw.sendall(part)
        assert raw.recv(1) == b"", "the server closes it"


def test_a_connection_without_a_request(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.5)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
        assert raw.recv(1) == b""


def test_bytes_now_and_then_do_not_help(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.5)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw, pytest.raises(OSError):
        for _ in range(200):
            raw.sendall(b"a")
            time.sleep(0.05)


def test_a_slow_body_and_a_pause_between_requests_are_allowed(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_s", 0.5)
    head, body = ask({"model": "nano", "messages": say("Hi."), "max_tokens": 2})
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
        for _ in range(2):
            raw.sendall(head)
            time.sleep(0.8)
            raw.sendall(body)
            assert b"200" in read_answer(raw)
            time.sleep(0.8)


def test_two_requests_at_once_are_answered_in_order(live: Live) -> None:
    head, body = ask({"model": "nano", "messages": say("Hi."), "max_tokens": 2})
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as raw:
        raw.sendall(head + body + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        data = b""
        while piece := raw.recv(65536):
            data += piece
    answers = data.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200"] and b"chat.completion" in answers[0]


def test_a_client_that_does_not_read(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests end, and their places are free, although it stays connected."""
    monkeypatch.setattr(Connection, "unread_s", 0.5)
    endless = {"max_tokens": 1900, "ignore_eos": True, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True}
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", live.port))
        raw.sendall(b"".join(ask({"model": "nano", "messages": say("Hi.")} | endless)))
        assert raw.recv(12) == b"HTTP/1.1 200"
        assert live.engine.core.scheduler.running, "it is being answered"
        live.wait_free(30)
        assert live.get("/health").status == 200


def test_a_client_that_reads_slowly_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "unread_s", 1.0)
    with connected() as raw:
        raw.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        began, size = time.perf_counter(), 0
        while size < LARGE:
            piece = raw.recv(65536)
            assert piece, f"cut off after {size} bytes"
            size += len(piece)
            time.sleep(0.02)
    assert time.perf_counter() - began > 2.0, "twice what a client has that reads nothing"


def test_the_rest_of_an_answer_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends, also where uvicorn has closed it and waits for what is still to be sent."""
    monkeypatch.setattr(Connection, "unread_s", 1.0)
    with connected() as raw:
        raw.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(3.0)
        size = 0
        with suppress(ConnectionResetError):
            while piece := raw.recv(65536):
                size += len(piece)
        assert size < LARGE


def test_a_body_after_an_early_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """When its rest has come, the connection is as good as any."""
    monkeypatch.setattr(Connection, "head_s", 0.5)
    with connected() as raw:
        for _ in range(2):
            raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
            assert b"200" in read_answer(raw)
            raw.sendall(b"c")
            time.sleep(0.8)
            raw.sendall(b"d")
            time.sleep(0.8)


def test_a_body_after_an_early_answer_that_does_not_end() -> None:
    with connected(keep_alive_s=1) as raw, pytest.raises(OSError):
        raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400\r\n\r\nab")
        assert b"200" in read_answer(raw)
        for _ in range(200):
            raw.sendall(b"a")
            time.sleep(0.05)


def test_keep_alive_ends_after_a_late_body() -> None:
    with connected(keep_alive_s=1) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na")
        assert b"200" in read_answer(raw)
        raw.sendall(b"b")
        assert raw.recv(1) == b""
