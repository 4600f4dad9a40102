"""The form of chat requests and answers, without HTTP: what the server and `qvl batch` have in common."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from qvl_runtime.server.answers import Json, finish_reason, qvl_json, request_usage, timings_json
from qvl_runtime.server.errors import invalid
from qvl_runtime.server.logprobs import ChatLogprobs

if TYPE_CHECKING:
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import Completion


def messages_of(request: Json) -> list[Json]:
    """The messages of a request, as the engine's prompts have them."""
    messages = []
    for message in request["messages"]:
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content")
        messages.append({**message, "role": role, "content": "" if content is None and role == "system" else content})
    return messages


def alternatives(request: Json) -> int | None:
    """The number of alternatives for each token; None without log probabilities. Raises `APIError` 400."""
    if request.get("logprobs"):
        return int(request.get("top_logprobs", 0))
    if request.get("top_logprobs"):
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return None


def frame(model: str) -> Json:
    """What an answer, or each chunk of one, begins with."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def chat_answer(completion: Completion, tokenizer: Tokenizer, begun: Json) -> Json:
    """A whole answer. begun: its `frame`."""
    choices = []
    for index, answer in enumerate(completion.answers):
        message = {"role": "assistant", "content": answer.text, "refusal": None, "qvl": qvl_json(answer)}
        logprobs = None
        if answer.logprobs is not None:
            logprobs = {"content": ChatLogprobs(tokenizer).add(answer.text, answer.logprobs), "refusal": None}
        choices.append(
            {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(answer)}
        )
    return {
        **begun,
        "object": "chat.completion",
        "choices": choices,
        "usage": request_usage(completion.answers),
        "timings": timings_json(completion.timings),
    }
