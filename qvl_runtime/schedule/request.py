"""A request in the engine, and the branch of each of its answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qvl_runtime.errors import ConstraintError, QVLError
from qvl_runtime.prompt.chatml import EncodedPrompt, ImageSpan
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, Timings, Usage
from qvl_runtime.schedule.constraint import Constrain
from qvl_runtime.schedule.output import OutputBuilder
from qvl_runtime.schedule.runner import Span
from qvl_runtime.schedule.sampler import Sample
from qvl_runtime.schedule.sampling_state import SamplingState
from qvl_runtime.schedule.scoring import PromptScores
from qvl_runtime.schedule.sequence import Sequence

# Requests that may arrive after another and still come before each further answer of it: as many as run together by
# default. So one with many answers delays others little, and always gets its turn.
TURNS = 64


@dataclass(slots=True, eq=False)
class Clock:
    """The timestamps of a request, in seconds of `time.perf_counter`."""

    image_s: float  # spent encoding the prompt
    submitted: float = field(default_factory=time.perf_counter)
    scheduled: float | None = None
    vision_s: float = 0.0
    first_token: float | None = None

    def timings(self, computed: int, completed: int) -> Timings:
        """Return the durations up to now.

        computed: prompt tokens that were not cached; completed: tokens of the answer.
        """
        now = time.perf_counter()
        scheduled = now if self.scheduled is None else self.scheduled
        first = now if self.first_token is None else self.first_token
        return Timings(
            image_s=self.image_s,
            vision_s=self.vision_s,
            prefill_s=max(0.0, first - scheduled - self.vision_s),
            decode_s=now - first,
            prompt_tokens=computed,
            decoded_tokens=max(0, completed - 1),
            queue_s=scheduled - self.submitted,
        )


@dataclass(slots=True, eq=False)
class Request:
    """An admitted prompt with n answers, or the error that ended it.

    For a streamed request, `pieces` queues what its reader has not taken.
    """

    number: int  # in order of arrival
    prompt: EncodedPrompt
    params: SamplingParams  # resolved
    clock: Clock
    tag: Any = None  # the caller's
    streamed: bool = False
    constrain: Constrain | None = None  # begins the constraint of each answer
    paused: bool = False  # its reader is too far behind: it keeps its blocks but is not scheduled
    cached_tokens: int = 0
    branches: list[Branch] = field(default_factory=list)
    completions: dict[int, Completion] = field(default_factory=dict)  # by answer
    pieces: deque[StreamPiece] = field(default_factory=deque)
    scores: PromptScores | None = None  # of its prompt, if requested
    error: QVLError | None = None  # why it ended without an answer

    @property
    def done(self) -> bool:
        """Whether all n answers are complete, or the request has failed."""
        return self.error is not None or len(self.completions) == self.params.n

    @property
    def deadline(self) -> float | None:
        """When the request expires, in seconds of `time.perf_counter`; None without a timeout."""
        timeout = self.params.timeout_s
        return None if timeout is None else self.clock.submitted + timeout

    def completion(self) -> Completion:
        """Return the first answer with the others in `alternatives`. The request must be done.

        Raises the error of a request that has failed.
        """
        if self.error is not None:
            raise self.error
        first, *others = (self.completions[i] for i in range(self.params.n))
        return replace(first, alternatives=tuple(others))


class Branch:
    """One answer of a request: its tokens so far, and the sequence with the KV cache of the computed ones."""

    def __init__(
        self, request: Request, index: int, sequence: Sequence, output: OutputBuilder, sampling_state: SamplingState
    ) -> None:
        self.request, self.index = request, index
        self.sequence, self.output, self.sampling_state = sequence, output, sampling_state
        self.running = False  # set by the scheduler: the branch has blocks and takes part in steps
        self.token_ids: list[int] = list(request.prompt.token_ids)
        self.drafting = sampling_state.foreseeable  # whether it may have draft tokens
        self.features: dict[int, Tensor] = {}  # of the images being prefilled, by the span's number

    @property
    def order(self) -> tuple[int, int, int]:
        """The scheduling order: by arrival, each further answer of a request like one that arrives `TURNS` later."""
        return self.request.number + TURNS * self.index, self.request.number, self.index

    @property
    def pending(self) -> int:
        """The number of known tokens that are not computed yet: 1 while decoding, more during prefill.

        While a step runs it is 0 for the branches that it decodes: their next token is not known.
        """
        return len(self.token_ids) - self.sequence.taken

    @property
    def spans(self) -> Items[ImageSpan]:
        """The image spans of the prompt."""
        return self.request.prompt.spans

    def find_prefix(self) -> int:
        """Start its sequence with what is cached of its tokens, before the first whose logits are to be scored."""
        scores = self.request.scores if self.index == 0 else None
        end = len(self.token_ids) if scores is None else scores.next_index
        return self.sequence.find_prefix(self.token_ids[:end], self.spans)

    def spans_in_next(self, count: int) -> list[tuple[int, ImageSpan]]:
        """Return the image spans, by number, that overlap the next `count` tokens."""
        start = self.sequence.length
        end = start + count
        return [(i, s) for i, s in enumerate(self.spans) if s.start < end and start < s.start + s.length]

    def chunk_spans(self, count: int) -> list[Span]:
        """Return the image features that replace embeddings of the next `count` tokens, taken from `features`."""
        start, spans = self.sequence.length, []
        for i, span in self.spans_in_next(count):
            first, last = max(span.start, start), min(span.start + span.length, start + count)
            spans.append(Span(first - start, self.features[i][first - span.start : last - span.start]))
        return spans

    def finish_step(self) -> None:
        """Publish the blocks that the step filled, and drop the image features that are no longer needed."""
        self.sequence.publish(self.token_ids, self.spans)
        if self.features:
            needed = dict(self.spans_in_next(self.pending))
            self.features = {i: rows for i, rows in self.features.items() if i in needed}

    def recount(self) -> None:
        """Have the penalties count the tokens that it has, and no other."""
        self.sampling_state.restore(self.request.prompt.token_ids, self.output.token_ids)

    def add(self, sample: Sample) -> None:
        """Append the next token of the answer, and stream its text."""
        clock = self.request.clock
        if clock.first_token is None:
            clock.first_token = time.perf_counter()
        self.token_ids.append(sample.token_id)
        text = self.output.add(sample)
        self.sampling_state.take(sample.token_id)
        constraint = self.sampling_state.constraint
        if constraint is not None and sample.token_id not in self.output.end_ids:
            if not constraint.advance(sample.token_id):
                raise ConstraintError(f"the answer took token {sample.token_id}, which its constraint does not allow")
            if constraint.done:
                text += self.output.end()
        if self.request.streamed:
            logprobs = () if self.request.params.logprobs is None else (sample.logprob,)
            boxes = self.output.closed_boxes(len(self.spans)) if ">" in text else ()
            scores = self.request.scores.logprobs if self.request.scores and len(self.output.token_ids) == 1 else ()
            piece = StreamPiece(text, (sample.token_id,), None, self.index, logprobs, scores, boxes)
            self.request.pieces.append(piece)

    def complete(self, finish_reason: str) -> None:
        """Store the completion of this answer, and publish its blocks for later prompts."""
        self.sequence.publish(self.token_ids, self.spans, tail=True)
        request, completed = self.request, len(self.output.token_ids)
        spans, prompt = request.prompt.spans, len(request.prompt.token_ids)
        images = tuple(span.image for span in spans)
        completion = Completion(
            text=self.output.text,
            token_ids=tuple(self.output.token_ids),
            finish_reason=finish_reason,
            usage=Usage(prompt, completed, sum(span.length for span in spans), len(spans), request.cached_tokens),
            timings=request.clock.timings(prompt - request.cached_tokens, completed),
            boxes=self.output.boxes(len(images)),
            logprobs=None if request.params.logprobs is None else tuple(self.output.logprobs),
            prompt_logprobs=None if request.scores is None else request.scores.logprobs,
            images=images,
        )
        request.completions[self.index] = completion
        if request.streamed:
            request.pieces.append(StreamPiece("", (), completion, self.index))
