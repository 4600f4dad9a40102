"""Choose among given answers by their likelihood, as the original does: the mean log probability of their tokens.

An option is tokenized on its own and appended to the prompt's ids. Where each option is one token, one prefill tells;
then questions run together like any others, with all other tokens ruled out by a bias. Options of several tokens are
scored one after another; the images are encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qvl_runtime.engine.engine import Engine
from qvl_runtime.engine.score import score_prompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.api import SamplingParams

# Added to the logits of all options alike. Logits differ by less than 100, and at 1,000 a float32 still resolves 6e-5.
_BIAS = 1000.0


def single_tokens(tokenizer: Tokenizer, choices: Sequence[str]) -> tuple[int, ...] | None:
    """The token of each option; None unless every option is one token, and each another."""
    ids = [tokenizer.encode(choice, "none") for choice in choices]
    if any(len(tokens) != 1 for tokens in ids) or len({tokens[0] for tokens in ids}) != len(ids):
        return None
    return tuple(tokens[0] for tokens in ids)


def one_of(tokens: Sequence[int]) -> SamplingParams:
    """Parameters of a request whose answer is the likeliest of these tokens."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        repetition_penalty=1.0,
        ignore_eos=True,
        logit_bias=dict.fromkeys(tokens, _BIAS),
        logprobs=0,
    )


def likelihoods(engine: Engine, prompt: Any, choices: Sequence[str]) -> tuple[float, ...]:
    """Mean log probability of each option's tokens after a prompt of any form."""
    encoded = engine.encode(prompt).prompt
    found = []
    for choice in choices:
        tokens = engine.tokenizer.encode(choice, "none")
        whole = replace(encoded, token_ids=[*encoded.token_ids, *tokens])
        with engine.exclusive():
            scored = score_prompt(engine.core, whole)
        found.append(float(scored.logprobs[-len(tokens) :].mean()))
    return tuple(found)
