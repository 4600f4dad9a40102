"""The JSON of a body with images: parsed without a long hold of the interpreter's lock, so that others' answers go on.

Python's parser reads a string character by character, 17 ms for an image of 10 MB in base64, in which no other thread
runs. So long data URLs are cut out before and put back after.
"""

from __future__ import annotations

from secrets import token_hex
from typing import Any

from qvl_runtime.errors import PromptError
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.server.errors import invalid

LONG = 1 << 16  # bytes from which a data URL is cut out
_PIECE = 1 << 20  # bytes that are looked at without a break
_START = b'"data:'


def parse_body(body: bytes) -> Any:
    """The JSON value of a body. Raises `APIError` 400."""
    try:
        short, urls = _without_long_urls(body)
        if urls:
            value = _parse(short)
            put = _PutBack(urls)
            value = put.into(value)
            if not put.left:
                return value
    except PromptError:  # said of the body as it came
        pass
    except UnicodeDecodeError:
        pass
    try:
        return _parse(body)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 at byte {error.start}", code="invalid_body") from None
    except PromptError as error:
        raise invalid(str(error), code="invalid_body") from None


def _parse(body: bytes) -> Any:
    return parse_json(body.decode("utf-8-sig"), "the body", PromptError, "send one JSON object", finite=True)


def _without_long_urls(body: bytes) -> tuple[bytes, dict[str, str]]:
    """A body with a short name for each long data URL, and the URLs by these names."""
    parts: list[bytes] = []
    urls: dict[str, str] = {}
    kept = at = 0
    secret = token_hex(8)  # a client cannot write a name of its own
    while (at := body.find(_START, at)) >= 0:
        end = body.find(b'"', at + 1)
        if end - at < LONG or (at and body[at - 1] == ord("\\")) or (url := _plain(body, at + 1, end)) is None:
            at += len(_START)
            continue
        name = f"{secret}-{len(urls)}"
        urls[name] = url
        parts += [body[kept : at + 1], name.encode()]
        kept = at = end
    return b"".join([*parts, body[kept:]]) if urls else body, urls


def _plain(body: bytes, start: int, end: int) -> str | None:
    """A part of a body as the text of a JSON string; None if it is none, or has escapes or other than ASCII."""
    import numpy as np

    pieces = []
    for at in range(start, end, _PIECE):
        piece = body[at : min(end, at + _PIECE)]
        if not piece.isascii() or b"\\" in piece or np.frombuffer(piece, np.uint8).min() < 32:
            return None
        pieces.append(piece.decode("ascii"))
    return "".join(pieces)


class _PutBack:
    """Puts URLs back where their names are."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls, self.left = urls, len(urls)

    def into(self, value: Any) -> Any:
        """The value with the URLs in it; `left` are those that were not found as a value."""
        if isinstance(value, str) and (url := self._urls.get(value)) is not None:
            self.left -= 1
            return url
        if isinstance(value, list):
            return [self.into(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self.into(entry) for key, entry in value.items()}
        return value
