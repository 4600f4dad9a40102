"""Build an answer token by token: detokenize it, match stop strings, find its finish reason."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import replace

from qvl_runtime.prompt.box_calibration import BoxJudge
from qvl_runtime.prompt.boxes import Box, parse_boxes
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.streaming import StopMatcher, StreamDecoder
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.api import SamplingParams, TokenLogprob
from qvl_runtime.schedule.sampler import Sample


class OutputBuilder:
    """Collects the samples of one answer; `finish_reason` is None until it ends."""

    def __init__(
        self, prompt: EncodedPrompt, params: SamplingParams, tokenizer: Tokenizer, max_tokens: int, judge: BoxJudge
    ) -> None:
        """params: resolved; max_tokens: tokens that fit the context after the prompt; judge: of its boxes."""
        self._judge = judge
        eos_ids = frozenset({tokenizer.endoftext}) if params.end_of_text_only else prompt.stop_ids
        eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.end_ids = eos_ids | set(params.stop_token_ids)
        self._least = params.min_tokens
        sequences = () if params.ignore_eos or params.end_of_text_only else prompt.stop_sequences
        self._matcher = StopMatcher((*params.stop, *(tokenizer.decode(ids) for ids in sequences)))
        self._decoder = StreamDecoder(tokenizer)
        self._limit = min(params.max_tokens or max_tokens, max_tokens)
        self._ends: list[int] = []  # characters decoded up to and including each token
        self._shown: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self._in_boxes: dict[int, dict[int, float]] = {}  # what the tokens within boxes could have been, by position
        self._closed = 0  # boxes that `closed_boxes` has returned

    def add(self, sample: Sample) -> str:
        """Append a token and return the text it adds, empty while a character or a stop string is incomplete."""
        self.token_ids.append(sample.token_id)
        self.logprobs.append(sample.logprob)
        if sample.in_box is not None:
            self._in_boxes[len(self.token_ids) - 1] = sample.in_box
        if sample.token_id in self.end_ids:
            self._ends.append(self._ends[-1] if self._ends else 0)
            self.finish_reason = "stop"
            return self._show(self._rest())
        decoded = self._decoder.feed(sample.token_id)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(decoded))
        text, stopped = self._feed(decoded)
        if stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._limit:
            self.finish_reason = "length"
            text += self._rest()
        return self._show(text)

    def end(self) -> str:
        """End an answer that its constraint has brought to its end; returns the text that was held back."""
        if self.finish_reason == "stop":
            return ""
        rest = "" if self.finish_reason == "length" else self._show(self._rest())
        self.finish_reason = "stop"
        return rest

    @property
    def remaining(self) -> int:
        """How many more tokens the answer may have."""
        return self._limit - len(self.token_ids)

    @property
    def text(self) -> str:
        """The text so far, without stop strings."""
        return "".join(self._shown)

    def closed_boxes(self, images: int) -> tuple[Box, ...]:
        """Return the boxes whose end tag the text has had since the last call, repetitions left out."""
        text = self.text
        end = max(text.rfind(tag) + len(tag) if tag in text else 0 for tag in ("</box>", "</quad>"))
        boxes = self._parsed(text[:end], images)[self._closed :]
        self._closed += len(boxes)
        return tuple(map(self._scored, boxes))

    def boxes(self, images: int) -> tuple[Box, ...]:
        """Parse the boxes of the text, each scored by the probabilities of its tokens; images: of the prompt."""
        return tuple(map(self._scored, self._parsed(self.text, images)))

    def _parsed(self, text: str, images: int) -> list[Box]:
        return parse_boxes(text, image_index=0 if images == 1 else None)

    def _scored(self, box: Box) -> Box:
        """A box with its scores: `score` is the geometric mean of the probabilities of the tokens of its characters."""
        if box.span is None:
            return box
        first, last = bisect_right(self._ends, box.span[0]), bisect_left(self._ends, box.span[1])
        at = range(first, min(last + 1, len(self._ends)))
        logprobs = [self.logprobs[i].logprob for i in at]
        if not logprobs:
            return box
        details = self._judge.judge([self.token_ids[i] for i in at], logprobs, [self._in_boxes.get(i) for i in at])
        return replace(box, score=math.exp(sum(logprobs) / len(logprobs)), details=details)

    def _feed(self, text: str) -> tuple[str, bool]:
        """Look for stop strings, in text that begins after the least tokens of an answer. Returns text to show."""
        return self._matcher.feed(text) if len(self.token_ids) > self._least else (text, False)

    def _rest(self) -> str:
        text, stopped = self._feed(self._decoder.flush())
        return text if stopped else text + self._matcher.flush()

    def _show(self, text: str) -> str:
        self._shown.append(text)
        return text
