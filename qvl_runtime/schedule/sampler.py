"""Sample the next token of all rows of a step at once, each with its own parameters and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from secrets import randbits
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.errors import SamplingError
from qvl_runtime.schedule.api import SamplingParams, TokenLogprob

CANDIDATES = 1024  # tokens searched for the nucleus (top-p) first; sorting the vocabulary costs ten times as much


class Sample(NamedTuple):
    token_id: int
    logprob: TokenLogprob


class SamplingState:
    """The sampling parameters and state of one answer.

    The random numbers are a function of seed and position in the answer only, so an answer
    does not depend on its neighbors, on being interrupted, or on drafts.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], vocab: int, device: torch.device, index: int = 0
    ) -> None:
        """params: resolved; prompt_ids: what the repetition penalty counts from the start; index: of n answers."""
        out_of_range = [t for t in (*params.logit_bias, *params.stop_token_ids) if not 0 <= t < vocab]
        if out_of_range:
            raise SamplingError(f"token id {out_of_range[0]} is not in the vocabulary; expected 0 to {vocab - 1}")
        self.params = params
        self.penalty = params.repetition_penalty or 1.0
        self.seen: Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self.seen[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
        self.bias: Tensor | None = None
        if params.logit_bias:
            self.bias = torch.zeros(vocab, device=device)
            self.bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), device=device)
        self._seed = (randbits(63) if params.seed is None else params.seed) + index

    @property
    def foreseeable(self) -> bool:
        """Whether several positions may be sampled in one step: a penalty makes each depend on those before it."""
        return self.seen is None

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) for this position of the answer."""
        digest = blake2b(b"%d/%d" % (self._seed, position), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


class SamplingRow(NamedTuple):
    """A row of logits: the answer it is for, and the position there of the token that it gives."""

    state: SamplingState
    position: int


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sample]:
    """One token for each row of logits [m, vocab] of any dtype.

    Order: repetition penalty, bias, temperature, top-k, top-p, min-p, draw. Temperature 0 takes the likeliest.
    """
    raw = logits.float()
    scores = _shaped(raw, rows)
    tokens = scores.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.state.params.temperature]
    if drawn:
        at = torch.tensor(drawn, device=raw.device)
        tokens[at] = _draw(scores[at], [rows[i] for i in drawn])
    normalizer = raw.logsumexp(-1)
    chosen = (raw.gather(1, tokens[:, None])[:, 0] - normalizer).tolist()
    token_ids = tokens.tolist()
    for row, token in zip(rows, token_ids, strict=True):
        if row.state.seen is not None:
            row.state.seen[token] = True
    tops = likeliest(raw, normalizer, rows)
    return [
        Sample(token, TokenLogprob(token, logprob, top))
        for token, logprob, top in zip(token_ids, chosen, tops, strict=True)
    ]


def _shaped(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Scores after penalties and biases; `raw` itself where no row asks for any."""
    scores = raw
    punished = [i for i, row in enumerate(rows) if row.state.seen is not None]
    if punished:  # Keskar et al. 2019, with the sign as transformers has it
        at = torch.tensor(punished, device=raw.device)
        penalty = raw.new_tensor([rows[i].state.penalty for i in punished])[:, None]
        seen = torch.stack([seen for row in rows if (seen := row.state.seen) is not None])
        own = raw[at]
        scores = raw.index_copy(0, at, torch.where(seen, torch.where(own > 0, own / penalty, own * penalty), own))
    for i, row in enumerate(rows):
        if row.state.bias is not None:
            scores = scores.clone() if scores is raw else scores
            scores[i] += row.state.bias
    return scores


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Tokens [m] drawn from scores [m, vocab] of rows that have a temperature."""
    params = [row.state.params for row in rows]
    vocab = scores.shape[1]
    temperature = scores.new_tensor([p.temperature or 1.0 for p in params])
    # relative to the likeliest, which stays finite however small the temperature
    probs = ((scores - scores.amax(-1, keepdim=True)) / temperature[:, None].clamp(min=1e-30)).softmax(-1)
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=scores.device)
    top_p = scores.new_tensor([1.0 if p.top_p is None else p.top_p for p in params])
    min_p = scores.new_tensor([p.min_p for p in params])
    uniforms = scores.new_tensor([row.state.uniform(row.position) for row in rows], dtype=torch.float64)
    values, ids = probs.topk(min(CANDIDATES, vocab))
    nucleus = (top_p < 1) & (values.sum(-1) >= top_p)
    enough = (top_k <= values.shape[1]) | ((top_k == vocab) & (nucleus | (values[:, -1] < min_p * values[:, 0])))
    tokens = ids.gather(1, _pick(values, top_k, top_p, min_p, uniforms)[:, None])[:, 0]
    if not bool(enough.all()):
        wide = (~enough).nonzero()[:, 0]
        values, ids = probs[wide].sort(descending=True)
        picked = _pick(values, top_k[wide], top_p[wide], min_p[wide], uniforms[wide])
        tokens[wide] = ids.gather(1, picked[:, None])[:, 0]
    return tokens


def _pick(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Ranks [m] drawn from probabilities [m, candidates], the likeliest first; that one is never ruled out.

    top-p (Holtzman et al. 2020) keeps the likeliest tokens until their share, after top-k, reaches p; the one that
    reaches it is kept. min-p (Nguyen et al. 2024) drops those below a share of the likeliest one's probability. The
    draw inverts the cumulative distribution, so that one random number makes one token.
    """
    ranks = torch.arange(probs.shape[1], device=probs.device)
    kept = torch.where(ranks < top_k[:, None], probs, 0.0).double()
    # a row that is cut by top-p alone may have its tail outside these candidates: its whole mass is 1
    mass = torch.where(top_k <= probs.shape[1], kept.sum(-1), 1.0)
    before = kept.cumsum(-1) - kept
    kept = torch.where((before < (top_p * mass)[:, None]) & (probs >= min_p[:, None] * probs[:, :1]), kept, 0.0)
    cumulative = kept.cumsum(-1)
    ranked = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(ranked, (kept > 0).sum(-1) - 1)


def likeliest(raw: Tensor, normalizer: Tensor, rows: Sequence[SamplingRow]) -> list[tuple[tuple[int, float], ...]]:
    """The alternatives that each row asks for, with their log probabilities."""
    wanted = [min(row.state.params.logprobs or 0, raw.shape[1]) for row in rows]
    if not any(wanted):
        return [()] * len(rows)
    values, ids = raw.topk(max(wanted))
    logprobs = (values - normalizer[:, None]).tolist()
    return [tuple(zip(i[:k], v[:k], strict=True)) for i, v, k in zip(ids.tolist(), logprobs, wanted, strict=True)]
