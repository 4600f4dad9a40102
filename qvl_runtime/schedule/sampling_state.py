"""What one answer is sampled with: its parameters, and what they count of the tokens that it has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.errors import SamplingError, quoted
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.token_mask import Mask
from qvl_runtime.schedule.api import SamplingParams
from qvl_runtime.schedule.constraint import Allowed, Constraint


class SamplingState:
    """The sampling parameters and state of one answer.

    The random numbers are a function of seed and position in the answer only, so an answer does not depend on its
    neighbors in the batch, on preemption, or on drafts.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        vocab: int,
        device: torch.device,
        index: int = 0,
        end_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        spelling: BoxSpelling | None = None,
    ) -> None:
        """params: resolved; prompt_ids: already counted by the repetition penalty; index: of the answer, among n.

        end_ids: tokens that would end the answer, forbidden until it has `min_tokens`; constraint: on this answer;
        spelling: of boxes, to score them.
        """
        self.spelling, self._in_box = spelling, False
        out_of_range = [t for t in (*params.logit_bias, *params.stop_token_ids) if not 0 <= t < vocab]
        if out_of_range:
            raise SamplingError(
                f"token id {quoted(out_of_range[0])} is not in the vocabulary; expected 0 to {vocab - 1}"
            )
        ends = {token for token in end_ids if token < vocab} if params.min_tokens else set()
        forbidden = {token for token, bias in params.logit_bias.items() if bias == -math.inf}
        if len(forbidden | ends) == vocab:
            besides = ", and min_tokens those that end the answer" if ends - forbidden else ""
            raise SamplingError(f"logit_bias forbids every token of {vocab}{besides}: leave one without -inf")
        self.params = params
        self.penalty = params.repetition_penalty or 1.0
        self.seen: Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.bias: Tensor | None = None  # of the parameters, and less the presence and frequency penalties
        self._counts: Counter[int] | None = None  # of tokens in the answer, if these penalties need them
        if params.presence_penalty or params.frequency_penalty:
            self._counts = Counter()
        self.constraint = constraint
        self._biases = params.logit_bias
        if constraint is not None:  # which comes before what is forbidden here
            self._biases = {token: bias for token, bias in params.logit_bias.items() if bias != -math.inf}
        if self._biases or self._counts is not None:
            self.bias = torch.zeros(vocab, device=device)
        self.restore(prompt_ids, ())
        self._allowed = Allowed(vocab, constraint, ends, params.min_tokens, forbidden)
        self._seed = (randbits(63) if params.seed is None else params.seed) + index

    @property
    def foreseeable(self) -> bool:
        """Whether several positions may be sampled in one step. With a penalty, each depends on the previous ones."""
        return self.seen is None and self._counts is None

    def restore(self, prompt_ids: Iterable[int], answer_ids: Iterable[int]) -> None:
        """Have the penalties count these tokens and no other."""
        answer = list(answer_ids)
        if self.seen is not None:
            self.seen.zero_()
            self.seen[torch.tensor([*prompt_ids, *answer], dtype=torch.long, device=self.seen.device)] = True
        if self.bias is not None:
            biases = dict(self._biases)
            if self._counts is not None:
                self._counts = Counter(answer)
                biases |= {token: self._bias_of(token, n) for token, n in self._counts.items()}
            self.bias.zero_()
            self.bias[list(biases)] = torch.tensor(list(biases.values()), device=self.bias.device)

    @property
    def counts(self) -> bool:
        """Whether biases depend on how often the answer has a token."""
        return self._counts is not None

    def counted(self, token: int) -> float:
        """Count a token of the answer, and return the bias that it has from here on."""
        if self._counts is None:
            return self._biases.get(token, 0.0)
        self._counts[token] += 1
        return self._bias_of(token, self._counts[token])

    def _bias_of(self, token: int, n: int) -> float:
        """The bias of a token that the answer has n times, from the start, so that no rounding adds up."""
        params = self.params
        return self._biases.get(token, 0.0) - params.presence_penalty - n * params.frequency_penalty

    def rows(self, position: int, drafts: Sequence[int] = ()) -> list[SamplingRow]:
        """The rows for this position of the answer and the one after each of the drafts.

        Raises `ConstraintError` if the constraint leaves no token, or cannot tell.
        """
        masks, in_box = self._allowed.masks(position, drafts), self._in_box
        rows = [SamplingRow(self, position, masks[0], in_box)]
        for i, draft in enumerate(drafts, start=1):
            in_box = self._stays_in_box(in_box, draft)
            rows.append(SamplingRow(self, position + i, masks[i], in_box))
        return rows

    def take(self, token: int) -> None:
        """Follow a token that the answer takes into a box and out of it."""
        self._in_box = self._stays_in_box(self._in_box, token)

    def _stays_in_box(self, in_box: bool, token: int) -> bool:
        if self.spelling is None:
            return False
        return token in self.spelling.shapes or (in_box and token not in self.spelling.ends)

    def draft(
        self, proposed: Callable[[], tuple[int, ...]], most: int, least_forced: int = 1
    ) -> tuple[tuple[int, ...], bool]:
        """Draft tokens for the next positions, and whether they are forced: then they are what will be sampled.

        proposed: asked where nothing is forced, and cut at the first token that may not be there; most: at most;
        least_forced: tokens that must be forced in a row to be worth a step of several.
        """
        if self.constraint is None:
            return proposed(), False
        forced = self.constraint.forced()[: max(0, most)]
        if forced and len(forced) >= least_forced:
            return tuple(forced), True
        drafts = proposed()
        return drafts[: self.constraint.accepts(drafts)] if drafts else drafts, False

    def uniform(self, position: int) -> float:
        """Return the random number in [0, 1) for this position of the answer."""
        digest = blake2b(b"%d/%d" % (self._seed, position), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


class SamplingRow(NamedTuple):
    """The sampling state of the answer that a row of logits belongs to, and the position there of the next token."""

    state: SamplingState
    position: int
    allowed: Mask | None = None  # the tokens that may be there; None: all
    in_box: bool = False  # whether the position is within a box, so that its alternatives are kept
