"""Sample the next token of all rows of a step at once, each with its own parameters and random numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.ops import Ops
from qvl_kernels.reference.sampling import SampledTokens, SamplingRows
from qvl_runtime.errors import NumericsError, SamplingError, quoted
from qvl_runtime.prompt.box_spelling import BoxSpelling
from qvl_runtime.prompt.token_mask import Mask, holds, tokens_of
from qvl_runtime.schedule.api import SamplingParams, TokenLogprob
from qvl_runtime.schedule.constraint import Allowed, Constraint
from qvl_runtime.schedule.numerics import numerics_error


class Sample(NamedTuple):
    """A sampled token and its log probability, or why there is none: then the two mean nothing."""

    token_id: int
    logprob: TokenLogprob
    error: NumericsError | None = None
    in_box: dict[int, float] | None = None  # within a box: log probabilities of the tokens that boxes are made of


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

    def count(self, token: int) -> None:
        """Have the penalties count a token of the answer."""
        if self.seen is not None:
            self.seen[token] = True
        if self._counts is not None and self.bias is not None:
            self._counts[token] += 1
            self.bias[token] = self._bias_of(token, self._counts[token])

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


def sample(logits: Tensor, rows: Sequence[SamplingRow], ops: Ops = reference) -> list[Sample]:
    """Sample one token for each row of logits [m, vocab], by `ops.sample`, or `ops.greedy` if all are plain greedy.

    A mask alone does not need `ops.sample`: the likeliest of all tokens is usually allowed.

    A row without a distribution gives an error; its log probability, which is NaN, tells. Device results are copied to
    the host once, so that a step waits for its device only when tokens are read.
    """
    parameters = sampling_rows(logits.device, rows)
    sampled = ops.greedy(logits) if parameters is None else ops.sample(logits, parameters)
    token_ids, logprobs = _on_host(sampled)
    if parameters is None:
        for i, row in enumerate(rows):
            if row.allowed is not None and not holds(row.allowed, token_ids[i]):
                token_ids[i], logprobs[i] = _likeliest_allowed(logits[i], row.allowed, token_ids[i], logprobs[i])
    for row, token in zip(rows, token_ids, strict=True):
        row.state.count(token)
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    if any(row.state.params.logprobs for row in rows):
        highest = sampled if parameters is None else ops.greedy(logits)
        tops = likeliest(logits.float(), highest.logprobs, rows)
    samples = [
        Sample(token, TokenLogprob(token, logprob, top))
        for token, logprob, top in zip(token_ids, logprobs, tops, strict=True)
    ]
    _add_boxes(samples, logits, rows)
    for i, logprob in enumerate(logprobs):
        if math.isnan(logprob):
            state = rows[i].state
            samples[i] = samples[i]._replace(error=numerics_error(logits[i], state.penalty, state.bias))
    return samples


def _add_boxes(samples: list[Sample], logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Add the log probabilities of what boxes are made of to the samples within boxes: one more copy to the host."""
    spellings = [(i, row.state.spelling) for i, row in enumerate(rows) if row.in_box]
    within = [i for i, spelling in spellings if spelling is not None]
    if not within or (spelling := spellings[0][1]) is None:
        return
    alphabet = spelling.alphabet
    ids = torch.tensor([[*alphabet, samples[i].token_id] for i in within], device=logits.device)
    values = logits[torch.tensor(within, device=logits.device)].gather(1, ids).tolist()
    for i, found in zip(within, values, strict=True):
        normalizer = found[-1] - samples[i].logprob.logprob
        samples[i] = samples[i]._replace(in_box={t: v - normalizer for t, v in zip(alphabet, found, strict=False)})


def _likeliest_allowed(logits: Tensor, mask: Mask, first: int, logprob: float) -> tuple[int, float]:
    """The likeliest token of a mask, and its log probability, from those of the likeliest of all tokens."""
    ids = torch.from_numpy(tokens_of(mask)).to(logits.device)
    values = logits[ids].float()
    best, top = values.argmax(), logits[first].float()
    # in float32, as `ops.sample` adds them: the same number whatever the other rows of the step need
    chosen = torch.stack([ids[best].double(), (values[best] - top + logprob).double()]).tolist()
    return int(chosen[0]), chosen[1] if math.isfinite(chosen[1]) else math.nan


def sampling_rows(device: torch.device, rows: Sequence[SamplingRow]) -> SamplingRows | None:
    """The parameters of each row on the device; None if all rows select the likeliest token, of a mask or of all.

    One copy moves the numbers. Rows with a penalty or a bias share one stack of seen tokens and of biases.
    """
    special = [i for i, row in enumerate(rows) if row.state.seen is not None or row.state.bias is not None]
    if not special and not any(row.state.params.temperature for row in rows):
        return None
    allowed = _on_device([row.allowed for row in rows], device)
    slots = dict(zip(special, range(len(special)), strict=True))
    numbers = [
        (
            p.temperature or 0.0,
            min(p.top_k or 0, 2**31 - 1),
            1.0 if p.top_p is None else p.top_p,
            p.min_p,
            row.state.uniform(row.position),
            row.state.penalty,
            slots.get(i, -1),
        )
        for i, row in enumerate(rows)
        for p in (row.state.params,)
    ]
    temperature, top_k, top_p, min_p, uniform, penalty, slot = (
        torch.tensor(numbers, dtype=torch.float64).t().contiguous().to(device, non_blocking=True)
    )
    parameters = SamplingRows(temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform, allowed=allowed)
    if not special:
        return parameters
    states = [rows[i].state for i in special]
    seen, bias = _stacked([state.seen for state in states]), _stacked([state.bias for state in states])
    return parameters._replace(
        penalty=None if seen is None else penalty.float(), slots=slot.long(), seen=seen, bias=bias
    )


def _on_device(masks: Sequence[Mask | None], device: torch.device) -> Tensor | None:
    """The masks of all rows, int32 [m, words]; None if no row has one."""
    words = next((len(mask) for mask in masks if mask is not None), None)
    if words is None:
        return None
    stacked = torch.full((len(masks), words), -1, dtype=torch.int32, pin_memory=device.type == "cuda")
    for row, mask in zip(stacked.numpy(), masks, strict=True):
        if mask is not None:
            row[:] = mask
    return stacked.to(device, non_blocking=True)


def _on_host(sampled: SampledTokens) -> tuple[list[int], list[float]]:
    """Copy token ids and log probabilities to the host at once; ids are exact in float64."""
    if sampled.token_ids.device.type == "cpu":
        return sampled.token_ids.tolist(), sampled.logprobs.tolist()
    token_ids, logprobs = torch.stack([sampled.token_ids.double(), sampled.logprobs.double()]).tolist()
    return [int(token) for token in token_ids], logprobs


def likeliest(raw: Tensor, highest: Tensor, rows: Sequence[SamplingRow]) -> list[tuple[tuple[int, float], ...]]:
    """Return the `logprobs` likeliest tokens of each row, with their log probabilities; highest [m]: of the first.

    Rows of one number are searched together: which of equals are found depends on how many are asked for.
    """
    counts = [min(row.state.params.logprobs or 0, raw.shape[1]) for row in rows]
    found: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    for count in {*counts} - {0}:
        at = [i for i, wanted in enumerate(counts) if wanted == count]
        values, ids = raw[at].topk(count)
        logprobs = values - values[:, :1] + highest[at, None]
        for i, tokens, numbers in zip(at, ids.tolist(), logprobs.tolist(), strict=True):
            found[i] = tuple(zip(tokens, numbers, strict=True))
    return found


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors, zeros for None; None if all are None."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
