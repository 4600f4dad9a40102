"""Clients that connect and then do nothing: none of them holds a connection or a place for long."""

from __future__ import annotations

import json
import socket
import time

import pytest

from qvl_runtime.server.connection import Connection
from tests.server.conftest import Live, say

pytestmark = pytest.mark.cpu
CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


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
