"""Score a prompt: the log probability of each of its tokens, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.errors import PromptError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.chatml import EncodedPrompt, ids_segment
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.numerics import numerics_error
from qvl_runtime.schedule.runner import Chunk, Span

LOGIT_BYTES = 256 * 2**20  # of logits that are computed at once unless they are returned


class Score(NamedTuple):
    """The log probability of each token of a prompt, given those before it."""

    token_ids: tuple[int, ...]  # n
    logprobs: Tensor  # float32 [n - 1], natural logarithms; entry i is that of token i + 1
    logits: Tensor | None  # float32 [n, vocab], if requested


def continued(prompt: EncodedPrompt, tokenizer: Tokenizer, continuation: str | Sequence[int]) -> EncodedPrompt:
    """Return a prompt with more tokens at its end. Raises `PromptError` if there are none, or one does not exist."""
    if isinstance(continuation, str):
        ids = tokenizer.encode(continuation, "grounding")
    else:
        ids = ids_segment(tokenizer, {"token_ids": continuation}).ids
    if not ids:
        raise PromptError("a continuation is empty; expected text or token ids to score")
    return replace(prompt, token_ids=[*prompt.token_ids, *ids])


def score_prompt(
    core: EngineCore, encoded: EncodedPrompt, return_logits: bool = False, adapter: str | None = None
) -> Score:
    """Return the log probability of each token of an encoded prompt after the first, pad ids of images included.

    The prompt is prefilled in one step, outside the scheduler. Raises `CapacityError` if it is too long, and
    `NumericsError` if the logits of a token are not finite.
    """
    ids, runner = encoded.token_ids, core.runner
    config = runner.model.config
    core.check_length(len(ids))
    features = runner.features([span.image for span in encoded.spans])
    spans = [Span(span.start, image_features) for span, image_features in zip(encoded.spans, features, strict=True)]
    core.scheduler.make_room(cdiv(len(ids), BLOCK_SIZE))
    with runner.cache.sequence(ntk_alpha(config, len(ids)), adapter=core.runner.checked_adapter(adapter)) as sequence:
        hidden = runner.run([Chunk(sequence, ids, spans)])
    chunk = len(ids) if return_logits else max(1, LOGIT_BYTES // (4 * config.vocab_size))
    next_ids = torch.tensor([*ids[1:], 0], device=hidden.device)  # the last token's logits are checked, too
    parts, logits = [], torch.empty(0)
    for start in range(0, len(ids), chunk):
        rows = runner.model.logits(hidden[start : start + chunk])
        logits, targets = rows.float(), next_ids[start : start + chunk, None]
        parts.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
        without = parts[-1].isnan().nonzero()[:, 0]
        if len(without):
            raise numerics_error(rows[without[0]])
    return Score(tuple(ids), torch.cat(parts)[:-1], logits if return_logits else None)
