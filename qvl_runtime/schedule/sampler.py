"""The choice of the next token from a row of logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_runtime.errors import SamplingError
from qvl_runtime.schedule.request import SamplingParams, TokenLogprob


class Sample(NamedTuple):
    token_id: int
    logprob: TokenLogprob


class Sampler:
    """Chooses the tokens of one answer. Its random numbers are its own: nothing else in the process moves them."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], vocab: int, device: torch.device) -> None:
        """params: resolved; prompt_ids: what the repetition penalty counts from the start."""
        out_of_range = [t for t in (*params.logit_bias, *params.stop_token_ids) if not 0 <= t < vocab]
        if out_of_range:
            raise SamplingError(f"token id {out_of_range[0]} is not in the vocabulary; expected 0 to {vocab - 1}")
        self._params = params
        self._penalty = params.repetition_penalty or 1.0
        self._seen = torch.zeros(vocab, dtype=torch.bool, device=device)
        self._seen[torch.tensor(list(prompt_ids), dtype=torch.long, device=device)] = True
        self._bias: Tensor | None = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab, device=device)
            self._bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), device=device)
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> Sample:
        """logits [vocab] of any dtype. Order: repetition penalty, bias, temperature, top-k, top-p, min-p, draw."""
        raw = logits.float()
        scores = self._shaped(raw)
        if self._params.temperature:
            probs = filtered(scores / self._params.temperature, self._params).softmax(-1)
            token = int(torch.multinomial(probs, 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        self._seen[token] = True
        return Sample(token, self._logprob(raw, token))

    def _shaped(self, scores: Tensor) -> Tensor:
        if self._penalty != 1.0:  # Keskar et al. 2019, with the sign as transformers has it
            penalised = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
            scores = torch.where(self._seen, penalised, scores)
        return scores if self._bias is None else scores + self._bias

    def _logprob(self, raw: Tensor, token: int) -> TokenLogprob:
        normaliser = raw.logsumexp(-1)
        top: tuple[tuple[int, float], ...] = ()
        if self._params.logprobs:
            values, ids = raw.topk(min(self._params.logprobs, len(raw)))
            top = tuple(zip(ids.tolist(), (values - normaliser).tolist(), strict=True))
        return TokenLogprob(token, float(raw[token] - normaliser), top)


def filtered(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores [vocab] with -inf where top-k, top-p or min-p rule a token out; the likeliest always stays.

    top-p (Holtzman et al. 2020) keeps the likeliest tokens until their probabilities, after top-k, reach p; the one
    that reaches it is kept. min-p (Nguyen et al. 2024) drops those below a share of the likeliest one's probability.
    """
    if params.top_k and params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p is not None and params.top_p < 1.0:
        ordered, order = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, before >= params.top_p)
        scores = scores.masked_fill(dropped, -torch.inf)
    if params.min_p:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < params.min_p * probs.max(), -torch.inf)
    return scores
