"""Prompt lookup: propose as draft tokens what followed an earlier occurrence of the latest n-gram.

Saxena 2023, "Prompt Lookup Decoding". The model verifies a draft in one step. Every position is
sampled as usual, and draft tokens are accepted up to the first that differs from the sample. Greedy decoding so yields
the tokens that it yields without drafts. With sampling this is rejection sampling (Leviathan et al. 2023) for a draft
without a distribution: a token is accepted with the model's probability of it, else replaced by a sample of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Drafter:
    """Searches prompt and answer for their last n-gram, n from `max_ngram` down to `min_ngram`, latest match first."""

    length: int  # tokens of a draft
    max_ngram: int = 4
    min_ngram: int = 2
    window: int = 4096  # tokens searched, counted from the end
    proposed: int = 0
    accepted: int = 0

    def propose(self, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Return the tokens that followed the match, at most `length` and `max_tokens`; empty without a match."""
        count = min(self.length, max_tokens)
        if count < 1:
            return ()
        seen = tokens[-self.window :]
        last = seen[-1]
        ends = [i for i in range(len(seen) - 2, -1, -1) if seen[i] == last]
        for n in range(self.max_ngram, self.min_ngram - 1, -1):
            ngram = seen[-n:]
            for end in ends:
                if end + 1 >= n and seen[end + 1 - n : end + 1] == ngram:
                    return tuple(seen[end + 1 : end + 1 + count])
        return ()

    def count(self, proposed: int, accepted: int) -> None:
        """Count draft tokens for the acceptance rate of the report."""
        self.proposed += proposed
        self.accepted += accepted
