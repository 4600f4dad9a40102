"""Log probabilities of the tokens of a prompt, taken from its chunks as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvl_runtime.schedule.api import TokenLogprob
from qvl_runtime.schedule.numerics import numerics_error

LOGIT_BYTES = 64 * 2**20  # of logits in float32 that are computed at once


class PromptScores:
    """Collects the log probabilities of a prompt's tokens from `start` on. The first token of a prompt has none."""

    def __init__(self, token_ids: Sequence[int], start: int, top: int, vocab: int) -> None:
        """top: the number of alternatives for each token."""
        self._at_once = max(1, LOGIT_BYTES // (4 * vocab))
        self._ids, self._first, self._top = token_ids, max(1, start), top
        self._found: dict[int, TokenLogprob] = {}

    @property
    def next_index(self) -> int | None:
        """The index of the first token that is not scored: those before may come from a cache; None: all are scored."""
        index = self._first + len(self._found)
        return index if index < len(self._ids) else None

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those found so far, in order."""
        return tuple(self._found[index] for index in sorted(self._found))

    def take(self, position: int, count: int, logits_of: Callable[[Sequence[int]], Tensor]) -> None:
        """Score what follows each of the `count` tokens from `position` on, which a step has computed.

        logits_of: takes indices among these tokens, and returns their logits [m, vocab]. Raises `NumericsError`.
        """
        end = min(position + count + 1, len(self._ids))
        indices = [index for index in range(max(position + 1, self._first), end) if index not in self._found]
        for start in range(0, len(indices), self._at_once):
            some = indices[start : start + self._at_once]
            self._score(some, logits_of([index - 1 - position for index in some]).float())

    def _score(self, indices: Sequence[int], logits: Tensor) -> None:
        ids = [self._ids[index] for index in indices]
        every = logits.log_softmax(-1)  # of each row by itself; `logsumexp` of a single row differs from that of many
        logprobs = every.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
        damaged = logprobs.isnan().nonzero()[:, 0]
        if len(damaged):
            raise numerics_error(logits[damaged[0]])
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
        if self._top:
            best = logits.topk(min(self._top, logits.shape[1])).indices
            pairs = zip(best.tolist(), every.gather(1, best).tolist(), strict=True)
            tops = [tuple(zip(tokens, found, strict=True)) for tokens, found in pairs]
        for index, token, logprob, top in zip(indices, ids, logprobs.tolist(), tops, strict=True):
            self._found[index] = TokenLogprob(token, logprob, top)
