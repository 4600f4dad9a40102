"""Ask a documented dialogue and compare: tokens, the overlap of boxes, the likelihood of the documented answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import PromptError
from qvl_runtime.evaluate.check.dialogues import Dialogue, Turn
from qvl_runtime.evaluate.metrics.boxes import iou
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.schedule.api import SamplingParams

CLOSE = 0.9  # overlap of boxes from which an answer that is not equal still counts as close
ROOM = 64  # tokens beyond those of the documented answer


@dataclass(frozen=True, slots=True)
class Compared:
    """A turn as documented and as answered here."""

    dialogue: str
    question: str
    expected: str
    answer: str
    tokens: int  # of the documented answer, the end included
    equal_tokens: int  # of them, that the answer begins with
    likeliest: int  # of them, that are the likeliest here after those before them
    logprob: float  # of the documented answer, mean over its tokens
    overlaps: tuple[float, ...]  # of each documented box with the answer's box at its place; empty without boxes

    @property
    def reproduced(self) -> bool:
        """Whether the answer is the documented one, token for token."""
        return self.equal_tokens == self.tokens

    @property
    def verdict(self) -> str:
        """What to say of it in a word or two."""
        if self.reproduced:
            return "reproduced, token for token"
        if self.overlaps and min(self.overlaps) >= CLOSE:
            return f"close: every box overlaps by at least {min(self.overlaps):.2f}"
        if self.overlaps:
            return f"differs: boxes overlap by {', '.join(f'{overlap:.2f}' for overlap in self.overlaps)}"
        return f"differs after {self.equal_tokens} of {self.tokens} tokens"


def compare_dialogue(engine: Engine, dialogue: Dialogue, picture: Any) -> list[Compared]:
    """Ask each turn greedily, after the documented answers to those before it.

    picture: anything that a prompt takes. Raises `ImageError` or `DownloadError` where it cannot be read.
    """
    source = dialogue.picture or picture
    if source is None:
        raise PromptError(f"the dialogue {dialogue.name} is about a picture: name a file or an address")
    compared: list[Compared] = []
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(dialogue.turns):
        parts = [{"image": source}] if number == 0 else []
        content = [*parts, {"text": turn.question}]
        messages.append({"role": "user", "content": content})
        prompt: Any = messages if dialogue.kind == "chat" else content
        compared.append(_compare(engine, dialogue.name, turn, prompt))
        messages.append({"role": "assistant", "content": turn.answer})
    return compared


def _compare(engine: Engine, name: str, turn: Turn, prompt: Any) -> Compared:
    tokenizer = engine.tokenizer
    end = tokenizer.endoftext if engine.defaults.chat_format == "raw" else tokenizer.im_end
    expected = [*tokenizer.encode(turn.answer, "grounding"), end]
    reply = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=len(expected) + ROOM))[0]
    pairs = zip(expected, reply.token_ids, strict=False)
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    scored = engine.score_continuations(prompt, [expected], top=1)[0]
    return Compared(
        name,
        turn.question,
        turn.answer,
        reply.text,
        len(expected),
        equal,
        sum(entry.top[0][0] == entry.token_id for entry in scored),
        sum(entry.logprob for entry in scored) / len(scored),
        _overlaps(parse_boxes(turn.answer), list(reply.boxes)),
    )


def _overlaps(expected: Sequence[Box], found: Sequence[Box]) -> tuple[float, ...]:
    """The overlap of each documented box with the box at the same place of the answer; 0 where there is none."""
    corners = [(box.x1, box.y1, box.x2, box.y2) for box in found]
    none = (0, 0, 0, 0)
    return tuple(
        iou((box.x1, box.y1, box.x2, box.y2), corners[at] if at < len(corners) else none)
        for at, box in enumerate(expected)
    )
