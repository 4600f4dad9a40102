"""A prompt that is computed once and continued in many ways: for likelihoods of given texts, and for beam search."""

from __future__ import annotations

from collections.abc import Sequence as Items
from types import TracebackType

import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.rotary import ntk_alpha
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.chatml import EncodedPrompt, ImageSpan
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.numerics import numerics_error
from qvl_runtime.schedule.runner import Chunk, Span
from qvl_runtime.schedule.sequence import Sequence

LOGIT_BYTES = 64 * 2**20  # of float32 logits at a time


class Prefix:
    """A computed prompt, between two steps of the scheduler and in the same cache; a `with` block frees its blocks.

    `logits` float32 [vocab] are those of the token after it. Later prompts find it in the prefix cache, so that a
    second question about an image computes only what differs.
    """

    def __init__(self, core: EngineCore, encoded: EncodedPrompt, room: int, cancellation: Cancellation = NEVER) -> None:
        """Compute a prompt, in steps of at most `max_step_tokens`; room: tokens of all its continuations together.

        Raises `CapacityError` if it is too long, `NumericsError` if its logits are not finite, and `Canceled` between
        two steps, here and in what continues it.
        """
        ids, runner = encoded.token_ids, core.runner
        core.check_length(len(ids), answer=1)
        self.core, self.length, self.cancellation = core, len(ids), cancellation
        core.scheduler.make_room(cdiv(len(ids) + room, BLOCK_SIZE) + 1)
        self.sequence = runner.cache.sequence(ntk_alpha(runner.model.config, len(ids)))
        try:
            self.sequence.find_prefix(ids, encoded.spans)
            hidden = torch.empty(0)
            while self.sequence.length < len(ids):
                cancellation.check()
                start = self.sequence.length
                part = ids[start : start + core.step_tokens]
                spans = _spans_in(core, encoded.spans, start, start + len(part))
                hidden = runner.run([Chunk(self.sequence, part, spans)])
            self.sequence.publish(ids, encoded.spans, tail=True)
            self.logits = self.checked(runner.model.logits(hidden[-1:]))[0]
        except BaseException:
            self.sequence.close()
            raise

    def fork(self) -> Sequence:
        """Return a sequence that continues the prompt; the caller closes it."""
        return self.sequence.fork()

    def at_once(self, tokens: int) -> int:
        """How many continuations of this length fit in the free blocks and in the logits of a step, at least 1."""
        fit = self.core.runner.cache.pool.available // (cdiv(tokens, BLOCK_SIZE) + 1)
        return max(1, min(fit, self.core.step_tokens // tokens, LOGIT_BYTES // (4 * len(self.logits) * tokens)))

    def logprobs(self, continuations: Items[Items[int]]) -> list[list[float]]:
        """Return the log probability of each token of each continuation, given the prompt and those before it.

        The first tokens need no computation; the others of all continuations are computed together.
        """
        first = self.logits.log_softmax(-1)
        found = [[float(first[ids[0]])] for ids in continuations]
        longer = [i for i, ids in enumerate(continuations) if len(ids) > 1]
        size = self.at_once(max(map(len, continuations)))
        for start in range(0, len(longer), size):
            self.cancellation.check()
            batch = longer[start : start + size]
            for i, rest in zip(batch, self._rest([continuations[i] for i in batch]), strict=True):
                found[i] += rest
        return found

    def _rest(self, continuations: Items[Items[int]]) -> list[list[float]]:
        """The log probabilities of all tokens but the first of each."""
        forks = [self.fork() for _ in continuations]
        try:
            chunks = [Chunk(fork, ids[:-1]) for fork, ids in zip(forks, continuations, strict=True)]
            hidden = self.core.runner.run(chunks)
            logits = self.checked(self.core.runner.model.logits(hidden))
        finally:
            for fork in forks:
                fork.close()
        targets = torch.tensor([token for ids in continuations for token in ids[1:]], device=logits.device)
        values = iter(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist())
        return [[next(values) for _ in ids[1:]] for ids in continuations]

    def checked(self, logits: Tensor) -> Tensor:
        """Return logits [m, vocab] as float32. Raises `NumericsError` for a row without a distribution."""
        rows = logits.float()
        without = rows.logsumexp(-1).isfinite().logical_not().nonzero()[:, 0]
        if len(without):
            raise numerics_error(logits[without[0]])
        return rows

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sequence.close()


def _spans_in(core: EngineCore, spans: Items[ImageSpan], start: int, end: int) -> list[Span]:
    """The image features that replace embeddings of the tokens from `start` to `end`."""
    inside = [span for span in spans if span.start < end and start < span.start + span.length]
    found = []
    for span, rows in zip(inside, core.runner.features([span.image for span in inside]), strict=True):
        first, last = max(span.start, start), min(span.start + span.length, end)
        found.append(Span(first - start, rows[first - span.start : last - span.start]))
    return found
