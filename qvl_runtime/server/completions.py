"""POST /v1/completions: texts or token ids are continued as they are, and scored with `echo`."""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qvl_runtime.server.answers import Json, box_json, finish_reason, qvl_json, sum_usages, timings_json
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.fields import COMPLETION, REQUIRED
from qvl_runtime.server.http import Events
from qvl_runtime.server.logprobs import TextLogprobs, prompt_text
from qvl_runtime.server.requests import (
    Exchange,
    answer_limit,
    check_model,
    checked,
    include_usage,
    sampling_params,
    sampling_values,
)
from qvl_runtime.server.service import Service
from qvl_runtime.server.tasks import gathered, joined

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Encoded
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece, TokenLogprob

DEFAULT_TOKENS = 16  # OpenAI's
_ENCODED_AT_ONCE = 8  # prompts of one request, whose images are in memory meanwhile


async def completions(service: Service, body: Any, exchange: Exchange) -> Json | Events:
    """Answer a completion request: one or many prompts, which run together."""
    request = checked(body, COMPLETION, REQUIRED["completion"])
    check_model(request, service.config)
    prompts = _prompts(request["prompt"])
    if len(prompts) > service.config.max_prompts:
        raise invalid(f"prompt has {len(prompts)} prompts; expected at most {service.config.max_prompts}", "prompt")
    echo, streamed, usage = bool(request.get("echo")), bool(request.get("stream")), include_usage(request)
    values = sampling_values(request, COMPLETION, service.engine.engine.tokenizer, service.config, exchange.caller)
    alternatives = request.get("logprobs")
    values["logprobs"] = None if alternatives is None else int(alternatives)
    values["prompt_logprobs"] = values["logprobs"] if echo else None
    max_tokens = int(request.get("max_tokens", DEFAULT_TOKENS))
    if not max_tokens and (not echo or streamed):
        raise invalid("max_tokens is 0, which needs echo: true and no stream; expected at least 1", "max_tokens")
    sampling_params(values)  # before images are fetched
    encoded = await gathered((service.engine.encode(prompt) for prompt in prompts), _ENCODED_AT_ONCE)
    params = []
    for prompt in encoded:
        length = len(prompt.prompt.token_ids)
        limit = answer_limit(max(1, max_tokens), length, service.context, service.config, "max_tokens")
        params.append(sampling_params(values | {"max_tokens": limit}))
        service.metrics.asked(params[-1])
    job = _Job(service, encoded, params, echo, bool(max_tokens))
    return job.events(exchange, usage) if streamed else await job.whole(exchange)


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of a request, as the engine takes them."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], (int, float)):
        prompt = [prompt]
    return [each if isinstance(each, str) else {"token_ids": [int(token) for token in each]} for each in prompt]


class _Job:
    """The prompts of one request, and how they are answered."""

    def __init__(
        self, service: Service, encoded: list[Encoded], params: list[SamplingParams], echo: bool, answered: bool
    ) -> None:
        """answered: whether answers are shown; otherwise the one token that an answer must have is left out."""
        self._engine, self._encoded, self._params = service.engine, encoded, params
        self._echo, self._answered = echo, answered
        self._frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": params[0].adapter or service.config.model_names[0],
        }

    async def whole(self, exchange: Exchange) -> Json:
        """All answers: those to the first prompt, then those to the next."""
        pairs = zip(self._encoded, self._params, strict=True)
        done = await gathered([self._engine.generate(prompt, params) for prompt, params in pairs])
        choices: list[Json] = []
        for number, completion in enumerate(done):
            exchange.finished(completion.answers, self._answered)
            for answer in completion.answers:
                choice = self._choice(number)
                text = choice.begin(completion.prompt_logprobs or ())
                if self._answered:
                    text += choice.add(answer.text, answer.logprobs or ())
                    choice.end(answer)
                finish = finish_reason(answer) if self._answered else "length"
                choices.append({"index": len(choices), **choice.json(text, finish)} | {"qvl": qvl_json(answer)})
        usage = sum_usages([completion.answers for completion in done], self._answered)
        return {**self._frame, "choices": choices, "usage": usage, "timings": timings_json(done[0].timings)}

    async def events(self, exchange: Exchange, usage: bool) -> Events:
        """The chunks of all answers as they come; their indices tell them apart."""
        choices = [self._choice(number) for number, params in enumerate(self._params) for _ in range(params.n)]
        first = [sum(params.n for params in self._params[:number]) for number in range(len(self._params))]
        done: list[dict[int, Completion]] = [{} for _ in self._params]
        pairs = zip(self._encoded, self._params, strict=True)
        streams = [self._engine.stream_batches(prompt, params) for prompt, params in pairs]
        async with aclosing(joined(streams)) as batches:
            async for number, pieces in batches:
                for piece in pieces:
                    if piece.completion is not None:
                        done[number][piece.answer] = piece.completion
                    index = first[number] + piece.answer
                    if (delta := choices[index].delta(piece)) is not None:
                        chunk = {**self._frame, "choices": [{"index": index, **delta}]}
                        yield {**chunk, "usage": None} if usage else chunk
        answers = [[own[i] for i in sorted(own)] for own in done]
        for own in answers:
            exchange.finished(own)
        if usage:
            yield {**self._frame, "choices": [], "usage": sum_usages(answers)}

    def _choice(self, number: int) -> _Choice:
        return _Choice(self._engine.engine.tokenizer, self._encoded[number], self._params[number], self._echo)


class _Choice:
    """One answer as it grows: its text, after that of the prompt with `echo`, and its log probabilities."""

    def __init__(self, tokenizer: Tokenizer, encoded: Encoded, params: SamplingParams, echo: bool) -> None:
        self._tokenizer, self._encoded, self._echo = tokenizer, encoded, echo
        self._writer = None if params.logprobs is None else TextLogprobs(tokenizer)
        self._stop_ids = encoded.prompt.stop_ids.union(params.stop_token_ids)
        self._begun = False

    def begin(self, scores: tuple[TokenLogprob, ...]) -> str:
        """The text before the answer; scores: of the prompt."""
        self._begun = True
        if not self._echo:
            return ""
        token_ids = self._encoded.prompt.token_ids
        if self._writer is not None:
            self._writer.prompt(token_ids, scores)
        return prompt_text(self._tokenizer, token_ids)

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> str:
        """Take the next tokens of the answer, and return their text."""
        if self._writer is not None:
            self._writer.add(text, logprobs)
        return text

    def end(self, completion: Completion) -> None:
        """Take the token that ended the answer, unless a stop string did."""
        ended = completion.finish_reason == "stop" and completion.token_ids[-1] in self._stop_ids
        if self._writer is not None and ended:
            self._writer.end()

    def json(self, text: str, finish: str | None) -> Json:
        """A choice with this text, and the log probabilities that came since the last."""
        logprobs = None if self._writer is None else self._writer.take()
        return {"text": text, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, piece: StreamPiece) -> Json | None:
        """What a piece of a stream adds; None if it shows nothing."""
        text = "" if self._begun else self.begin(piece.prompt_logprobs)
        text += self.add(piece.text, piece.logprobs)
        if piece.completion is not None:
            self.end(piece.completion)
            return self.json(text, finish_reason(piece.completion)) | {"qvl": qvl_json(piece.completion)}
        if not text and not piece.boxes:
            return None
        delta = self.json(text, None)
        if piece.boxes:
            images = tuple(span.image for span in self._encoded.prompt.spans)
            delta["qvl"] = {"boxes": [box_json(box, images) for box in piece.boxes]}
        return delta
