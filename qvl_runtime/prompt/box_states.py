"""Where an answer with boxes stands, and what is found once for all answers with the same rules."""

from __future__ import annotations

from typing import NamedTuple

from qvl_runtime.prompt.box_places import Within
from qvl_runtime.prompt.box_rules import BoxRules
from qvl_runtime.prompt.box_spelling import BoxSpelling, Ids
from qvl_runtime.prompt.token_mask import Mask

STATES = 1 << 14  # outside shapes, whose legal tokens are kept: some MB; they share few masks


class State(NamedTuple):
    """Where an answer stands."""

    used: int = 0  # tokens of the answer
    boxes: int = 0  # complete ones
    label: int | None = None  # tokens of the label that is open
    labeled: bool = False  # since the last label there is nothing but its boxes
    owed: bool = False  # that label has no box yet
    text: bool = False  # there is text since the last box, or before the first
    tail: bytes = b""  # the end of this text that may become a tag
    within: Within | None = None  # a box or quad


class Legal(NamedTuple):
    """What may come next in a state outside a shape."""

    ids: Ids  # single tokens
    text: bool  # besides those of text
    mask: Mask  # all of them, not to be changed
    done: bool  # nothing but the end


class Table:
    """What all answers with the same rules have in common; kept by the spelling, so that it is made once."""

    def __init__(self, spelling: BoxSpelling, rules: BoxRules, ends: Ids) -> None:
        self.is_end = frozenset(ends)
        self.longest = max(spelling.box.longest, spelling.quad.longest if rules.quads else 0)
        self.texts: dict[tuple[bool, bytes], Mask] = {}
        self.masks: dict[tuple[Ids, bool, bool, bytes], Mask] = {}  # of text and single tokens
        self.legal: dict[State, Legal] = {}  # `used` is what may still come, up to `far`
        # With more tokens left than this, how many there are makes no difference: the most that `_reserve` returns
        # outside a shape, and what the longest shape or a label with its tags takes before that.
        self.far = (max(1, rules.least) * spelling.box.longest + 3) + max(self.longest, 3)
        self.enough = rules.least if rules.most is None else rules.most  # boxes from which more make no difference
