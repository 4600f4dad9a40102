"""Choose among given answers by their likelihood, as the original does: the mean log probability of their tokens.

An option is tokenized on its own and appended to the prompt's ids. Where each option is one token, one prefill tells;
then questions run together like any others, with all other tokens ruled out by a bias. Others are asked by
`Engine.choose`, one question after another.
"""

from __future__ import annotations

from collections.abc import Sequence

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
