"""POST /tokenize, /detokenize and /v1/chat/completions/input_tokens: texts to token ids and back, without the model."""

from __future__ import annotations

import asyncio
from typing import Any

from qvl_runtime.prompt.tokenizer import Allowed
from qvl_runtime.server.answers import Json
from qvl_runtime.server.chat_form import messages_of
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.fields import COUNT, DETOKENIZE, TOKENIZE
from qvl_runtime.server.logprobs import token_bytes
from qvl_runtime.server.requests import Exchange, check_model, checked
from qvl_runtime.server.service import Service


async def tokenize(service: Service, body: Any, exchange: Exchange) -> Json:
    """The token ids of a text, or of messages in the chat format up to the answer; an image counts its tokens."""
    request = checked(body, TOKENIZE, ())
    check_model(request, service.config)
    given = [name for name in ("prompt", "content", "messages") if name in request]
    if len(given) != 1:
        raise invalid('expected one of "prompt", "content" (a text) or "messages"', "prompt", "missing_field")
    ids = await _token_ids(service, request)
    answer: Json = {"tokens": ids, "count": len(ids), "max_model_len": service.context}
    if request.get("return_token_strs"):
        tokenizer = service.engine.engine.tokenizer
        answer["token_strs"] = [token_bytes(tokenizer, token).decode("utf-8", "replace") for token in ids]
    return answer


async def detokenize(service: Service, body: Any, exchange: Exchange) -> Json:
    """The text of token ids."""
    request = checked(body, DETOKENIZE, ("tokens",))
    check_model(request, service.config)
    tokenizer, ids = service.engine.engine.tokenizer, [int(token) for token in request["tokens"]]
    outside = [token for token in ids if token >= tokenizer.n_vocab]
    if outside:
        raise invalid(f"tokens holds {outside[0]}; expected ids from 0 to {tokenizer.n_vocab - 1}", "tokens")
    text = b"".join(token_bytes(tokenizer, token) for token in ids).decode("utf-8", "replace")
    return {"prompt": text, "content": text}


async def input_tokens(service: Service, body: Any, exchange: Exchange) -> Json:
    """How many tokens messages have, images included, which are not read."""
    if not isinstance(body, dict):
        raise invalid("the body is no JSON object", code="invalid_body")
    known = {name: body[name] for name in COUNT if name in body}  # whatever else a chat request has changes nothing
    request = checked(known, COUNT, ("messages",))
    check_model(request, service.config)
    return {"object": "response.input_tokens", "input_tokens": len(await _token_ids(service, request))}


async def _token_ids(service: Service, request: Json) -> list[int]:
    engine = service.engine.engine
    if "messages" in request:
        draft = await asyncio.to_thread(engine.draft, messages_of(request))
        return draft.segment.ids
    text = str(request.get("prompt", request.get("content")))
    allowed: Allowed = "all" if request.get("parse_special", True) else "none"
    return await asyncio.to_thread(engine.tokenizer.encode, text, allowed)
