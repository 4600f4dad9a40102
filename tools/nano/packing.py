"""Scenes to training rows: one image carries all its dialogues, which see the shared prefix but not each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.prompt.tokenizer import Tokenizer

from .dialogue import GREETINGS, Turn, about_two, turns
from .practice import crowded, practice
from .probe import Labels, dense_labels
from .scenes import SceneConfig, Thing, draw_scene

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK, NEXT, END, END_OF_TEXT = (
    "<|im_end|>\n<|im_start|>assistant\n",
    "\n<|im_start|>user\n",
    "<|im_end|>",
    "<|endoftext|>",
)
DIGIT_WEIGHTS = (1.5, 1.0, 0.2)  # hundreds, tens, units of a coordinate: one unit is a seventh of a pixel, noise
CHAINED, RAW, CHINESE, PAIRS = 0.25, 0.12, 0.2, 0.5  # shares of rows (PAIRS: of batches) of each sort


class Batch(NamedTuple):
    """The arrays of one training step."""

    images: np.ndarray  # uint8 [P, S, S, 3]
    ids: np.ndarray  # int64 [R, T]
    weights: np.ndarray  # float32 [R, T]: of predicting the NEXT id
    positions: np.ndarray  # int64 [R, T]
    segments: np.ndarray  # int64 [R, T]: 0 shared prefix, k the k-th dialogue, -1 padding
    slots: np.ndarray  # int64 [K, 3]: row, first position, image
    at_patch: Labels
    at_token: Labels


@dataclass(slots=True)
class Row:
    """A row under construction. A chained row is one dialogue of several turns; else every turn is a first turn."""

    length: int
    chained: bool = False
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    prefix: int = 0

    def start(self, ids: list[int]) -> None:
        """Begin the row with the shared prefix."""
        self.prefix = len(ids)
        self._append(ids, [0.0] * len(ids), 0, 0)

    def add(self, question: list[int], answer: list[int], weights: list[float]) -> None:
        """Append a turn, if it fits. The position before an answer predicts its first id."""
        size = len(question) + len(answer)
        if len(self.ids) + size > self.length:
            return
        last = self.segments[-1]
        segment = 1 if self.chained else last + 1
        start = self.positions[-1] + 1 if self.chained else self.prefix
        self._append(question + answer, [0.0] * (len(question) - 1) + weights + [0.0], segment, start)

    def _append(self, ids: list[int], weights: list[float], segment: int, start: int) -> None:
        self.ids += ids
        self.weights += weights
        self.positions += range(start, start + len(ids))
        self.segments += [segment] * len(ids)


class Packer:
    """Draws scenes and packs their dialogues into rows of at most `length` ids."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        scenes: SceneConfig,
        length: int = 330,
        weak: float = 0.0,
        chinese: float = CHINESE,
    ) -> None:
        """weak: share of crowded images with the questions of `practice`; chinese: of Chinese questions."""
        self.tokenizer, self.scenes, self.length = tokenizer, scenes, length
        self.weak, self.chinese = weak, chinese
        self.visual = config.visual
        self.image = "<img></img>\n"  # which the tokenizer fills with pads
        self.grids = (config.visual.grid, math.isqrt(config.visual.n_queries))
        self.digits = set(tokenizer.encode("0123456789"))
        self.box_start, self.box_end = tokenizer.box_start, tokenizer.box_end

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens included."""
        return self.tokenizer.encode(text)

    def batch(self, rng: Generator, images: int) -> Batch:
        """Draw `images` scenes and pack them, sometimes with a pair of images or a greeting."""
        hard = [self.weak > 0 and rng.random() < self.weak for _ in range(images)]
        drawn = [draw_scene(rng, crowded(self.scenes) if h else self.scenes) for h in hard]
        scenes = [things for _, things in drawn]
        rows = [self._one(rng, things, h) for things, h in zip(scenes, hard, strict=True)]
        which = [[i] for i in range(images)]
        if rng.random() < PAIRS:
            first, second = (int(i) for i in rng.permutation(images)[:2])
            rows.append(self._two(rng, scenes[first], scenes[second]))
            which.append([first, second])
        if rng.random() < 0.15:
            rows.append(self._greeting(rng))
            which.append([])
        longest = max(len(r.ids) for r in rows)

        def table(values: list[list[int]] | list[list[float]], fill: int, dtype: type) -> np.ndarray:
            return np.array([v + [fill] * (longest - len(v)) for v in values], dtype=dtype)

        labels = [[dense_labels(things, grid) for things in scenes] for grid in self.grids]
        at_patch, at_token = (Labels(*(np.stack(f) for f in zip(*each, strict=True))) for each in labels)
        return Batch(
            np.stack([image for image, _ in drawn]),
            table([r.ids for r in rows], 0, np.int64),
            table([r.weights for r in rows], 0, np.float32),
            table([r.positions for r in rows], 0, np.int64),
            table([r.segments for r in rows], -1, np.int64),
            self._slots(rows, which),
            at_patch,
            at_token,
        )

    def _slots(self, rows: list[Row], which: list[list[int]]) -> np.ndarray:
        out = []
        for r, (row, images) in enumerate(zip(rows, which, strict=True)):
            starts = [i + 1 for i, t in enumerate(row.ids) if t == self.visual.image_start_id]
            out += [(r, start, p) for start, p in zip(starts, images, strict=True)]
        return np.array(out, dtype=np.int64).reshape(-1, 3)

    def _one(self, rng: Generator, things: list[Thing], hard: bool) -> Row:
        chinese, raw = rng.random() < self.chinese, rng.random() < RAW
        if hard:
            dialogue = practice(rng, things, chinese)
        else:
            dialogue = turns(rng, things, chinese)
            dialogue = [
                dialogue[0],
                *(dialogue[i] for i in 1 + rng.permutation(len(dialogue) - 1)),
            ]  # the caption always fits
        row = Row(self.length, chained=not raw and rng.random() < CHAINED)
        row.start(self.encode(("" if raw else SYSTEM) + "Picture 1:" + self.image))
        if row.chained:
            dialogue = [dialogue[i] for i in rng.permutation(len(dialogue))]
        for i, turn in enumerate(dialogue):
            self._add(row, turn, raw, opening=NEXT if row.chained and i else "")
        return row

    def _two(self, rng: Generator, first: list[Thing], second: list[Thing]) -> Row:
        """Both images at once, or the second one in the second turn."""
        chinese = rng.random() < self.chinese
        dialogue = about_two(rng, (first, second), chinese)
        dialogue = [dialogue[i] for i in rng.permutation(len(dialogue))]
        row = Row(self.length, chained=rng.random() < 0.4)
        if not row.chained:
            row.start(self.encode(SYSTEM + f"Picture 1:{self.image}Picture 2:{self.image}"))
        else:
            row.start(self.encode(SYSTEM + f"Picture 1:{self.image}"))
            short = [t for t in turns(rng, first, chinese) if t.sort not in ("caption", "describe")]
            self._add(row, short[int(rng.integers(len(short)))], False, "")
        for i, turn in enumerate(dialogue):
            opening = (NEXT if row.chained else "") + (f"Picture 2:{self.image}" if row.chained and i == 0 else "")
            self._add(row, turn, False, opening)
        return row

    def _greeting(self, rng: Generator) -> Row:
        """Greetings, without an image."""
        row = Row(self.length)
        row.start(self.encode(SYSTEM))
        for i in rng.permutation(len(GREETINGS)):
            self._add(row, Turn("greeting", *GREETINGS[i]), False, "")
        return row

    def _add(self, row: Row, turn: Turn, raw: bool, opening: str) -> None:
        after = ("" if turn.sort == "caption" else " Answer:") if raw else ASK
        answer = self.encode(turn.answer)
        weights = [*self._weights(answer, turn.sort), 0.5]
        row.add(
            self.encode(opening + turn.question + after), answer + self.encode(END_OF_TEXT if raw else END), weights
        )

    def _weights(self, answer: list[int], sort: str) -> list[float]:
        """Short answers count double; of a coordinate the hundreds most; punctuation is learned at once."""
        if sort in ("describe", "greeting"):
            return [1.0] * len(answer)
        if sort not in ("caption", "box", "relation"):
            return [2.0] * len(answer)
        weights, inside, run = [1.0] * len(answer), False, []
        if sort == "relation":  # the word after the boxes
            after = len(answer) - answer[::-1].index(self.box_end)
            weights[after:] = [3.0] * (len(answer) - after)
        for i, token in enumerate(answer):
            inside = inside or token == self.box_start
            if inside and token in self.digits:
                run.append(i)
                continue
            for place, j in enumerate(reversed(run)):  # units first
                weights[j] = DIGIT_WEIGHTS[2 - place]
            run = []
            if inside:
                weights[i] = 0.3
            inside = inside and token != self.box_end
        return weights
