"""One request from its encoded prompt to its completions: prefilled once, answered n times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from qvl_runtime.model.qwen_vl import QwenVL
from qvl_runtime.prompt.chatml import EncodedPrompt
from qvl_runtime.prompt.tokenizer import Tokenizer
from qvl_runtime.schedule.answer import Answer
from qvl_runtime.schedule.kv_cache import Sequence
from qvl_runtime.schedule.request import Completion, SamplingParams, StreamPiece, Timings, Usage
from qvl_runtime.schedule.runner import Chunk, Runner, Span
from qvl_runtime.schedule.sampler import Sampler


class Generation:
    """Runs one admitted request. `pieces` may be given up at any time: it holds nothing but the sequence it got."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, encoded: EncodedPrompt, params: SamplingParams, picture_s: float
    ) -> None:
        """params: resolved; picture_s: what encoding the prompt took."""
        self._runner, self._model, self._tokenizer = runner, runner.model, tokenizer
        self._encoded, self._params = encoded, params
        self._timings = Timings(picture_s, 0.0, 0.0, 0.0, len(encoded.token_ids), 0)

    def pieces(self, sequence: Sequence, max_model_len: int) -> Iterator[StreamPiece]:
        """All n answers, one after another; each ends with a piece that carries its completion."""
        ids = self._encoded.token_ids
        logits = self._prefill(sequence)
        for i in range(self._params.n):
            sequence.truncate(len(ids))
            yield from self._answer(i, sequence, logits, max_model_len - len(ids))

    def _prefill(self, sequence: Sequence) -> Tensor:
        """Logits [vocab] after the prompt."""
        start = time.perf_counter()
        spans = picture_spans(self._runner, self._encoded)
        seen = time.perf_counter()
        logits = last_logits(self._runner, self._model, Chunk(sequence, self._encoded.token_ids, spans))
        self._timings = replace(self._timings, vision_s=seen - start, prefill_s=time.perf_counter() - seen)
        return logits

    def _answer(self, index: int, sequence: Sequence, logits: Tensor, room: int) -> Iterator[StreamPiece]:
        params, start = self._params, time.perf_counter()
        if params.seed is not None:
            params = replace(params, seed=params.seed + index)
        sampler = Sampler(params, self._encoded.token_ids, logits.shape[-1], logits.device)
        answer = Answer(self._encoded, params, self._tokenizer, room)
        while True:
            sample = sampler(logits)
            text = answer.add(sample)
            yield StreamPiece(text, (sample.token_id,))
            if answer.finish_reason is not None:
                break
            logits = last_logits(self._runner, self._model, Chunk(sequence, [sample.token_id]))
        yield StreamPiece("", (), self._completion(answer, answer.finish_reason, time.perf_counter() - start))

    def _completion(self, answer: Answer, finish_reason: str, decode_s: float) -> Completion:
        spans, made = self._encoded.spans, len(answer.token_ids)
        pictures = tuple(span.picture for span in spans)
        usage = Usage(len(self._encoded.token_ids), made, sum(span.length for span in spans), len(spans))
        return Completion(
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            finish_reason=finish_reason,
            usage=usage,
            timings=replace(self._timings, decode_s=decode_s, decoded_tokens=made - 1),
            boxes=answer.boxes(len(pictures)),
            logprobs=None if self._params.logprobs is None else tuple(answer.logprobs),
            pictures=pictures,
        )


def picture_spans(runner: Runner, encoded: EncodedPrompt) -> list[Span]:
    """Where the pictures of a prompt stand in it, with their features."""
    features = runner.features([span.picture for span in encoded.spans])
    return [Span(span.start, rows) for span, rows in zip(encoded.spans, features, strict=True)]


def last_logits(runner: Runner, model: QwenVL, chunk: Chunk) -> Tensor:
    """Logits [vocab] after the last row of a chunk."""
    return model.logits(runner.run([chunk])[-1:])[0]
