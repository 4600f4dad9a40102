"""Sampling in plain torch: how one token is chosen from each row of logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CANDIDATES = 1024  # tokens searched for the nucleus (top-p) first; sorting the vocabulary costs ten times as much


class SamplingRows(NamedTuple):
    """How each of m rows is sampled, on the device of the logits."""

    temperature: Tensor  # float32 [m]; 0 selects the likeliest token
    top_k: Tensor  # int32 [m]; 0 is off
    top_p: Tensor  # float32 [m]; 1 is off
    min_p: Tensor  # float32 [m]; 0 is off
    uniform: Tensor  # float64 [m] in [0, 1): the random number of each row
    penalty: Tensor | None = None  # float32 [m], the repetition penalty; 1 is off
    slots: Tensor | None = None  # int64 [m]: the row of `seen` and `bias` that applies, or -1
    seen: Tensor | None = None  # bool [s, vocab]: tokens of prompt and answer so far
    bias: Tensor | None = None  # float32 [s, vocab], added to the logits
    allowed: Tensor | None = None  # int32 [m, ceil(vocab / 32)]: bit t % 32 of word t // 32 is whether t may be chosen


class SampledTokens(NamedTuple):
    """The sampled tokens and their log probabilities.

    A row without a distribution has no token: its log probability is NaN, and its id a valid one without meaning. Such
    a row has NaN or +inf among its logits, or its scores, after penalties, biases and the mask, are all -inf or one is
    +inf.
    """

    token_ids: Tensor  # int64 [m]
    logprobs: Tensor  # float32 [m], under the model's own distribution, before penalties and cuts


def greedy(logits: Tensor) -> SampledTokens:
    """The likeliest token of each row of logits [m, vocab]; the first of equals."""
    tokens = logits.float().argmax(-1)
    return SampledTokens(tokens, _logprobs(logits, tokens))


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log probability of a token of each row. `logsumexp` of one row of 40,000 differs from that among others."""
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def sample(logits: Tensor, rows: SamplingRows) -> SampledTokens:
    """One token for each row of logits [m, vocab] of any dtype.

    Order: repetition penalty, bias, mask, temperature, top-k, top-p, min-p, draw. Temperature 0 selects the likeliest.
    """
    tokens, finite = choose(logits, rows)
    return SampledTokens(tokens, torch.where(finite, _logprobs(logits, tokens), math.nan))


def choose(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """The tokens int64 [m] of `sample`, and whether each row has a distribution after penalties, biases and mask."""
    scores = _penalized(logits.float(), rows)
    tokens = scores.argmax(-1)  # of NaN, if there is one
    finite = scores.gather(1, tokens[:, None])[:, 0].isfinite()
    drawn = (finite & (rows.temperature > 0)).nonzero()[:, 0]
    if len(drawn):
        tokens[drawn] = _draw(scores[drawn], SamplingRows(*(column[drawn] for column in rows[:5])))
    return tokens, finite


def _penalized(raw: Tensor, rows: SamplingRows) -> Tensor:
    """Scores after penalties and biases, -inf for tokens that the mask forbids; `raw` itself if no row has any."""
    scores = raw if rows.slots is None else _biased(raw, rows, rows.slots)
    if rows.allowed is None:
        return scores
    bits = rows.allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=raw.device) & 1
    return scores.masked_fill(bits.flatten(1)[:, : raw.shape[1]] == 0, -math.inf)


def _biased(raw: Tensor, rows: SamplingRows, row_slots: Tensor) -> Tensor:
    """Scores after penalties and biases, of the rows that have a slot.

    The penalty is that of Keskar et al. 2019, with the sign rule of transformers: positive scores are divided by it,
    others multiplied.
    """
    at = (row_slots >= 0).nonzero()[:, 0]
    slots, scores = row_slots[at], raw[at]
    if rows.seen is not None and rows.penalty is not None:
        penalty = rows.penalty[at, None]
        scores = torch.where(rows.seen[slots], torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if rows.bias is not None:
        bias = rows.bias[slots]
        scores = torch.where(bias.isneginf(), bias, scores + bias)  # forbidden, whatever the penalty made of the score
    return raw.index_copy(0, at, scores)


def _draw(scores: Tensor, rows: SamplingRows) -> Tensor:
    """Tokens [m] drawn from scores [m, vocab] of rows that have a temperature."""
    vocab = scores.shape[1]
    # relative to the likeliest, which stays finite for any temperature
    probs = ((scores - scores.amax(-1, keepdim=True)) / rows.temperature[:, None].clamp(min=1e-30)).softmax(-1)
    top_k = torch.where(rows.top_k == 0, vocab, rows.top_k.clamp(max=vocab)).long()
    top_p, min_p, uniform = rows.top_p, rows.min_p, rows.uniform
    values, ids = probs.topk(min(CANDIDATES, vocab))
    nucleus = (top_p < 1) & (values.sum(-1) >= top_p)
    enough = (top_k <= values.shape[1]) | ((top_k == vocab) & (nucleus | (values[:, -1] < min_p * values[:, 0])))
    tokens = ids.gather(1, _pick(values, top_k, top_p, min_p, uniform)[:, None])[:, 0]
    if not bool(enough.all()):
        wide = (~enough).nonzero()[:, 0]
        values, ids = probs[wide].sort(descending=True)
        picked = _pick(values, top_k[wide], top_p[wide], min_p[wide], uniform[wide])
        tokens[wide] = ids.gather(1, picked[:, None])[:, 0]
    return tokens


def _pick(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Ranks [m] drawn from probabilities [m, candidates], the likeliest first; that one is never ruled out.

    top-p (Holtzman et al. 2020) keeps the likeliest tokens until their share, after top-k, reaches p; the one that
    reaches it is kept. min-p (Nguyen et al. 2024) drops those below a share of the likeliest one's probability. The
    draw inverts the cumulative distribution, so that one random number makes one token.
    """
    ranks = torch.arange(probs.shape[1], device=probs.device)
    kept = torch.where(ranks < top_k[:, None], probs, 0.0).double()
    # a row that is cut by top-p alone may have its tail outside these candidates: its whole mass is 1
    up_to = kept.cumsum(-1)  # its last is the sum; `sum` of one long row differs from that among others
    mass = torch.where(top_k <= probs.shape[1], up_to[:, -1], 1.0)
    before = up_to - kept
    within = ((before < (top_p * mass)[:, None]) & (probs >= min_p[:, None] * probs[:, :1])) | (ranks == 0)
    kept = torch.where(within, kept, 0.0)
    cumulative = kept.cumsum(-1)
    ranked = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(ranked, (kept > 0).sum(-1) - 1)
