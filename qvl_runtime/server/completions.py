"""POST /v1/completions: texts or token ids are continued as they are, and scored with `echo`."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from qvl_runtime.server.answers import Json, sum_usages, timings_json
from qvl_runtime.server.completion_form import Choice, asked_logprobs, choices_of, frame, prompts_of, token_limit
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.fields import COMPLETION, REQUIRED
from qvl_runtime.server.http import Events
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
    from qvl_runtime.schedule.api import Completion, SamplingParams

_ENCODED_AT_ONCE = 8  # prompts of one request, whose images are in memory meanwhile


async def completions(service: Service, body: Any, exchange: Exchange) -> Json | Events:
    """Answer a completion request: one or many prompts, which run together."""
    request = checked(body, COMPLETION, REQUIRED["completion"])
    check_model(request, service.config)
    prompts = prompts_of(request["prompt"])
    if len(prompts) > service.config.max_prompts:
        raise invalid(f"prompt has {len(prompts)} prompts; expected at most {service.config.max_prompts}", "prompt")
    echo, streamed, usage = bool(request.get("echo")), bool(request.get("stream")), include_usage(request)
    values = sampling_values(request, COMPLETION, service.engine.engine.tokenizer, service.config, exchange.caller)
    values |= asked_logprobs(request)
    max_tokens = token_limit(request)
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


class _Job:
    """The prompts of one request, and how they are answered."""

    def __init__(
        self, service: Service, encoded: list[Encoded], params: list[SamplingParams], echo: bool, answered: bool
    ) -> None:
        """answered: whether answers are shown; otherwise the one token that an answer must have is left out."""
        self._engine, self._encoded, self._params = service.engine, encoded, params
        self._echo, self._answered = echo, answered
        self._frame = frame(params[0].adapter or service.config.model_names[0])

    async def whole(self, exchange: Exchange) -> Json:
        """All answers: those to the first prompt, then those to the next."""
        pairs = zip(self._encoded, self._params, strict=True)
        done = await gathered([self._engine.generate(prompt, params) for prompt, params in pairs])
        choices: list[Json] = []
        for number, completion in enumerate(done):
            exchange.finished(completion.answers, self._answered)
            for choice in choices_of(completion, partial(self._choice, number), self._answered):
                choices.append({"index": len(choices), **choice})
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

    def _choice(self, number: int) -> Choice:
        return Choice(self._engine.engine.tokenizer, self._encoded[number].prompt, self._params[number], self._echo)
