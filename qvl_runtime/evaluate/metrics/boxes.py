"""Boxes of referring expressions: the first pair of corners in an answer, and its overlap with the right one."""

from __future__ import annotations

import math
import re

SCALE = 999  # what the original's evaluation divides by; its own drawing of boxes divides by 1000
THRESHOLD = 0.5  # of the overlap, for a box to count as right
Corners = tuple[float, float, float, float]  # x1, y1, x2, y2

_PAIR = re.compile(r"\((.*?)\),\((.*?)\)")
NONE: Corners = (0.0, 0.0, 0.0, 0.0)


def first_box(answer: str) -> Corners:
    """The corners of the first `(x1,y1),(x2,y2)` in an answer, as written; all 0, which hits nothing, without one."""
    if (match := _PAIR.search(answer)) is None:
        return NONE
    try:
        (x1, y1), (x2, y2) = ((float(number) for number in point.split(",")) for point in match.groups())
    except ValueError:
        return NONE
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else NONE


def in_pixels(box: Corners, width: float, height: float, scale: int = SCALE) -> Corners:
    """A box of the model's grid in pixels of an image of this size."""
    x1, y1, x2, y2 = box
    return x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height


def iou(one: Corners, other: Corners) -> float:
    """Intersection over union of two boxes; 0 where neither has an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - common
    return common / union if union > 0 else 0.0


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def box_accuracy(answer: str, box: Corners, width: float, height: float, scale: int = SCALE) -> float:
    """1 if the answer's box overlaps `box`, in pixels of the image of this size, by an IoU of at least 0.5; else 0."""
    return float(iou(in_pixels(first_box(answer), width, height, scale), box) >= THRESHOLD)
