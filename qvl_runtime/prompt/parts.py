"""Parts of a prompt as dicts to a segment: images under their heading, boxes in their tags, text as plain text.

A part's text is never searched for tags: what a user types stays text. Only the structure of the parts becomes special
tokens.
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

_KINDS = ("text", "image", "image_url", "ref", "box")
_WANTED = 'expected {"text": ...}, {"image": ...}, {"image_url": {"url": ...}} or {"ref": ..., "box": [x1, y1, x2, y2]}'


def content_segment(
    tokenizer: Tokenizer, content: Content, where: str, *, allowed: Allowed = "none", first_image: int = 1
) -> Segment:
    """Token ids and image slots of a content.

    Pictures are headed `Picture N:`, counting from `first_image`; `allowed` says which tags in plain text are
    honoured, and `where` ("message 2") names the content in errors. Raises `PromptError` for a part it cannot read.
    """
    writer = _Writer(tokenizer, allowed)
    for part in [content] if isinstance(content, str) else content:
        kind = _kind(part, where)
        if isinstance(part, str):
            writer.text(part)
        elif kind == "text":
            writer.text(_string(part, "text", where))
        elif kind == "box":
            _write_box(writer, part, where)
        else:
            source = part["image"] if kind == "image" else _address(part, where)
            writer.text(image_heading(first_image + len(writer.segment.slots)))
            writer.place(tokenizer.image_span(source))
            writer.text("\n")
    return writer.close()


class _Writer:
    """Gathers plain text up to the next special token, so that words merge across parts as in one string."""

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
        """A text between two special tokens."""
        self.place(Segment([start]))
        self.text(text)
        self.place(Segment([end]))

    def close(self) -> Segment:
        self.place(Segment())
        return self.segment


def _kind(part: object, where: str) -> str:
    """One of "text", "image", "image_url" and "box"."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} has a part of type {type(part).__name__}; {_WANTED}")
    present = [key for key in _KINDS if part.get(key) is not None]
    kind = part.get("type", "box" if present == ["ref", "box"] else present[0] if len(present) == 1 else None)
    kind = "box" if kind == "ref" else kind
    if kind not in _KINDS or not (kind in present or (kind == "box" and "ref" in present)):
        keys = ", ".join(f"{key!r}" for key in part) or "nothing"
        raise PromptError(f"{where} has a part with {keys} that cannot be read; {_WANTED}")
    return str(kind)


def _string(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part[key]
    if not isinstance(value, str):
        raise PromptError(f"{where} has a part whose {key!r} is of type {type(value).__name__}; expected a string")
    return value


def _address(part: Mapping[str, Any], where: str) -> str:
    url = part["image_url"]
    holder, key = (url, "url") if isinstance(url, Mapping) and "url" in url else (part, "image_url")
    return _string(holder, key, where)


def _write_box(writer: _Writer, part: Mapping[str, Any], where: str) -> None:
    """`<ref>label</ref>` where there is a label, then `<box>(x1,y1),(x2,y2)</box>` for each box."""
    tokens, boxes = writer.tokenizer, part.get("box")
    if part.get("ref") is not None:
        writer.wrap(tokens.ref_start, _string(part, "ref", where), tokens.ref_end)
    if boxes is None:
        return
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise PromptError(f"{where} has a box of type {type(boxes).__name__}; {_WANTED}")
    for box in boxes if all(isinstance(box, Sequence) for box in boxes) else [boxes]:
        Box(None, *whole_numbers(box))  # raises for pixels given where per mille are meant
        writer.wrap(tokens.box_start, box_text(box), tokens.box_end)
