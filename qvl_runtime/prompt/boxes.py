"""Parse boxes in the model's output, `<ref>label</ref><box>(x1,y1),(x2,y2)</box>`.

Coordinates are on a 0-1000 grid over the width and height of the *original* image. The model's output may be malformed
(an unclosed box, swapped corners, a box repeated endlessly); the tolerant parser reads what it can, the strict one
raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from qvl_runtime.errors import PromptError, quoted

SCALE = 1000
"""Coordinates run from 0 to this, whatever the size of the image."""

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BoxScores:
    """How sure the model is of one box, by its own probabilities, before masks and penalties."""

    presence: float  # probability of the start tag where it stands, against everything else that could come there
    normalized: float  # geometric mean of the probabilities of its digits and of where its numbers end, in the grammar
    logprob: float  # natural logarithm of the probability of this very box, given that there is one
    expectation: tuple[float, ...]  # of each coordinate, on the grid: x1, y1, x2, y2, or of a quad's points in order
    spread: tuple[float, ...]  # standard deviation of each
    confidence: float | None = None  # probability of an IoU of at least 0.5, if the checkpoint has a calibration


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the 0-1000 grid of an image; 0 <= x1 <= x2 <= 1000 and 0 <= y1 <= y2 <= 1000."""

    label: str | None
    x1: int
    y1: int
    x2: int
    y2: int
    image_index: int | None = None  # index of the image in the prompt; None: unknown
    score: float | None = None  # 0 to 1; None: not computed
    quad: tuple[Point, ...] | None = None  # the four corners, if the model wrote a <quad>
    span: tuple[int, int] | None = field(default=None, compare=False, repr=False)  # its characters in the text
    details: BoxScores | None = field(default=None, compare=False, repr=False)  # how sure the model is of it

    def __post_init__(self) -> None:
        if not (0 <= self.x1 <= self.x2 <= SCALE and 0 <= self.y1 <= self.y2 <= SCALE):
            raise PromptError(
                f"box {quoted((self.x1, self.y1, self.x2, self.y2))} is not a rectangle on the grid; "
                f"expected 0 <= x1 <= x2 <= {SCALE} and 0 <= y1 <= y2 <= {SCALE}"
            )

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Corners (left, top, right, bottom) in pixels of an image of this size, rounded down as in the original."""
        (left, top), (right, bottom) = (_to_pixels(p, width, height) for p in ((self.x1, self.y1), (self.x2, self.y2)))
        return left, top, right, bottom

    def corners(self, width: int, height: int) -> list[Point]:
        """Four corner points in pixels: those of the quad if it has one, else clockwise from the top left."""
        x1, y1, x2, y2 = self.x1, self.y1, self.x2, self.y2
        points = self.quad or ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
        return [_to_pixels(point, width, height) for point in points]


def _to_pixels(point: Point, width: int, height: int) -> Point:
    return int(point[0] / SCALE * width), int(point[1] / SCALE * height)


def check_on_grid(numbers: Sequence[int], name: str = "box") -> None:
    """Raise `PromptError` unless the coordinates of a box are a rectangle on the grid, or those of a quad on it."""
    if name == "box":
        x1, y1, x2, y2 = numbers
        Box(None, x1, y1, x2, y2)
    elif not all(0 <= number <= SCALE for number in numbers):
        raise PromptError(f"quad {quoted(list(numbers))} is not on the grid; expected coordinates from 0 to {SCALE}")


_TAG = re.compile(
    r"<(?P<name>ref|box|quad)>(?P<text>.*?)(?:(?P<end></(?P=name)>)|(?=<(?:ref|box|quad)>)|\Z)", re.DOTALL
)
_STRAY = re.compile(r"</?(?:ref|box|quad)>")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")  # \d matches full-width digits, which float() reads
_COORDINATES = re.compile(r"[\s\d.,;()\[\]（），；+-]*")
_STRICT_POINTS = re.compile(r"\([0-9]+,[0-9]+\)(?:,\([0-9]+,[0-9]+\))*")
_NUMBERS = {"box": 4, "quad": 8}


def parse_boxes(text: str, strict: bool = False, image_index: int | None = None) -> list[Box]:
    """All boxes of an answer in order, each with the label of the last `<ref>` before it.

    Tolerant by default: whitespace, full-width digits and decimals are accepted, corners sorted, coordinates clipped
    to 0..1000, and decimals that are all at most 1 are taken for fractions of the sides and scaled to 1000; a box
    without an end tag is accepted if its numbers are complete, an unreadable one is skipped, and exact repetitions are
    dropped. With `strict`, each of these raises `PromptError`, except repetitions, which are kept. A quad becomes its
    bounding box and keeps its corners.
    """
    if strict:
        _require_closed_tags(text)
    boxes: list[Box] = []
    label: str | None = None
    for tag in _TAG.finditer(text):
        if tag["name"] == "ref":
            label = tag["text"].strip() or None
        elif strict:
            boxes.append(_read_strictly(tag, label, image_index))
        elif (numbers := _read_tolerantly(tag)) is not None:
            boxes.append(_box(numbers, label, image_index, tag.span()))
    return boxes if strict else list(dict.fromkeys(boxes))


def _read_tolerantly(tag: re.Match[str]) -> list[int] | None:
    """Coordinates clipped to the grid, or None if they cannot be read."""
    content = tag["text"]
    readable = _COORDINATES.match(content)
    if readable is None or (tag["end"] and readable.end() < len(content)):
        return None
    # Unlike int, float accepts the endless digits of a runaway answer.
    numbers = _NUMBER.findall(readable[0])
    exact = [min(max(float(number), 0), SCALE) for number in numbers]
    if "." in readable[0] and all(float(number) <= 1 for number in numbers):  # fractions of the image's sides
        exact = [round(value * SCALE) for value in exact]
    values = [int(value) for value in exact]
    if len(values) != _NUMBERS[tag["name"]]:
        return None
    if len(values) == 4:
        (x1, x2), (y1, y2) = sorted(values[::2]), sorted(values[1::2])
        return [x1, y1, x2, y2]
    return values


def _read_strictly(tag: re.Match[str], label: str | None, image_index: int | None) -> Box:
    content, expected = tag["text"], _NUMBERS[tag["name"]]
    values = [int(number[:9]) for number in _NUMBER.findall(content)] if _STRICT_POINTS.fullmatch(content) else []
    if len(values) != expected:
        points = ",".join(f"(x{n},y{n})" for n in range(1, expected // 2 + 1))
        raise PromptError(f"{tag['name']} {content[:60]!r} is malformed; expected {points} in whole numbers")
    return _box(values, label, image_index, tag.span())


def _box(values: list[int], label: str | None, image_index: int | None, span: tuple[int, int]) -> Box:
    if len(values) == 4:
        x1, y1, x2, y2 = values
        return Box(label, x1, y1, x2, y2, image_index, span=span)
    xs, ys = values[::2], values[1::2]
    return Box(label, min(xs), min(ys), max(xs), max(ys), image_index, quad=tuple(zip(xs, ys, strict=True)), span=span)


def _require_closed_tags(text: str) -> None:
    rest = _TAG.sub(lambda tag: " " if tag["end"] else tag[0], text)  # so that what is around it does not join
    if stray := _STRAY.search(rest):
        raise PromptError(
            f"{stray[0]} before {rest[stray.end() :][:40]!r} has no matching tag; every start tag needs an end tag"
        )
