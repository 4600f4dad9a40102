"""Encode the parts of a prompt, given as dicts: images with their heading, boxes with their tags, plain text.

The text of a part is never searched for tags: what a user types stays text. Special tokens come only from the structure
of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.boxes import check_on_grid
from qvl_runtime.prompt.keys import OF_IMAGE_URLS, OF_PARTS, is_empty, refuse_unknown
from qvl_runtime.prompt.listformat import image_heading, point_text, whole_numbers
from qvl_runtime.prompt.segment import Segment
from qvl_runtime.prompt.tokenizer import Allowed, Tokenizer

Part: TypeAlias = "str | Mapping[str, Any]"
Content: TypeAlias = "str | Sequence[Part]"
"""Text, or parts in order."""

# The keys of each type of part.
_KEYS = {
    "text": ("text",),
    "image": ("image",),
    "image_url": ("image_url",),
    "box": ("ref", "box"),
    "quad": ("ref", "quad"),
}
_EXPECTED = (
    'expected {"text": ...}, {"image": ...}, {"image_url": {"url": ...}}, {"ref": ..., "box": [x1, y1, x2, y2]} '
    'or {"ref": ..., "quad": [[x1, y1], [x2, y2], [x3, y3], [x4, y4]]}'
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
        elif part_type in ("box", "quad"):
            _write_shapes(writer, part, part_type, where)
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
    """One of "text", "image", "image_url", "box" and "quad"."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} has a part of type {type(part).__name__}; {_EXPECTED}")
    present = [key for keys in _KEYS.values() for key in keys if part.get(key) is not None and key != "ref"]
    if len(present) > 1:
        present = [key for key in present if not is_empty(part[key])]
    part_type = part.get("type")
    if part_type in (None, "ref"):
        part_type = present[0] if len(present) == 1 else "box" if not present else None
    keys = _KEYS.get(part_type, ()) if isinstance(part_type, str) else ()
    if all(part.get(key) is None for key in keys):
        names = ", ".join(quoted(key) for key in [*part][:8]) or "nothing"
        raise PromptError(f"{where} has an invalid part with {names}; {_EXPECTED}")
    refuse_unknown(part, keys, OF_PARTS, f"{where} has a part that")
    return str(part_type)


def _string(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part[key]
    if not isinstance(value, str):
        raise PromptError(f"{where} has a part whose {key!r} is of type {type(value).__name__}; expected a string")
    return value


def _image_url(part: Mapping[str, Any], where: str) -> str:
    url = part["image_url"]
    if isinstance(url, Mapping) and "url" in url:
        refuse_unknown(url, ("url",), OF_IMAGE_URLS, f"{where} has an image_url that")
        return _string(url, "url", where)
    return _string(part, "image_url", where)


def _write_shapes(writer: _Writer, part: Mapping[str, Any], name: str, where: str) -> None:
    """Write `<ref>label</ref>` if there is a label, then `<box>(x1,y1),(x2,y2)</box>` for each box, or its quads."""
    tokens, shapes = writer.tokenizer, part.get(name)
    if part.get("ref") is not None:
        writer.wrap(tokens.ref_start, _string(part, "ref", where), tokens.ref_end)
    if shapes is None:
        return
    tags = (tokens.box_start, tokens.box_end) if name == "box" else (tokens.quad_start, tokens.quad_end)
    for shape in _flattened(shapes, name, where):
        points = whole_numbers(shape, name)
        check_on_grid(points, name)  # coordinates in pixels are not on it
        writer.wrap(tags[0], point_text(points), tags[1])


def _flattened(shapes: Any, name: str, where: str) -> list[list[Any]]:
    """One shape or several, given as numbers, as points [x, y] or as an array, each as a list of numbers."""
    shapes = shapes.tolist() if hasattr(shapes, "tolist") else shapes
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise PromptError(f"{where} has a {name} of type {type(shapes).__name__}; {_EXPECTED}")
    if not all(_is_list(shape) for shape in shapes) or _are_points(shapes):
        shapes = [shapes] if shapes else []
    return [[n for point in shape for n in point] if _are_points(shape) else list(shape) for shape in shapes]


def _are_points(shape: Sequence[Any]) -> bool:
    return all(_is_list(point) and len(point) == 2 for point in shape)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
