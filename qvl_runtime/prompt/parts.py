"""Encode the parts of a prompt, given as dicts: images with their heading, boxes with their tags, plain text.

The text of a part is never searched for tags: what a user types stays text. Special tokens come only from the structure
of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from qvl_runtime.errors import PromptError
from qvl_runtime.prompt.boxes import Box
from qvl_runtime.prompt.listformat import box_text, image_heading, whole_numbers
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Allowed, Tokenizer

Part: TypeAlias = "str | Mapping[str, Any]"
Content: TypeAlias = "str | Sequence[Part]"
"""Text, or parts in order."""

_TYPES = ("text", "image", "image_url", "ref", "box")
_EXPECTED = (
    'expected {"text": ...}, {"image": ...}, {"image_url": {"url": ...}} or {"ref": ..., "box": [x1, y1, x2, y2]}'
)


def content_segment(
    tokenizer: Tokenizer, content: Content, where: str, *, allowed: Allowed = "none", first_image: int = 1
) -> Segment:
    """Encode the content of a message or prompt as token ids and image slots.

    Each image gets the heading `Picture N:`, counting from `first_image`. `allowed` selects the tags that are
    interpreted in plain text; `where` ("message 2") names the content in errors. Raises `PromptError` for an invalid
    part.
    """
    writer = _Writer(tokenizer, allowed)
    for part in [content] if isinstance(content, str) else content:
        part_type = _part_type(part, where)
        if isinstance(part, str):
            writer.text(part)
        elif part_type == "text":
            writer.text(_string(part, "text", where))
        elif part_type == "box":
            _write_box(writer, part, where)
        else:
            source = part["image"] if part_type == "image" else _image_url(part, where)
            writer.text(image_heading(first_image + len(writer.segment.slots)))
            writer.place(tokenizer.image_span(source))
            writer.text("\n")
    return writer.close()


class _Writer:
    """Collects plain text up to the next special token, so that BPE merges across parts as in a single string."""

    def __init__(self, tokenizer: Tokenizer, allowed: Allowed) -> None:
        self.tokenizer = tokenizer
        self.segment = Segment()
        self._allowed = allowed
        self._pending = ""

    def text(self, text: str) -> None:
        self._pending += text

    def place(self, piece: Segment) -> None:
        self.segment.extend(self.tokenizer.encode(self._pending, self._allowed), piece)
        self._pending = ""

    def wrap(self, start: int, text: str, end: int) -> None:
        """Write text between two special tokens."""
        self.place(Segment([start]))
        self.text(text)
        self.place(Segment([end]))

    def close(self) -> Segment:
        self.place(Segment())
        return self.segment


def _part_type(part: object, where: str) -> str:
    """One of "text", "image", "image_url" and "box"."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} has a part of type {type(part).__name__}; {_EXPECTED}")
    present = [key for key in _TYPES if part.get(key) is not None]
    part_type = part.get("type", "box" if present == ["ref", "box"] else present[0] if len(present) == 1 else None)
    part_type = "box" if part_type == "ref" else part_type
    if part_type not in _TYPES or not (part_type in present or (part_type == "box" and "ref" in present)):
        keys = ", ".join(f"{key!r}" for key in part) or "nothing"
        raise PromptError(f"{where} has an invalid part with {keys}; {_EXPECTED}")
    return str(part_type)


def _string(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part[key]
    if not isinstance(value, str):
        raise PromptError(f"{where} has a part whose {key!r} is of type {type(value).__name__}; expected a string")
    return value


def _image_url(part: Mapping[str, Any], where: str) -> str:
    url = part["image_url"]
    owner, key = (url, "url") if isinstance(url, Mapping) and "url" in url else (part, "image_url")
    return _string(owner, key, where)


def _write_box(writer: _Writer, part: Mapping[str, Any], where: str) -> None:
    """Write `<ref>label</ref>` if there is a label, then `<box>(x1,y1),(x2,y2)</box>` for each box."""
    tokens, boxes = writer.tokenizer, part.get("box")
    if part.get("ref") is not None:
        writer.wrap(tokens.ref_start, _string(part, "ref", where), tokens.ref_end)
    if boxes is None:
        return
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise PromptError(f"{where} has a box of type {type(boxes).__name__}; {_EXPECTED}")
    for box in boxes if all(isinstance(box, Sequence) for box in boxes) else [boxes]:
        Box(None, *whole_numbers(box))  # raises for coordinates in pixels instead of 0-1000
        writer.wrap(tokens.box_start, box_text(box), tokens.box_end)
