"""What may come next in an answer: the protocol of constraints, which the samplers, drafts and forks use.

A constraint belongs to one answer. It follows the tokens that the answer takes; those of drafts are only looked at.
When a request is preempted, it keeps its constraints, as it keeps its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from qvl_runtime.errors import ConstraintError
from qvl_runtime.prompt.token_mask import Mask, all_of, mask_of, remove


class Constraint(Protocol):
    """Which tokens may continue one answer. Tokens that end the answer are in the mask where it may end."""

    @property
    def done(self) -> bool:
        """Whether nothing may follow: the answer ends here, without a token that says so."""
        ...

    def mask(self) -> Mask:
        """The bitset int32 [ceil(vocab / 32)] of the tokens that may come next, not to be changed.

        One that is read-only is known to have some, and may be shared. Raises `ConstraintError` if it cannot be
        computed; that is then the error of this answer's request alone.
        """
        ...

    def advance(self, token: int) -> bool:
        """Append a token that the answer takes; False if it may not come next."""
        ...

    def accepts(self, tokens: Iterable[int]) -> int:
        """How many of these tokens may come next, in order. Nothing is appended."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back."""
        ...

    def fork(self) -> Constraint:
        """Return a copy that is continued independently."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, in order; empty where there is a choice, or only the end."""
        ...


Constrain = Callable[[frozenset[int], int], Constraint]
"""Begins the constraint of an answer, given the tokens that end it and how many tokens it may have."""


class Allowed:
    """The tokens that one answer may take at each position: by its constraint, `min_tokens` and forbidding biases.

    The constraint comes first. Of its tokens, those that the others rule out are left out unless none would be left.
    """

    def __init__(
        self, vocab: int, constraint: Constraint | None, end_ids: Iterable[int], least: int, forbidden: Iterable[int]
    ) -> None:
        """least: tokens before the end; forbidden: tokens that biases rule out, looked at only under a constraint."""
        self.constraint = constraint
        self._vocab, self._least = vocab, least
        self._not_ends: Mask | None = None
        ends = [token for token in end_ids if token < vocab]
        if least and ends:
            self._not_ends = all_of(vocab)
            remove(self._not_ends, ends)
        forbidden = list(forbidden)
        self._not_forbidden = ~mask_of(forbidden, vocab) if forbidden and constraint is not None else None

    def masks(self, position: int, drafts: Iterable[int]) -> list[Mask | None]:
        """The tokens that may be at `position`, and after each of the drafts, which must be legal. None: all.

        Raises `ConstraintError` if there is none.
        """
        drafts = list(drafts)
        if self.constraint is None:
            return [self._not_ends if position + i < self._least else None for i in range(len(drafts) + 1)]
        if not drafts:
            return [self._mask(self.constraint, position)]
        masks: list[Mask | None] = []
        advanced = 0
        try:
            for i in range(len(drafts) + 1):
                ended = i > 0 and self.constraint.done  # by a draft: what is sampled after it is not taken
                masks.append(None if ended else self._mask(self.constraint, position + i))
                if i < len(drafts) and self.constraint.advance(drafts[i]):
                    advanced += 1
        finally:
            self.constraint.rollback(advanced)
        return masks

    def _mask(self, constraint: Constraint, position: int) -> Mask:
        mask = constraint.mask()
        others = (self._not_ends if position < self._least else None, self._not_forbidden)
        for other in others:
            if other is not None and (narrower := np.bitwise_and(mask, other)).any():
                mask = narrower
        if mask.flags.writeable and not mask.any():
            raise ConstraintError(
                f"the constraint leaves no token for position {position} of the answer, and does not let it end there"
            )
        return mask
