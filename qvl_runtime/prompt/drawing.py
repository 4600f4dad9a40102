"""Draw boxes on an image: one color per label, and name tags that are readable on any background."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.prompt.boxes import Box
from qvl_runtime.prompt.fonts import INSTALL_HINT, Font, missing_glyphs, open_font, pick_font

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

# Twelve colors that most people can tell apart, strong ones first; reused from the thirteenth label on.
PALETTE: tuple[Color, ...] = (
    *((230, 25, 75), (60, 180, 75), (0, 110, 220), (255, 165, 0), (145, 30, 180), (0, 190, 200)),
    *((240, 50, 230), (170, 210, 0), (128, 70, 20), (255, 215, 0), (0, 100, 80), (250, 150, 170)),
)
_DARK: Color = (0, 0, 0)
_LIGHT: Color = (255, 255, 255)


class _Tag(NamedTuple):
    """A name tag ready to draw."""

    text: str
    font: Font
    ink: Rectangle  # the area that the text covers when drawn at (0, 0)
    color: Color


def draw_boxes(
    image: Image.Image, boxes: Iterable[Box], font: str | os.PathLike[str] | ImageFont.FreeTypeFont | None = None
) -> Image.Image:
    """Draw boxes and their labels on an RGB copy of an image; the image itself is not changed.

    Coordinates are relative to the image, so it must be the whole image that the model saw, at any resolution. Each
    label has its own color; a box without a label has a color but no tag. `font` is a font file or an open font; by
    default, an installed font that has the glyphs is used. If none has, a `UserWarning` is issued and the tag shows
    the rest of the label, or the number of the box. Raises `ConfigError` if the font cannot be opened.
    """
    from PIL import ImageDraw

    boxes = list(boxes)
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    line = max(2, min(canvas.size) // 200)
    colors = list(_colors(boxes))
    for box, color in zip(boxes, colors, strict=True):
        corners = box.corners(*canvas.size)
        outline = [*corners, corners[0], corners[1]]  # the first side twice, so that the first corner is mitered, too
        draw.line(outline, fill=_contrast(color), width=line + 2, joint="curve")
        draw.line(outline, fill=color, width=line, joint="curve")
    taken: list[Rectangle] = []
    for number, (box, color) in enumerate(zip(boxes, colors, strict=True), start=1):
        if box.label is not None:
            tag = _tag(box.label, number, font, max(12, min(canvas.size) // 28), color)
            place = _place(tag, box.pixels(*canvas.size), line, canvas.size, taken)
            _draw_tag(draw, tag, place)
            taken.append(place)
    return canvas


def _colors(boxes: Sequence[Box]) -> Iterator[Color]:
    """One color per label, in order of appearance; each box without a label gets its own."""
    seen: dict[object, Color] = {}
    for number, box in enumerate(boxes):
        yield seen.setdefault(number if box.label is None else box.label, PALETTE[len(seen) % len(PALETTE)])


def _contrast(color: Color) -> Color:
    """Black or white, whichever has more contrast; equal at a relative luminance of 0.179 (WCAG 2, contrast ratio)."""
    red, green, blue = ((value / 255) ** 2.2 for value in color)
    return _DARK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _LIGHT


def _tag(
    label: str, number: int, font: str | os.PathLike[str] | ImageFont.FreeTypeFont | None, size: int, color: Color
) -> _Tag:
    if font is None:
        chosen, missing = pick_font(label, size)
    else:
        chosen = open_font(font, size) if isinstance(font, (str, os.PathLike)) else font
        missing = missing_glyphs(chosen, label)
    text = " ".join("".join(char for char in label if char not in missing).split()) or str(number)
    if missing:
        warnings.warn(
            f"no font here has the glyphs {missing!r}, so the label {label!r} is drawn as {text!r}: {INSTALL_HINT}, "
            "or pass font=FILE",
            stacklevel=3,
        )
    left, top, right, bottom = chosen.getbbox(text)
    return _Tag(text, chosen, (int(left), int(top), int(right), int(bottom)), color)


def _place(tag: _Tag, box: Rectangle, line: int, size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Position of the tag: above the box, else inside, below or next to it; in the image, clear of other tags."""
    pad = line + 1
    width, height = tag.ink[2] - tag.ink[0] + 2 * pad, tag.ink[3] - tag.ink[1] + 2 * pad
    left, top, right, bottom = box

    def fit(x: int, y: int) -> Rectangle:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        return x, y, x + width, y + height

    candidates = [fit(left, top - height), fit(left, top), fit(left, bottom), fit(right - width, top - height)]
    candidates += [fit(right - width, top), fit(right, top), fit(left - width, top)]
    candidates += [fit(left, top + step * height) for step in range(1, 8)]
    return next((spot for spot in candidates if not any(_overlap(spot, other) for other in taken)), candidates[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _draw_tag(draw: ImageDraw.ImageDraw, tag: _Tag, place: Rectangle) -> None:
    left, top, right, bottom = place
    draw.rectangle((left, top, right - 1, bottom - 1), fill=tag.color, outline=_contrast(tag.color))
    pad = (right - left - (tag.ink[2] - tag.ink[0])) // 2
    draw.text((left + pad - tag.ink[0], top + pad - tag.ink[1]), tag.text, font=tag.font, fill=_contrast(tag.color))
