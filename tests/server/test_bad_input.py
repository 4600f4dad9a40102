"""What is wrong with a request is said in OpenAI's form with the field's name, and the next request is answered."""

from __future__ import annotations

import socket
from typing import Any

import openai
import pytest

from tests.server.conftest import Live, data_url, png, say, serving

pytestmark = pytest.mark.cpu
CHAT = "/v1/chat/completions"
OK = {"role": "user", "content": "hi"}
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_completion_tokens": "many"}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 101}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"repetition_penalty": 1.2e-38, "temperature": 0}, "repetition_penalty"),
    ({"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs.choice"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"model": 5}, "model"),
]
BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ("hello", "messages"),
    ([], "messages"),
    ([1, 2], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": "wizard", "content": "hi"}], "messages[0].role"),
    ([{"role": 1, "content": "hi"}], "messages[0].role"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {"text": "a"}}], "messages[0].content"),
    ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}], "messages[0].content[0].image_url"),
    ([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}], "messages[0].content[0].type"),
    ([OK, {"role": "assistant", "content": "hi"}], "messages"),
    ([{"role": "user"}], "messages"),
    ([{"role": "user", "content": None}], "messages"),
    ([OK, {"role": "system", "content": "late"}, OK], "messages"),
    ([{"role": "user", "content": [{"type": "box", "box": [1, 2, 3000, 4]}]}], "messages"),
]


def error_of(live: Live, body: Any, status: int = 400, path: str = CHAT) -> dict[str, Any]:
    answer = live.post(path, body)
    assert answer.status == status, answer.body[:300]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) <= 700
    assert error["message"].isprintable()
    return error


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_fields(live: Live, fields: dict[str, Any], param: str) -> None:
    """SERVING 1d, row 1; 1b, 3: logit_bias and stop_token_ids out of range."""
    error = error_of(live, {"messages": [OK]} | fields)
    assert error["type"] == "invalid_request_error" and str(error["param"]).startswith(param)


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=lambda value: str(value)[:60])
def test_messages(live: Live, messages: Any, param: str) -> None:
    """1b, 2: messages as null, string, numbers, empty objects, a wrong role or content: an error body, never a hang.
    1b, 3: image_url given as a bare string."""
    assert error_of(live, {"messages": messages})["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1]", b'"text"', b"5", b"null", b"\xff\xfe", b'{"messages": NaN}', b'{"a": 1, "a": 2}'),
        b'{"messages": ' + b"[" * 5000,
        b'{"temperature": 1e999, "messages": []}',
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies(live: Live, body: bytes) -> None:
    """1b, 3: a body that is no JSON object. 1e: NaN, duplicate keys."""
    answer = live.ask("POST", CHAT, body, {"Content-Type": "application/json"})
    assert answer.status == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_what_clients_send_for_nothing_is_taken(live: Live) -> None:
    """1c: empty system content, null content of an assistant, OpenAI's own fields, nulls, the newer role developer."""
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a", "name": "x"},
        {"role": "assistant", "content": None, "refusal": None},
        OK,
    ]
    body: dict[str, Any] = {
        "model": None,
        "messages": messages,
        "temperature": None,
        "stop": None,
        "n": None,
        "stream": None,
    }
    body |= {
        "user": "u",
        "store": False,
        "metadata": {},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
    }
    body |= {"response_format": {"type": "text"}, "max_completion_tokens": 3, "max_tokens": 9, "seed": -1}
    answer = live.post(CHAT, body)
    assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] == 3
    assert (
        live.post(CHAT, {"messages": [{"role": "developer", "content": "Be brief"}, OK], "max_tokens": 1}).status == 200
    )


def test_logit_bias_by_id_and_by_text(live: Live) -> None:
    """1b, 2: logit_bias by id and by text."""
    (exclamation,) = live.engine.tokenizer.encode("!")
    for bias in ({str(exclamation): 100}, {"!": 100}):
        answer = live.post(CHAT, {"messages": [OK], "logit_bias": bias, "max_tokens": 4}).json()
        assert answer["choices"][0]["message"]["content"] == "!!!!"


def test_models_and_lengths(live: Live) -> None:
    """1d: another model name; prompt + max_tokens beyond the context, with both numbers; 1b, 5: a picture too many."""
    assert error_of(live, {"messages": [OK], "model": "gpt-4"}, 404)["code"] == "model_not_found"
    long = error_of(live, {"messages": [OK], "max_tokens": 2040})
    assert long["code"] == "context_length_exceeded" and "2048" in long["message"] and "2040" in long["message"]
    endless = error_of(live, {"messages": [{"role": "user", "content": "word " * 3000}]})
    assert endless["code"] == "context_length_exceeded" and endless["param"] is None
    many = say("What?", *[data_url(png())] * 17)
    assert "16" in error_of(live, {"messages": many})["message"]
    full = say("word " * 1900, data_url(png()), data_url(png("blue")))
    assert error_of(live, {"messages": full})["code"] == "context_length_exceeded"
    assert live.post(CHAT, {"messages": [OK], "max_tokens": 1}).status == 200


@pytest.mark.parametrize(
    "url",
    [
        *("data:image/png;base64,AAAA", "data:image/png;base64,!!!!", "data:image/png,abc", "data:"),
        *("data:image/png;base64,", data_url(b"<html>not a picture</html>"), data_url(png()[:60])),
        *("ftp://x/y", "nonsense", "", " "),
    ],
    ids=lambda url: url[:30],
)
def test_broken_pictures(live: Live, url: str) -> None:
    """1b, 2 and 4: broken base64, an HTML page as picture, malformed data URLs; the server answers the next request."""
    error = error_of(live, {"messages": say("What?", url)})
    assert error["code"] in ("invalid_image", "invalid_value"), error
    assert live.post(CHAT, {"messages": [OK], "max_tokens": 1}).status == 200


def test_data_urls_with_parameters(live: Live) -> None:
    """1b, 4: data URLs with parameters, and as clients write them."""
    picture = data_url(png()).partition(",")[2]
    for head in (
        "data:image/png;charset=utf-8;base64,",
        "data:;base64,",
        "DATA:image/PNG;BASE64,",
        " data:image/png;base64,",
    ):
        answer = live.post(CHAT, {"messages": say("What?", head + picture), "max_tokens": 1})
        assert answer.status == 200, answer.body


def test_methods_and_paths(live: Live) -> None:
    """1d: `../`, NUL and control characters in a path; other methods."""
    for path in (
        "/../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/%00",
        "/v1/%0d%0aX:y",
        "/static/../app.py",
        "/v1",
        "/v1/",
    ):
        assert live.get(path).status in (400, 404), path
    wrong = live.get(CHAT)
    assert (
        wrong.status == 405
        and wrong.headers["allow"] == "POST"
        and wrong.json()["error"]["code"] == "method_not_allowed"
    )
    assert live.post("/v1/models", {}).status == 405 and live.ask("PATCH", "/health/live").status == 405
    assert live.get("/v1/models/../../etc/passwd").status == 404
    with socket.create_connection(("127.0.0.1", live.port)) as raw:
        raw.sendall(b"GET /nothing HTTP/1.1\r\nHost: a\r\nX: \x00\x01\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 4")


def test_a_body_over_the_limit_is_refused_before_it_is_read(live: Live) -> None:
    """1d: 413 before reading it all, whether the length is declared or not."""
    with serving(lambda: live.engine, max_body_bytes=50_000) as small:
        assert error_of(small, {"messages": say("x" * 60_000)}, 413)["code"] == "body_too_large"
        with socket.create_connection(("127.0.0.1", small.port)) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n".encode())
            raw.settimeout(10)
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")
        with socket.create_connection(("127.0.0.1", small.port)) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(8):
                raw.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            raw.settimeout(10)
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")
        assert small.post(CHAT, {"messages": [OK], "max_tokens": 1}).status == 200


def test_a_body_that_does_not_come_is_not_waited_for(live: Live) -> None:
    with (
        serving(lambda: live.engine, body_timeout_s=0.3) as patient,
        socket.create_connection(("127.0.0.1", patient.port)) as raw,
    ):
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n".encode() + b"{")
        raw.settimeout(10)
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")


def test_openai_s_error_classes(live: Live) -> None:
    """1b, 1: the client's classes by status, with the field."""
    client = live.openai()
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="nano", messages=[OK], temperature=-1)
    assert bad.value.param == "temperature" and bad.value.code == "invalid_value" and bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[OK])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(model="nano", messages=say("long"))
