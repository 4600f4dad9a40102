"""Scores of a model on fresh scenes: the questions, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qvl_runtime.evaluate.metrics.scenes import scene_marks

from .dialogue import Turn, turns
from .scenes import SceneConfig, draw_scene

EVALUATION_SEED = 10_000_019  # training draws from seeds [seed, rank, step]; these scenes are never trained on
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
    """Add what is right of a reply, as `qvl evaluate` scores scenes."""
    for name, right in scene_marks(turn.sort, turn.answer, reply):
        tally.add(name, right)
