"""Choose among given answers by their likelihood, for multiple-choice questions: one prefill and no decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvl_runtime.engine.arguments import checked_list
from qvl_runtime.engine.prefix import Prefix
from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.core import EngineCore


@dataclass(frozen=True, slots=True)
class Choice:
    """How likely each of the given answers is, in their order."""

    options: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]  # of each option
    logprobs: tuple[float, ...]  # natural logarithm of the probability of all tokens of each option, under the model
    probabilities: tuple[float, ...]  # of each, given that it is one of these: they add up to 1

    @property
    def index(self) -> int:
        """The number of the likeliest option, from 0; the first of equals."""
        return max(range(len(self.logprobs)), key=self.logprobs.__getitem__)

    @property
    def best(self) -> str:
        """The likeliest option."""
        return self.options[self.index]

    @property
    def mean_logprobs(self) -> tuple[float, ...]:
        """The log probability of each option over its number of tokens, for options of different lengths."""
        return tuple(total / len(ids) for total, ids in zip(self.logprobs, self.token_ids, strict=True))


def option_ids(tokenizer: Tokenizer, options: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the token ids of each option, as plain text. Raises `PromptError` for an empty one, or two that are equal.

    A leading space counts: after "Answer:", a model is likelier to continue with " A" than with "A".
    """
    if not all(isinstance(option, str) for option in checked_list("options", options, "strings")):
        raise PromptError(f"options is {quoted(options)}; expected a list of strings")
    ids = [tuple(tokenizer.encode(option, "none")) for option in options]
    if not ids or not all(ids):
        raise PromptError(f"options is {quoted(list(options))}; expected at least one, and none of them empty")
    if len(set(ids)) < len(ids):
        raise PromptError(f"options is {quoted(list(options))}; expected no two that are the same tokens")
    return ids


def choose(
    core: EngineCore,
    encoded: EncodedPrompt,
    options: Sequence[str],
    ids: list[tuple[int, ...]],
    cancellation: Cancellation = NEVER,
) -> Choice:
    """Return the likelihood of each option after an encoded prompt; ids: of `option_ids`.

    Options of one token need the prompt's prefill alone; the other tokens of longer ones are computed in one more step.
    """
    longest = max(map(len, ids))
    core.check_length(len(encoded.token_ids) + longest)
    with Prefix(core, encoded, sum(map(len, ids)) + 16 * len(ids), cancellation) as prefix:
        totals = [sum(found) for found in prefix.logprobs(ids)]
    shares = torch.tensor(totals, dtype=torch.float64).softmax(0).tolist()
    return Choice(tuple(options), tuple(ids), tuple(totals), tuple(shares))
