"""Boxes drawn on an image: one colour a label, and name tags that can be read on any ground."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qvl_runtime.prompt.boxes import Box
from qvl_runtime.prompt.fonts import INSTALL_HINT, Font, missing_glyphs, open_font, pick_font

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

# Twelve hues apart for most eyes, strong ones first; from the thirteenth label on they come round again.
PALETTE: tuple[Colour, ...] = (
    *((230, 25, 75), (60, 180, 75), (0, 110, 220), (255, 165, 0), (145, 30, 180), (0, 190, 200)),
    *((240, 50, 230), (170, 210, 0), (128, 70, 20), (255, 215, 0), (0, 100, 80), (250, 150, 170)),
)
_DARK: Colour = (0, 0, 0)
_LIGHT: Colour = (255, 255, 255)


class _Tag(NamedTuple):
    """A name tag ready to be drawn."""

    text: str
    font: Font
    ink: Rectangle  # what the text covers when drawn at (0, 0)
    colour: Colour


def draw_boxes(
    image: Image.Image, boxes: Iterable[Box], font: str | os.PathLike[str] | ImageFont.FreeTypeFont | None = None
) -> Image.Image:
    """A copy of an image, in RGB, with boxes and their labels drawn on it; the image itself stays as it is.

    Coordinates are per mille of this image's size, so it must be the whole image that the model was shown, at any
    resolution. Each label has a colour of its own; a box without one gets a colour and no tag. `font` is a font file or
    an open font; without it an installed font that has the glyphs is used. Where none has, a `UserWarning` says so and
    the tag shows what is left of the label, or the number of the box. `ConfigError` for a font that cannot be opened.
    """
    from PIL import ImageDraw

    boxes = list(boxes)
    canvas = image.convert("RGB")
    draw = ImageDraw.Draw(canvas)
    line = max(2, min(canvas.size) // 200)
    colours = list(_colours(boxes))
    for box, colour in zip(boxes, colours, strict=True):
        corners = box.corners(*canvas.size)
        outline = [*corners, corners[0], corners[1]]  # one side twice, so that the first corner is mitred too
        draw.line(outline, fill=_contrast(colour), width=line + 2, joint="curve")
        draw.line(outline, fill=colour, width=line, joint="curve")
    taken: list[Rectangle] = []
    for number, (box, colour) in enumerate(zip(boxes, colours, strict=True), start=1):
        if box.label is not None:
            tag = _tag(box.label, number, font, max(12, min(canvas.size) // 28), colour)
            place = _place(tag, box.pixels(*canvas.size), line, canvas.size, taken)
            _draw_tag(draw, tag, place)
            taken.append(place)
    return canvas


def _colours(boxes: Sequence[Box]) -> Iterator[Colour]:
    """One colour a label, in order of appearance; every box without a label counts as a label of its own."""
    seen: dict[object, Colour] = {}
    for number, box in enumerate(boxes):
        yield seen.setdefault(number if box.label is None else box.label, PALETTE[len(seen) % len(PALETTE)])


def _contrast(colour: Colour) -> Colour:
    """Black or white, whichever stands out more: equal at a relative luminance of 0.179 (WCAG 2, contrast ratio)."""
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    return _DARK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else _LIGHT


def _tag(
    label: str, number: int, font: str | os.PathLike[str] | ImageFont.FreeTypeFont | None, size: int, colour: Colour
) -> _Tag:
    if font is None:
        chosen, lacking = pick_font(label, size)
    else:
        chosen = open_font(font, size) if isinstance(font, (str, os.PathLike)) else font
        lacking = missing_glyphs(chosen, label)
    text = " ".join("".join(char for char in label if char not in lacking).split()) or str(number)
    if lacking:
        warnings.warn(
            f"no font here has the glyphs of {lacking!r}, so the label {label!r} is drawn as {text!r}: {INSTALL_HINT}",
            stacklevel=3,
        )
    left, top, right, bottom = chosen.getbbox(text)
    return _Tag(text, chosen, (int(left), int(top), int(right), int(bottom)), colour)


def _place(tag: _Tag, box: Rectangle, line: int, size: tuple[int, int], taken: Sequence[Rectangle]) -> Rectangle:
    """Where the tag goes: on the box, else in it, below it or beside it; inside the image, and off other tags."""
    pad = line + 1
    width, height = tag.ink[2] - tag.ink[0] + 2 * pad, tag.ink[3] - tag.ink[1] + 2 * pad
    left, top, right, bottom = box

    def fit(x: int, y: int) -> Rectangle:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        return x, y, x + width, y + height

    wanted = [fit(left, top - height), fit(left, top), fit(left, bottom), fit(right - width, top - height)]
    wanted += [fit(right - width, top), fit(right, top), fit(left - width, top)]
    wanted += [fit(left, top + step * height) for step in range(1, 8)]
    return next((spot for spot in wanted if not any(_overlap(spot, other) for other in taken)), wanted[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _draw_tag(draw: ImageDraw.ImageDraw, tag: _Tag, place: Rectangle) -> None:
    left, top, right, bottom = place
    draw.rectangle((left, top, right - 1, bottom - 1), fill=tag.colour, outline=_contrast(tag.colour))
    pad = (right - left - (tag.ink[2] - tag.ink[0])) // 2
    draw.text((left + pad - tag.ink[0], top + pad - tag.ink[1]), tag.text, font=tag.font, fill=_contrast(tag.colour))
