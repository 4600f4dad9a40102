"""POST /v1/chat/completions: messages with images in, an answer with its boxes out, whole or streamed."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from qvl_runtime.server.answers import (
    Json,
    box_json,
    finish_reason,
    pictures_json,
    qvl_json,
    request_usage,
    timings_json,
)
from qvl_runtime.server.chat_form import alternatives, chat_answer, frame, messages_of
from qvl_runtime.server.fields import CHAT, REQUIRED
from qvl_runtime.server.http import Events
from qvl_runtime.server.logprobs import ChatLogprobs
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

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Encoded
    from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece


async def chat(service: Service, body: Any, exchange: Exchange) -> Json | Events:
    """Answer a chat request, which is checked and whose images are read before anything is sent."""
    request = checked(body, CHAT, REQUIRED["chat"])
    check_model(request, service.config)
    engine = service.engine.engine
    values = sampling_values(request, CHAT, engine.tokenizer, service.config, exchange.caller)
    values["logprobs"], usage = alternatives(request), include_usage(request)
    sampling_params(values)  # before images are fetched
    encoded = await service.engine.encode(messages_of(request))
    name = "max_completion_tokens" if "max_completion_tokens" in request else "max_tokens"
    wanted = request.get(name)
    values["max_tokens"] = answer_limit(
        None if wanted is None else int(wanted), len(encoded.prompt.token_ids), service.context, service.config, name
    )
    params = sampling_params(values)
    service.metrics.asked(params)
    if request.get("stream"):
        return _Stream(service, params, usage, exchange).events(encoded)
    started = frame(params.adapter or service.config.model_names[0])
    completion = await service.engine.generate(encoded, params)
    exchange.finished(completion.answers)
    return chat_answer(completion, engine.tokenizer, started)


class _Stream:
    """The chunks of one streamed answer, or of n."""

    def __init__(self, service: Service, params: SamplingParams, usage: bool, exchange: Exchange) -> None:
        self._service, self._params, self._usage, self._exchange = service, params, usage, exchange
        self._frame = {**frame(params.adapter or service.config.model_names[0]), "object": "chat.completion.chunk"}
        self._logprobs = [ChatLogprobs(service.engine.engine.tokenizer) for _ in range(params.n)]
        self._images: tuple[Any, ...] = ()

    async def events(self, encoded: Encoded) -> Events:
        """The role of each answer, its text as it comes, its finish reason, and the usage if it was asked for."""
        self._images = tuple(span.image for span in encoded.prompt.spans)
        completions: dict[int, Completion] = {}
        begun: set[int] = set()
        async with aclosing(self._service.engine.stream_batches(encoded, self._params)) as batches:
            async for batch in batches:
                for piece in _joined(batch):
                    if piece.answer not in begun:
                        begun.add(piece.answer)
                        yield self._chunk(piece.answer, {"role": "assistant", "content": None})
                    if (chunk := self._text(piece)) is not None:
                        yield chunk
                    if piece.completion is not None:
                        completions[piece.answer] = piece.completion
                        delta = {"qvl": qvl_json(piece.completion)}
                        yield self._chunk(piece.answer, delta, finish=finish_reason(piece.completion))
        answers = [completions[index] for index in sorted(completions)]
        self._exchange.finished(answers)
        if self._usage:
            timings = timings_json(answers[0].timings)
            yield {**self._frame, "choices": [], "usage": request_usage(answers), "timings": timings}

    def _text(self, piece: StreamPiece) -> Json | None:
        """The chunk of a piece; None if it shows nothing."""
        requested = self._params.logprobs is not None
        shown = self._logprobs[piece.answer].add(piece.text, piece.logprobs) if requested else []
        if not (piece.text or piece.boxes or shown):
            return None
        delta: Json = {"content": piece.text}
        if piece.boxes:
            boxes = [box_json(box, self._images) for box in piece.boxes]
            delta["qvl"] = {"boxes": boxes, "pictures": pictures_json(self._images)}
        return self._chunk(piece.answer, delta, {"content": shown, "refusal": None} if requested else None)

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._frame, "choices": [choice]}
        return {**chunk, "usage": None} if self._usage else chunk


def _joined(batch: list[StreamPiece]) -> list[StreamPiece]:
    """Join the pieces of each answer that came together: one event has what the network did not take in time."""
    joined: dict[int, StreamPiece] = {}
    for piece in batch:
        if (earlier := joined.get(piece.answer)) is not None:
            piece = piece._replace(
                text=earlier.text + piece.text,
                token_ids=earlier.token_ids + piece.token_ids,
                logprobs=earlier.logprobs + piece.logprobs,
                boxes=earlier.boxes + piece.boxes,
            )
        joined[piece.answer] = piece
    return list(joined.values())
