"""Sample the next token of all rows of a step at once, each with its own parameters and random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.ops import Ops
from qvl_kernels.reference.sampling import SampledTokens, SamplingRows
from qvl_runtime.errors import NumericsError, SamplingError, quoted
from qvl_runtime.schedule.api import SamplingParams, TokenLogprob
from qvl_runtime.schedule.numerics import numerics_error


class Sample(NamedTuple):
    """A sampled token and its log probability, or why there is none: then the two mean nothing."""

    token_id: int
    logprob: TokenLogprob
    error: NumericsError | None = None


class SamplingState:
    """The sampling parameters and state of one answer.

    The random numbers are a function of seed and position in the answer only, so an answer does not depend on its
    neighbors in the batch, on preemption, or on drafts.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], vocab: int, device: torch.device, index: int = 0
    ) -> None:
        """params: resolved; prompt_ids: already counted by the repetition penalty; index: of the answer, among n."""
        out_of_range = [t for t in (*params.logit_bias, *params.stop_token_ids) if not 0 <= t < vocab]
        if out_of_range:
            raise SamplingError(
                f"token id {quoted(out_of_range[0])} is not in the vocabulary; expected 0 to {vocab - 1}"
            )
        if len(params.logit_bias) == vocab and max(params.logit_bias.values()) == -math.inf:
            raise SamplingError(f"logit_bias forbids every token of {vocab}: leave one without -inf")
        self.params = params
        self.penalty = params.repetition_penalty or 1.0
        self.seen: Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.restore(prompt_ids)
        self.bias: Tensor | None = None
        if params.logit_bias:
            self.bias = torch.zeros(vocab, device=device)
            self.bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), device=device)
        self._seed = (randbits(63) if params.seed is None else params.seed) + index

    @property
    def foreseeable(self) -> bool:
        """Whether several positions may be sampled in one step. With a penalty, each depends on the previous ones."""
        return self.seen is None

    def restore(self, token_ids: Iterable[int]) -> None:
        """Have the penalty count these tokens, of prompt and answer, and no other."""
        if self.seen is not None:
            self.seen.zero_()
            self.seen[torch.tensor(list(token_ids), dtype=torch.long, device=self.seen.device)] = True

    def uniform(self, position: int) -> float:
        """Return the random number in [0, 1) for this position of the answer."""
        digest = blake2b(b"%d/%d" % (self._seed, position), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


class SamplingRow(NamedTuple):
    """The sampling state of the answer that a row of logits belongs to, and the position there of the next token."""

    state: SamplingState
    position: int


def sample(logits: Tensor, rows: Sequence[SamplingRow], ops: Ops = reference) -> list[Sample]:
    """Sample one token for each row of logits [m, vocab], by `ops.sample`, or `ops.greedy` if all are plain greedy.

    A row without a distribution gives an error; its log probability, which is NaN, tells. Device results are copied to
    the host once, so that a step waits for its device only when tokens are read.
    """
    parameters = sampling_rows(logits.device, rows)
    sampled = ops.greedy(logits) if parameters is None else ops.sample(logits, parameters)
    token_ids, logprobs = _on_host(sampled)
    for row, token in zip(rows, token_ids, strict=True):
        if row.state.seen is not None:
            row.state.seen[token] = True
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    if any(row.state.params.logprobs for row in rows):
        raw = logits.float()
        tops = likeliest(raw, raw.logsumexp(-1), rows)
    samples = [
        Sample(token, TokenLogprob(token, logprob, top))
        for token, logprob, top in zip(token_ids, logprobs, tops, strict=True)
    ]
    for i, logprob in enumerate(logprobs):
        if math.isnan(logprob):
            state = rows[i].state
            samples[i] = samples[i]._replace(error=numerics_error(logits[i], state.penalty, state.bias))
    return samples


def sampling_rows(device: torch.device, rows: Sequence[SamplingRow]) -> SamplingRows | None:
    """The parameters of each row on the device; None if all rows select the likeliest token and nothing else.

    One copy moves the numbers. Rows with a penalty or a bias share one stack of seen tokens and of biases.
    """
    special = [i for i, row in enumerate(rows) if row.state.seen is not None or row.state.bias is not None]
    if not special and not any(row.state.params.temperature for row in rows):
        return None
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
    parameters = SamplingRows(temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform)
    if not special:
        return parameters
    states = [rows[i].state for i in special]
    seen, bias = _stacked([state.seen for state in states]), _stacked([state.bias for state in states])
    return parameters._replace(
        penalty=None if seen is None else penalty.float(), slots=slot.long(), seen=seen, bias=bias
    )


def _on_host(sampled: SampledTokens) -> tuple[list[int], list[float]]:
    """Copy token ids and log probabilities to the host at once; ids are exact in float64."""
    if sampled.token_ids.device.type == "cpu":
        return sampled.token_ids.tolist(), sampled.logprobs.tolist()
    token_ids, logprobs = torch.stack([sampled.token_ids.double(), sampled.logprobs.double()]).tolist()
    return [int(token) for token in token_ids], logprobs


def likeliest(raw: Tensor, normalizer: Tensor, rows: Sequence[SamplingRow]) -> list[tuple[tuple[int, float], ...]]:
    """Return the `logprobs` likeliest tokens of each row, with their log probabilities."""
    counts = [min(row.state.params.logprobs or 0, raw.shape[1]) for row in rows]
    if not any(counts):
        return [()] * len(rows)
    values, ids = raw.topk(max(counts))
    logprobs = (values - normalizer[:, None]).tolist()
    return [tuple(zip(i[:k], v[:k], strict=True)) for i, v, k in zip(ids.tolist(), logprobs, counts, strict=True)]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Stack the tensors, zeros for None; None if all are None."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
