"""Find what a phrase names in an image, and score given boxes: the likelihoods of boxes after one computed prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING

import torch

from qvl_runtime.engine.arguments import checked_list
from qvl_runtime.engine.beams import likeliest_boxes
from qvl_runtime.engine.prefix import Prefix
from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.box_calibration import BoxJudge
from qvl_runtime.prompt.box_grammar import BoxGrammar
from qvl_runtime.prompt.box_scores import ONE_BOX
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.images import LoadedImage
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.runner import Chunk

if TYPE_CHECKING:
    from PIL import Image

MAX_BOXES = 32  # k
SAME = 0.7  # IoU from which two boxes are one answer
WIDER = 4  # beams for each box that is wanted: many end in the same place


@dataclass(frozen=True)
class Located:
    """Where a phrase is in an image. Of each box, `score` and `details` say how sure the model is."""

    phrase: str
    boxes: tuple[Box, ...]  # the likeliest first
    masses: tuple[float, ...]  # of each: probability, in the grammar, of the boxes found that are nearly this one
    presence: float  # probability that the model writes a box here rather than anything else
    image: LoadedImage = field(repr=False)

    def draw(self, font: str | PathLike[str] | None = None) -> Image.Image:
        """Return the image with the boxes drawn on it. Raises `ConfigError` for a font that cannot be read."""
        from qvl_runtime.prompt.drawing import draw_boxes

        return draw_boxes(self.image.original, list(self.boxes), font)


def check_number(k: int) -> None:
    """Raise `PromptError` for a number of boxes that cannot be searched for."""
    if type(k) is not int or not 1 <= k <= MAX_BOXES:
        raise PromptError(f"k is {quoted(k)}; expected 1 to {MAX_BOXES} boxes")


def locate(
    core: EngineCore,
    judge: BoxJudge,
    encoded: EncodedPrompt,
    phrase: str,
    k: int,
    cancellation: Cancellation = NEVER,
) -> Located:
    """Return up to k boxes after a prompt that ends in `<ref>phrase</ref>`, by beam search; k = 1 is greedy."""
    spelling, width = judge.spelling, 1 if k == 1 else WIDER * k
    length = spelling.box.longest
    core.check_length(len(encoded.token_ids) + length)
    vocab = core.runner.model.config.vocab_size
    grammar = BoxGrammar(spelling, replace(ONE_BOX, quads=False), vocab, (), length)
    with Prefix(core, encoded, 2 * width * (length + 16), cancellation) as prefix:
        presence = float(prefix.logits.softmax(-1)[spelling.box.start])
        width = min(width, max(1, prefix.at_once(length) // 2))  # while beams are replaced, there are twice as many
        found = likeliest_boxes(prefix, grammar, spelling.box.start, width)
        kept, masses = _distinct_boxes(judge, found, k)
        boxes = score_spellings(prefix, judge, phrase, kept)
    return Located(phrase, tuple(boxes), tuple(masses), presence, encoded.spans[-1].image)


def spelled_boxes(tokenizer: Tokenizer, boxes: Sequence[Box | Sequence[int]]) -> list[tuple[int, ...]]:
    """The token ids of given boxes [x1, y1, x2, y2]. Raises `PromptError` for one that the grammar would not write."""
    listed = checked_list("boxes", boxes, "boxes, as [[x1, y1, x2, y2]]")
    return [_spelled(tokenizer, (b.x1, b.y1, b.x2, b.y2) if isinstance(b, Box) else b) for b in listed]


def score_boxes(
    core: EngineCore,
    judge: BoxJudge,
    encoded: EncodedPrompt,
    phrase: str,
    spelled: Sequence[tuple[int, ...]],
    cancellation: Cancellation = NEVER,
) -> list[Box]:
    """Return boxes, given by `spelled_boxes`, with their scores, after a prompt that ends in `<ref>phrase</ref>`."""
    longest = max(map(len, spelled), default=1)
    core.check_length(len(encoded.token_ids) + longest)
    with Prefix(core, encoded, (longest + 16) * min(len(spelled), 64), cancellation) as prefix:
        return score_spellings(prefix, judge, phrase, spelled)


def score_spellings(prefix: Prefix, judge: BoxJudge, phrase: str, spelled: Sequence[Sequence[int]]) -> list[Box]:
    """Compute boxes, given as token ids from the start tag on, and score each; as many together as fit."""
    boxes: list[Box] = []
    size = prefix.at_once(judge.spelling.box.longest)
    for start in range(0, len(spelled), size):
        prefix.cancellation.check()
        boxes += _score_some(prefix, judge, phrase, spelled[start : start + size])
    return boxes


def _score_some(prefix: Prefix, judge: BoxJudge, phrase: str, spelled: Sequence[Sequence[int]]) -> list[Box]:
    runner, alphabet = prefix.core.runner, judge.spelling.alphabet
    forks = [prefix.fork() for _ in spelled]
    try:
        hidden = runner.run([Chunk(fork, ids[:-1]) for fork, ids in zip(forks, spelled, strict=True)])
        logits = prefix.checked(runner.model.logits(hidden))
    finally:
        for fork in forks:
            fork.close()
    normalizers = logits.logsumexp(-1)
    targets = torch.tensor([token for ids in spelled for token in ids[1:]], device=logits.device)
    logprobs = iter((logits.gather(1, targets[:, None])[:, 0] - normalizers).tolist())
    rows = iter((logits[:, list(alphabet)] - normalizers[:, None]).tolist())
    first = prefix.logits.log_softmax(-1)
    boxes = []
    for ids in spelled:
        own = [float(first[ids[0]]), *(next(logprobs) for _ in ids[1:])]
        among = [None, *(dict(zip(alphabet, next(rows), strict=True)) for _ in ids[1:])]
        (box,) = parse_boxes(judge.spelling.tokenizer.decode(list(ids)), image_index=0)
        score = math.exp(math.fsum(own) / len(own))
        boxes.append(replace(box, label=phrase, score=score, details=judge.judge(ids, own, among), span=None))
    return boxes


def _spelled(tokenizer: Tokenizer, corners: Sequence[int]) -> tuple[int, ...]:
    """The token ids of a box. Raises `PromptError` for one that the grammar would not write."""
    numbers = list(corners) if isinstance(corners, (list, tuple)) else []
    if len(numbers) != 4 or not all(type(number) is int for number in numbers):
        raise PromptError(f"box {quoted(corners)} is not a box; expected [x1, y1, x2, y2] in whole numbers, 0 to 1000")
    x1, y1, x2, y2 = numbers
    if not (0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000):
        raise PromptError(f"box {quoted(numbers)} has no area on the grid; expected x1 < x2 and y1 < y2, 0 to 1000")
    return tuple(tokenizer.encode(f"<box>({x1},{y1}),({x2},{y2})</box>", "grounding"))


def _distinct_boxes(
    judge: BoxJudge, found: Sequence[tuple[tuple[int, ...], float]], k: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """The likeliest k that are apart from one another, and for each the probability of all that are near it."""
    kept: list[tuple[tuple[int, ...], Box]] = []
    masses: list[float] = []
    for ids, logprob in found:
        (box,) = parse_boxes(judge.spelling.tokenizer.decode(list(ids)))
        near = next((i for i, (_, other) in enumerate(kept) if overlap(box, other) >= SAME), None)
        if near is not None:
            masses[near] += math.exp(logprob)
        else:
            kept.append((ids, box))
            masses.append(math.exp(logprob))
    order = sorted(range(len(kept)), key=lambda i: -masses[i])[:k]
    return [kept[i][0] for i in order], [masses[i] for i in order]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes on the grid."""
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    common = max(0, width) * max(0, height)
    areas = [(box.x2 - box.x1) * (box.y2 - box.y1) for box in (one, other)]
    return common / union if (union := sum(areas) - common) > 0 else 0.0
