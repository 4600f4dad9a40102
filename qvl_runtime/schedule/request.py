"""A request in the engine, and the branch of each of its answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from qvl_runtime.prompt.chatml import EncodedPrompt, ImageSpan
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, Timings, Usage
from qvl_runtime.schedule.output import OutputBuilder
from qvl_runtime.schedule.runner import Span
from qvl_runtime.schedule.sampler import Sample, SamplingState
from qvl_runtime.schedule.sequence import Sequence


@dataclass(slots=True, eq=False)
class Clock:
    """Timestamps of a request, in seconds of `time.perf_counter`."""

    image_s: float  # what encoding the prompt took
    submitted: float = field(default_factory=time.perf_counter)
    scheduled: float | None = None
    vision_s: float = 0.0
    first_token: float | None = None

    def timings(self, computed: int, made: int) -> Timings:
        """computed: tokens of the prompt that were not found in the cache; made: tokens of the answer."""
        now = time.perf_counter()
        scheduled = now if self.scheduled is None else self.scheduled
        first = now if self.first_token is None else self.first_token
        return Timings(
            image_s=self.image_s,
            vision_s=self.vision_s,
            prefill_s=max(0.0, first - scheduled - self.vision_s),
            decode_s=now - first,
            prompt_tokens=computed,
            decoded_tokens=max(0, made - 1),
            queue_s=scheduled - self.submitted,
        )


@dataclass(slots=True, eq=False)
class Request:
    """An admitted prompt with n answers. `pieces` waits for its reader, where it has one."""

    number: int  # in order of arrival
    prompt: EncodedPrompt
    params: SamplingParams  # resolved
    clock: Clock
    tag: Any = None  # the caller's
    streamed: bool = False
    held: bool = False  # by a reader that is too far behind: it keeps its place and takes no part in steps
    cached_tokens: int = 0
    branches: list[Branch] = field(default_factory=list)
    completions: dict[int, Completion] = field(default_factory=dict)  # by answer
    pieces: deque[StreamPiece] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return len(self.completions) == self.params.n

    @property
    def deadline(self) -> float | None:
        """In seconds of `time.perf_counter`."""
        timeout = self.params.timeout_s
        return None if timeout is None else self.clock.submitted + timeout

    def completion(self) -> Completion:
        """All answers, the first with the others in `alternatives`; for a request that is done."""
        first, *others = (self.completions[i] for i in range(self.params.n))
        return replace(first, alternatives=tuple(others))


class Branch:
    """One answer: the tokens known so far, and the sequence that holds those computed."""

    def __init__(
        self, request: Request, index: int, sequence: Sequence, output: OutputBuilder, sampling_state: SamplingState
    ) -> None:
        self.request, self.index = request, index
        self.sequence, self.output, self.sampling_state = sequence, output, sampling_state
        self.running = False  # the scheduler's: it has blocks and takes part in steps
        self.token_ids: list[int] = list(request.prompt.token_ids)
        self.features: dict[int, Tensor] = {}  # of the images that are being prefilled, by the span's number

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served."""
        return self.request.number, self.index

    @property
    def pending(self) -> int:
        """Known tokens that are not computed: 1 while decoding, more during prefill."""
        return len(self.token_ids) - self.sequence.length

    @property
    def spans(self) -> Items[ImageSpan]:
        return self.request.prompt.spans

    def uncovered(self, count: int) -> list[tuple[int, ImageSpan]]:
        """The images, by number, with rows among the next `count` tokens."""
        start = self.sequence.length
        end = start + count
        return [(i, s) for i, s in enumerate(self.spans) if s.start < end and start < s.start + s.length]

    def chunk_spans(self, count: int) -> list[Span]:
        """What replaces the embeddings of images among the next `count` tokens; `features` must hold them."""
        start, spans = self.sequence.length, []
        for i, span in self.uncovered(count):
            first, last = max(span.start, start), min(span.start + span.length, start + count)
            spans.append(Span(first - start, self.features[i][first - span.start : last - span.start]))
        return spans

    def computed(self) -> None:
        """The step is over: what is full can be found by others, and features that were used are let go."""
        self.sequence.publish(self.token_ids, self.spans)
        if self.features:
            live = dict(self.uncovered(self.pending))
            self.features = {i: rows for i, rows in self.features.items() if i in live}

    def add(self, sample: Sample) -> None:
        """Take the next token of the answer."""
        clock = self.request.clock
        if clock.first_token is None:
            clock.first_token = time.perf_counter()
        self.token_ids.append(sample.token_id)
        text = self.output.add(sample)
        if self.request.streamed:
            self.request.pieces.append(StreamPiece(text, (sample.token_id,)))

    def complete(self, finish_reason: str) -> None:
        """Hand the answer over; what was computed for it stays to be found."""
        self.sequence.publish(self.token_ids, self.spans, tail=True)
        request, made = self.request, len(self.output.token_ids)
        spans, prompt = request.prompt.spans, len(request.prompt.token_ids)
        images = tuple(span.image for span in spans)
        completion = Completion(
            text=self.output.text,
            token_ids=tuple(self.output.token_ids),
            finish_reason=finish_reason,
            usage=Usage(prompt, made, sum(span.length for span in spans), len(spans), request.cached_tokens),
            timings=request.clock.timings(prompt - request.cached_tokens, made),
            boxes=self.output.boxes(len(images)),
            logprobs=None if request.params.logprobs is None else tuple(self.output.logprobs),
            images=images,
        )
        request.completions[self.index] = completion
        if request.streamed:
            request.pieces.append(StreamPiece("", (), completion))
