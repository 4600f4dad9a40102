"""The original tokenizer's list format: convert text with tags to a list of parts and back, quirks included.

For code written for Qwen-VL, and for comparison with it. To read answers, prefer `boxes.parse_boxes`: here only the
first of several boxes carries its label, and a malformed box raises. Source: docs/model.md section 7.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.tokenizer import SPECIAL_TOKENS

_START = re.compile(r"<(img|ref|box|quad)>")
_COUNTS = {"box": (4, "four numbers x1, y1, x2, y2"), "quad": (8, "eight numbers, x and y of four corners")}
_KEYS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}
_CHAT_CONTROLS = frozenset(token for token in SPECIAL_TOKENS if token.startswith("<|")) - {"<|endoftext|>"}


def from_list_format(parts: Iterable[Mapping[str, Any]]) -> str:
    """Text with tags from parts `{"image": path}`, `{"text": ...}` or `{"box": [[x1, y1, x2, y2], ...], "ref": ...}`.

    Images are numbered from 1 in each call. Of several keys in one part, image takes precedence over text over box.
    """
    text, images = "", 0
    for part in parts:
        if "image" in part:
            images += 1
            text += f"{image_heading(images)}<img>{part['image']}</img>\n"
        elif "text" in part:
            text += part["text"]
        elif "box" in part:
            text += f"<ref>{part['ref']}</ref>" if "ref" in part else ""
            text += "".join(f"<box>{box_text(box)}</box>" for box in part["box"])
        else:
            raise PromptError(f"part {dict(part)!r:.80} has no known key; expected 'image', 'text' or 'box'")
    return text


def image_heading(number: int) -> str:
    """The text before an image, as in training; no space after the colon, as in the original's `from_list_format`."""
    return f"Picture {number}:"


def whole_numbers(shape: Sequence[float], name: str = "box") -> tuple[int, ...]:
    """The 4 coordinates of a box, or 8 of a quad, truncated to whole numbers as by `%d`.

    Raises `PromptError`, also for fractions from 0 to 1, which the original truncates to a point in the corner.
    """
    count, words = _COUNTS[name]
    try:
        exact = list(shape)
        numbers = tuple(map(int, exact))
    except (TypeError, ValueError, OverflowError):
        exact, numbers = [], ()
    if len(numbers) != count or not all(isinstance(number, Real) for number in exact):
        raise PromptError(f"{name} {quoted(shape)} cannot be written; expected {words}")
    if all(0 <= number <= 1 for number in exact) and not all(isinstance(number, Integral) for number in exact):
        raise PromptError(f"{name} {quoted(shape)} runs from 0 to 1; expected 0 to 1000: multiply by 1000")
    return numbers


def box_text(box: Sequence[float]) -> str:
    """The text between `<box>` and `</box>`."""
    return point_text(whole_numbers(box))


def point_text(numbers: Sequence[int]) -> str:
    """Coordinates as points: `(x1,y1),(x2,y2)`, and so on."""
    return ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))


def to_list_format(text: str) -> list[dict[str, str]]:
    """Split text with tags into parts: the content of each img, ref, box and quad element, and the text between them.

    A start tag pairs with the next end tag of its kind; stray end tags are text. Raises `PromptError` for an unclosed
    start tag and for chat control strings.
    """
    rest = unicodedata.normalize("NFC", text)
    for control in _CHAT_CONTROLS:
        if control in rest:
            raise PromptError(
                f"the text contains the control string {control}, which a list of parts cannot hold: remove it"
            )
    parts: list[dict[str, str]] = []
    while start := _START.search(rest):
        content, end, after = rest[start.end() :].partition(f"</{start[1]}>")
        if not end:
            raise PromptError(f"{start[0]} before {content[:60]!r} is not closed: add </{start[1]}>")
        plain = rest[: start.start()]
        parts += ([{"text": plain}] if plain else []) + [{_KEYS[start[1]]: content}]
        rest = after
    return parts + ([{"text": rest}] if rest else [])


def fetch_all_box_with_ref(text: str) -> list[dict[str, Any]]:
    """Each box as `{"box": (x1, y1, x2, y2)}`, with "ref" if that immediately precedes it; parsed by `int`."""
    boxes: list[dict[str, Any]] = []
    parts = to_list_format(text)
    for previous, part in zip([{}, *parts], parts, strict=False):
        if "box" not in part:
            continue
        try:
            x1, y1, x2, y2 = (int(number) for number in part["box"].replace("(", "").replace(")", "").split(","))
        except ValueError:
            raise PromptError(f"box {part['box'][:60]!r} cannot be read; expected four whole numbers") from None
        boxes.append({"box": (x1, y1, x2, y2)} | ({"ref": previous["ref"].strip()} if "ref" in previous else {}))
    return boxes
