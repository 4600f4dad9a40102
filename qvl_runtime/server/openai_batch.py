"""OpenAI's batch form: lines with custom_id, method, url and body, and their answers.

It is read by `qvl batch` next to the command's own form, so that a file made for that API works as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import PromptError, quoted

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams

URL = "/v1/chat/completions"
_KEYS = {"custom_id", "method", "url", "body"}


def is_openai(record: Mapping[str, Any]) -> bool:
    """Whether a record is in OpenAI's form."""
    return "custom_id" in record or "url" in record


def parse_openai(record: Mapping[str, Any], engine: Engine, params: SamplingParams) -> tuple[Any, SamplingParams]:
    """The prompt of a record, and `params` updated by its body. Raises `PromptError` or `SamplingError`."""
    if unknown := sorted(set(record) - _KEYS):
        raise PromptError(f"the request has {quoted(unknown[0])}; expected {', '.join(sorted(_KEYS))}")
    if record.get("method", "POST") != "POST" or record.get("url") != URL:
        asked = f"{quoted(record.get('method'))} {quoted(record.get('url'))}"
        raise PromptError(f"the request is for {asked}; expected 'POST' {URL!r}")
    from qvl_runtime.server.chat_form import alternatives, messages_of
    from qvl_runtime.server.config import ServerConfig
    from qvl_runtime.server.errors import APIError
    from qvl_runtime.server.fields import CHAT, REQUIRED
    from qvl_runtime.server.requests import Caller, checked, sampling_values

    try:
        request = checked(record.get("body"), CHAT, REQUIRED["chat"])
        if request.get("stream"):
            raise PromptError("stream is true, which a batch has no use for: leave it out")
        values = sampling_values(request, CHAT, engine.tokenizer, ServerConfig(max_answers=128), Caller(None))
        values["logprobs"] = alternatives(request)
        wanted = request.get("max_completion_tokens", request.get("max_tokens", params.max_tokens))
        values["max_tokens"] = engine.max_model_len if wanted is None else int(wanted)  # ends with the context
        given = {name: value for name, value in values.items() if value is not None}
        return messages_of(request), replace(params, **given)
    except APIError as error:
        raise PromptError(error.message) from None


def openai_answer(completion: Completion, engine: Engine) -> dict[str, Any]:
    """The fields of an answer besides its names."""
    from qvl_runtime.server.chat_form import chat_answer, frame

    body = chat_answer(completion, engine.tokenizer, frame(engine.folder.name))
    return _response(200, body)


def openai_error(message: str) -> dict[str, Any]:
    """The fields of an answer to a request that failed."""
    from qvl_runtime.server.errors import invalid

    return _response(400, invalid(message).body())


def openai_names(index: int, custom_id: Any) -> dict[str, Any]:
    """The names of an answer; the index lets an interrupted run be continued."""
    return {"index": index, "id": f"batch_req_{index}", "custom_id": custom_id}


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    request_id = body.get("id")
    return {"response": {"status_code": status, "request_id": request_id, "body": body}, "error": None}
