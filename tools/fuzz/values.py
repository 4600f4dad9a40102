"""Random values and damage: of JSON, of bytes and of text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

TEXTS = ["", "a", "\x00", "\ud800", "\x1b[31m", "../x", "/etc/passwd", "<img>", "</img>", "<box>(1,2),(3,4)</box>",
         "<|im_start|>system\n", "é猫🐈", "x" * 5000, "1e999", "nan", "\n\r\t", "http://127.0.0.1:1/",
         "file:///dev/zero", "data:image/png;base64,AAAA", "-1", "true", "\u202e", "%00"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.0, 1e-300, 1e300, 1e-46,
           float("inf"), float("-inf"), float("nan"), 0.5, 3.7, 10**6]  # fmt: skip


def value(rng: random.Random, depth: int = 3) -> Any:
    """A random JSON value, with the odd number and text that JSON allows."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice([None, True, False])
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {rng.choice([*TEXTS[:8], "text", "image", "role", "content"]): value(rng, depth - 1) for _ in range(3)}


def damaged(rng: random.Random, document: Any, times: int = 2) -> Any:
    """A copy of a JSON document with some of its values replaced, removed, moved or repeated."""
    document = copy.deepcopy(document)
    for _ in range(rng.randrange(1, times + 1)):
        holders = [holder for holder in _holders(document) if holder]
        if not holders:
            return value(rng)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        rng.choice(_DAMAGES)(rng, holder, key)
    return document


def _holders(document: Any) -> list[Any]:
    if not isinstance(document, (dict, list)):
        return []
    inside = document.values() if isinstance(document, dict) else document
    return [document, *(holder for part in inside for holder in _holders(part))]


def _replace(rng: random.Random, holder: Any, key: Any) -> None:
    holder[key] = value(rng)


def _remove(rng: random.Random, holder: Any, key: Any) -> None:
    del holder[key]


def _swap(rng: random.Random, holder: Any, key: Any) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


def _scale(rng: random.Random, holder: Any, key: Any) -> None:
    if isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([holder[key] * 2, holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 10**6])


def _wrap(rng: random.Random, holder: Any, key: Any) -> None:
    holder[key] = rng.choice([[holder[key]], {"value": holder[key]}, str(holder[key]), [holder[key]] * 3])


_DAMAGES: Sequence[Callable[[random.Random, Any, Any], None]] = (_replace, _remove, _swap, _scale, _wrap)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of some bytes with a few flipped, cut, repeated or overwritten."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at, size = rng.randrange(len(out) + 1), rng.choice([1, 2, 4, 16, 200])
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            out[at : at + size] = b""
        elif kind == 3:
            out[at:at] = out[at : at + size]
        else:
            out[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00"]
            )
    return bytes(out[: rng.randrange(len(out) + 1)] if rng.random() < 0.1 else out)


def encoded(rng: random.Random, document: Any) -> bytes:
    """JSON as a file holds it: usually plain, sometimes in another encoding, nested or cut."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    kind = rng.randrange(12)
    if kind == 0:
        return text.encode("utf-16", "surrogatepass")
    if kind == 1:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if kind == 2:
        return damaged_bytes(rng, text.encode("utf-8", "surrogatepass"))
    if kind == 3:
        return b"[" * rng.choice([10, 10_000, 200_000])
    return text.encode("utf-8", "surrogatepass")
