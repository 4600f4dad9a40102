"""Prompt lookup: drafts of the next tokens, taken from where the last ones were seen before.

Saxena 2023, "Prompt Lookup Decoding". A draft is verified by the model in one step. Every position is sampled as if it
stood alone, and drafts are kept as long as they are what was sampled: for greedy decoding that is the token which
would have come anyway, and for a draft without a distribution of its own it is rejection sampling (Leviathan et al.
2023): accepted with the model's probability of it, else replaced by a draw from the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Drafter:
    """Looks for the last n tokens of prompt and answer, n from `longest` down to `shortest`, the latest match first."""

    length: int  # tokens of a draft
    longest: int = 4
    shortest: int = 2
    window: int = 4096  # tokens searched, counted from the end
    proposed: int = 0
    accepted: int = 0

    def propose(self, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        """At most `length` and at most `room` tokens that followed then; empty where there is no match."""
        room = min(self.length, room)
        if room < 1:
            return ()
        seen = tokens[-self.window :]
        last = seen[-1]
        ends = [i for i in range(len(seen) - 2, -1, -1) if seen[i] == last]
        for n in range(self.longest, self.shortest - 1, -1):
            wanted = seen[-n:]
            for end in ends:
                if end + 1 >= n and seen[end + 1 - n : end + 1] == wanted:
                    return tuple(seen[end + 1 : end + 1 + room])
        return ()

    def count(self, proposed: int, accepted: int) -> None:
        """For the share of drafts that hold, said in the report."""
        self.proposed += proposed
        self.accepted += accepted
