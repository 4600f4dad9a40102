"""OpenAI's batch form: lines with custom_id, method, url and body, and their answers.

It is read by `qvl batch` next to the command's own form, so that a file made for that API works as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime.errors import PromptError, quoted

if TYPE_CHECKING:
    from qvl_runtime.engine.engine import Encoded, Engine
    from qvl_runtime.schedule.api import Completion, SamplingParams
    from qvl_runtime.server.fields import Field

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
_KEYS = {"custom_id", "method", "url", "body"}


def is_openai(record: Mapping[str, Any]) -> bool:
    """Whether a record is in OpenAI's form."""
    return "custom_id" in record or "url" in record


class Asked(NamedTuple):
    """A record in OpenAI's form, as the engine takes it."""

    prompt: Any
    params: SamplingParams
    url: str
    echo: bool = False  # /v1/completions: the prompt comes before the answer
    answered: bool = True  # and otherwise only its scores are asked for

    def answer(self, completion: Completion, encoded: Encoded, engine: Engine) -> dict[str, Any]:
        """The fields of its answer besides the names. encoded: the prompt."""
        from qvl_runtime.server.answers import sum_usages, timings_json
        from qvl_runtime.server.chat_form import chat_answer
        from qvl_runtime.server.chat_form import frame as chat_frame
        from qvl_runtime.server.completion_form import Choice, choices_of, frame

        if self.url == CHAT_URL:
            return _response(200, chat_answer(completion, engine.tokenizer, chat_frame(engine.folder.name)))

        def begin() -> Choice:
            return Choice(engine.tokenizer, encoded.prompt, self.params, self.echo)

        found = choices_of(completion, begin, self.answered)
        body = frame(engine.folder.name) | {
            "choices": [{"index": index, **choice} for index, choice in enumerate(found)],
            "usage": sum_usages([completion.answers], self.answered),
            "timings": timings_json(completion.timings),
        }
        return _response(200, body)


def parse_openai(record: Mapping[str, Any], engine: Engine, params: SamplingParams) -> Asked:
    """A record as the engine takes it: `params` updated by its body. Raises `PromptError` or `SamplingError`."""
    if unknown := sorted(set(record) - _KEYS):
        raise PromptError(f"the request has {quoted(unknown[0])}; expected {', '.join(sorted(_KEYS))}")
    url = record.get("url")
    if record.get("method", "POST") != "POST" or url not in (CHAT_URL, TEXT_URL):
        why = ": these checkpoints have no embeddings" if url == "/v1/embeddings" else ""
        asked = f"{quoted(record.get('method'))} {quoted(url)}"
        raise PromptError(f"the request is for {asked}{why}; expected 'POST' {CHAT_URL!r} or {TEXT_URL!r}")
    from qvl_runtime.server.errors import APIError

    try:
        read = _chat if url == CHAT_URL else _text
        return read(record.get("body"), engine, params)
    except APIError as error:
        raise PromptError(error.message) from None


def _chat(body: Any, engine: Engine, params: SamplingParams) -> Asked:
    from qvl_runtime.server.chat_form import alternatives, messages_of
    from qvl_runtime.server.fields import CHAT, REQUIRED

    request, values = _checked(body, CHAT, REQUIRED["chat"], engine)
    values["logprobs"] = alternatives(request)
    wanted = request.get("max_completion_tokens", request.get("max_tokens", params.max_tokens))
    values["max_tokens"] = engine.max_model_len if wanted is None else int(wanted)  # ends with the context
    return Asked(messages_of(request), _updated(params, values), CHAT_URL)


def _text(body: Any, engine: Engine, params: SamplingParams) -> Asked:
    from qvl_runtime.server.completion_form import DEFAULT_TOKENS, asked_logprobs, prompts_of, token_limit
    from qvl_runtime.server.fields import COMPLETION, REQUIRED

    request, values = _checked(body, COMPLETION, REQUIRED["completion"], engine)
    prompts = prompts_of(request["prompt"])
    if len(prompts) != 1:
        raise PromptError(f"prompt has {len(prompts)} prompts; expected one: write a line for each")
    limit = token_limit({"max_tokens": params.max_tokens or DEFAULT_TOKENS} | request)
    values |= asked_logprobs(request) | {"max_tokens": max(1, limit)}
    return Asked(prompts[0], _updated(params, values), TEXT_URL, bool(request.get("echo")), bool(limit))


def _checked(
    body: Any, fields: Mapping[str, Field], required: tuple[str, ...], engine: Engine
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a body, and the values of `SamplingParams` that they set."""
    from qvl_runtime.server.config import ServerConfig
    from qvl_runtime.server.requests import Caller, checked, sampling_values

    request = checked(body, fields, required)
    if request.get("stream"):
        raise PromptError("stream is true, which a batch has no use for: leave it out")
    return request, sampling_values(request, fields, engine.tokenizer, ServerConfig(max_answers=128), Caller(None))


def _updated(params: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    return replace(params, **{name: value for name, value in values.items() if value is not None})


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
