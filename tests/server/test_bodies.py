"""Bodies with long data URLs: the same value as a plain parser's, the same errors, and no long hold of the lock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qvl_runtime.server.bodies import LONG, parse_body
from qvl_runtime.server.errors import APIError

pytestmark = pytest.mark.unit
URL = "data:image/png;base64," + "A0+/" * (LONG // 4)


@pytest.mark.parametrize(
    "value",
    [
        {"url": URL},
        {"a": [URL, {"b": URL + "1"}, "data:short", "x" * LONG, None, 1.5], URL: 1},
        {"text": f'he said "{URL}" and \\"{URL}"', "url": URL},
        {"url": URL + "é"},
        {"url": URL + "\\ \n"},
        [URL, URL],
        URL,
    ],
)
def test_values_are_those_of_json(value: Any) -> None:
    for ascii_only in (True, False):
        body = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert parse_body(body) == value
        assert parse_body(b"\xef\xbb\xbf" + body) == value


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f'{{"url": "{URL}\n"}}', "Invalid control character"),
        (f'{{"url": "x"{URL}"}}', "delimiter"),
        (f'{{"url": "{URL}', "Unterminated string"),
        (f'{{"url": "{URL}", "url": "{URL}1"}}', "two values under the key"),
        (f'{{"url": "{URL}"}} more', "after the end"),
    ],
)
def test_errors_are_of_the_body_as_it_came(body: str, message: str) -> None:
    with pytest.raises(APIError, match=message):
        parse_body(body.encode())
    same = body.replace(URL, URL[:40])
    with pytest.raises(APIError, match=message):
        parse_body(same.encode())


def test_equal_urls_under_one_key_are_harmless() -> None:
    assert parse_body(f'{{"url": "{URL}", "url": "{URL}"}}'.encode()) == {"url": URL}
    with pytest.raises(APIError, match="not UTF-8"):
        parse_body(f'{{"url": "{URL}", "x": "'.encode() + b'\xff"}')
