"""Scores of a model on fresh scenes: the questions, and what counts as right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .dialogue import Turn, turns
from .scenes import SceneConfig, draw_scene

EVALUATION_SEED = 10_000_019  # training draws from seeds [seed, rank, step]; these scenes are never trained on
QUESTIONS = ("count", "color", "shape", "relation", "exists")
GROUNDED = re.compile(r"<ref>([^<]*)</ref><box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
MIN_OVERLAPS = (0.5, 0.9)  # of boxes: the usual one, which nearly all reach, and one that two in five do
Answer = Callable[[np.ndarray, Sequence[int], Sequence[str]], list[str]]  # images, which, questions -> answers


@dataclass(slots=True)
class Tally:
    """Counts of right answers by name; `rates` gives shares, `sizes` how many each rests on."""

    right: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, right: bool) -> None:
        """Count one answer under `name`."""
        self.right[name] = self.right.get(name, 0) + right
        self.sizes[name] = self.sizes.get(name, 0) + 1

    @property
    def rates(self) -> dict[str, float]:
        """Shares of right answers by name."""
        return {name: self.right[name] / self.sizes[name] for name in sorted(self.sizes)}


def score(
    answer: Answer, config: SceneConfig, scenes: int, seed: int = EVALUATION_SEED, chinese: bool = False
) -> Tally:
    """Ask every question of every scene, each as a first turn, and count."""
    total = Tally()
    for tally in score_each(answer, config, scenes, seed, chinese):
        for name, size in tally.sizes.items():
            total.right[name] = total.right.get(name, 0) + tally.right[name]
            total.sizes[name] = total.sizes.get(name, 0) + size
    return total


def score_each(
    answer: Answer, config: SceneConfig, scenes: int, seed: int = EVALUATION_SEED, chinese: bool = False
) -> list[Tally]:
    """The tally of each scene, for paired comparisons of two checkpoints."""
    rng = np.random.default_rng(seed)
    images, which, all_turns = [], [], []
    for i in range(scenes):
        image, things = draw_scene(rng, config)
        scene_turns = turns(rng, things, chinese)
        images.append(image)
        all_turns += scene_turns
        which += [i] * len(scene_turns)
    replies = answer(np.stack(images), which, [turn.question for turn in all_turns])
    tallies = [Tally() for _ in range(scenes)]
    for i, turn, reply in zip(which, all_turns, replies, strict=True):
        count(tallies[i], turn, reply)
    return tallies


def count(tally: Tally, turn: Turn, reply: str) -> None:
    """An object counts as recalled when the reply names it; only then is its box scored."""
    if turn.sort in ("caption", "box"):
        boxes, expected = parse(reply), parse(turn.answer)
        for name, box in expected.items():
            tally.add(f"{turn.sort}: object recalled", name in boxes)
            if name in boxes:
                overlap = iou(boxes[name], box)
                for bar in MIN_OVERLAPS:
                    tally.add(f"{turn.sort}: box IoU >= {bar}", overlap >= bar)
        for name in boxes if turn.sort == "caption" else ():
            tally.add("caption: name is right", name in expected)
    elif turn.sort == "number":
        tally.add("number: whole", reply == turn.answer)
        for i, digit in enumerate(turn.answer):
            tally.add("number: digit", reply[i : i + 1] == digit)
    else:
        right = after_boxes(reply) == after_boxes(turn.answer)
        tally.add(turn.sort, right)
        if turn.sort in QUESTIONS:
            tally.add("questions, all", right)


def parse(text: str) -> dict[str, tuple[int, ...]]:
    """Name to box of a grounded answer; what is malformed is skipped."""
    return {name: tuple(map(int, box)) for name, *box in GROUNDED.findall(text)}


def after_boxes(text: str) -> str:
    """The text after the boxes: "left" of `<ref>..</ref><box>..</box>left`; most answers do not point."""
    return text.rpartition("</box>")[2]


def iou(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, w) * max(0, h)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0
