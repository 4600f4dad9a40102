"""Scores of nano's scenes: drawn pictures of few things, which the checkpoint that ships with the package knows.

An object counts as recalled when the answer names it; only then is its box scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.evaluate.scoring import Answer, Context, Mark, Metric

QUESTIONS = ("count", "color", "shape", "relation", "exists")
GROUNDED = re.compile(r"<ref>([^<]*)</ref><box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
MIN_OVERLAPS = (0.5, 0.9)  # of boxes: the usual one, which nearly all reach, and one that fewer do


def scene_marks(sort: str, expected: str, reply: str) -> Iterator[tuple[str, bool]]:
    """What is right of a reply, by name of the rate; sort: of the question, such as "caption" or "number"."""
    if sort in ("caption", "box"):
        boxes, right_boxes = grounded_boxes(reply), grounded_boxes(expected)
        for name, box in right_boxes.items():
            yield f"{sort}: object recalled", name in boxes
            if name in boxes:
                overlap = iou(boxes[name], box)
                for bar in MIN_OVERLAPS:
                    yield f"{sort}: box IoU >= {bar}", overlap >= bar
        for name in boxes if sort == "caption" else ():
            yield "caption: name is right", name in right_boxes
    elif sort == "number":
        yield "number: whole", reply == expected
        for i, digit in enumerate(expected):
            yield "number: digit", reply[i : i + 1] == digit
    else:
        right = after_boxes(reply) == after_boxes(expected)
        yield sort, right
        if sort in QUESTIONS:
            yield "questions, all", right


def grounded_boxes(text: str) -> dict[str, tuple[float, float, float, float]]:
    """Name to box of a grounded answer; what is malformed is skipped."""
    boxes: dict[str, tuple[float, float, float, float]] = {}
    for name, *corners in GROUNDED.findall(text):
        x1, y1, x2, y2 = map(int, corners)
        boxes[name] = (x1, y1, x2, y2)
    return boxes


def after_boxes(text: str) -> str:
    """The text after the boxes: "left" of `<ref>..</ref><box>..</box>left`; most answers do not point."""
    return text.rpartition("</box>")[2]


def _marks(answers: list[Answer], context: Context) -> list[Mark]:
    return [
        Mark(name, answer.sample.picture, float(right), answer.number)
        for answer in answers
        for name, right in scene_marks(answer.sample.part, answer.sample.references[0], answer.text)
    ]


SCENES = Metric("questions, all", lambda answers, context: _marks([*answers], context), str)
