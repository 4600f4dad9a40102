"""From the JSON of a request to sampling parameters: what both ways of asking have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import quoted
from qvl_runtime.server.answers import request_usage
from qvl_runtime.server.checks import check
from qvl_runtime.server.errors import NOT_FOUND, APIError, invalid
from qvl_runtime.server.fields import ABSENT, UNUSED, Field, object_schema

if TYPE_CHECKING:
    from qvl_runtime.prompt.tokenizer import Tokenizer
    from qvl_runtime.schedule.api import Completion, SamplingParams
    from qvl_runtime.server.config import ServerConfig

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    name: str | None  # of the API key; None: no keys are asked for
    salt: str = ""  # of the prefix cache, a secret of this process for each key


@dataclass(slots=True)
class Exchange:
    """One request and what becomes of it, for the log and the metrics."""

    caller: Caller
    usage: dict[str, Any] | None = None
    outcome: str | None = None
    record: Callable[[Sequence[Completion]], None] = lambda answers: None  # for the metrics

    def finished(self, answers: Sequence[Completion], answered: bool = True) -> None:
        """Count the answers of one prompt. answered: whether they are shown, and not only its scores."""
        usage = request_usage(answers)
        before = self.usage or {}
        self.usage = {
            "prompt_tokens": usage["prompt_tokens"] + before.get("prompt_tokens", 0),
            "completion_tokens": usage["completion_tokens"] * answered + before.get("completion_tokens", 0),
        }
        self.outcome = answers[0].finish_reason
        self.record(answers)


def checked(body: Any, fields: Mapping[str, Field], required: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a request that are not null. Raises `APIError` 400, which names the first that is wrong."""
    if not isinstance(body, dict):
        raise invalid(f"the body is {quoted(body)}; expected a JSON object", code="invalid_body")
    check({name: value for name, value in body.items() if name in fields}, object_schema(fields, required), "")
    for name, value in body.items():
        if name in fields or name in UNUSED:
            continue
        if name not in ABSENT:
            raise invalid(f"{quoted(name)} is not a field of this request: leave it out", name[:100], "unknown_field")
        nothing, why = ABSENT[name]
        if not any(value is entry or value == entry for entry in nothing):
            raise invalid(f"{name} is not supported: {why}", name, "unsupported_field")
    return {name: value for name, value in body.items() if name in fields and value is not None}


def check_model(request: Body, config: ServerConfig) -> None:
    """Raise `APIError` 404 for a model that is not served."""
    name = request.get("model")
    if name is not None and name not in config.served and not config.any_model:
        served = ", ".join(config.served)
        message = f"the model {quoted(name)} is not served here; expected {served}"
        raise APIError(404, message, NOT_FOUND, "model", "model_not_found")


def sampling_values(
    request: Body, fields: Mapping[str, Field], tokenizer: Tokenizer, config: ServerConfig, caller: Caller
) -> dict[str, Any]:
    """The values of `SamplingParams` that a request sets, except max_tokens and logprobs."""
    values: dict[str, Any] = {
        field.to: request[name] for name, field in fields.items() if field.to is not None and name in request
    }
    for name in ("stop", "stop_token_ids"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    for name in ("top_k", "seed", "n", "min_tokens"):
        if name in values:
            values[name] = int(values[name])
    if "seed" in values:
        values["seed"] &= 2**63 - 1  # OpenAI's may be negative
    if values.get("n", 1) > config.max_answers:
        raise invalid(f"n is {values['n']}; this server gives at most {config.max_answers} answers", "n")
    if "logit_bias" in request:
        values["logit_bias"] = _biases(request["logit_bias"], tokenizer)
    for name in ("stop_token_ids", "logit_bias"):
        vocab = tokenizer.n_vocab
        if outside := [token for token in values.get(name, ()) if token >= vocab]:
            raise invalid(f"{name} has {outside[0]}; expected token ids from 0 to {vocab - 1}", name, "invalid_value")
    if request.get("model") in config.adapters:
        values["adapter"] = request["model"]
    values |= guide_of(request)
    return values | {"cache_salt": caller.salt, "timeout_s": config.request_timeout_s}


def guide_of(request: Body) -> dict[str, Any]:
    """What the answer must follow, as values of `SamplingParams`. Raises `APIError` 400 for more than one."""
    found: dict[str, dict[str, Any]] = {}
    wanted = request.get("response_format", {"type": "text"})
    if wanted["type"] == "json_object":
        found["response_format"] = {"json_object": True}
    elif wanted["type"] == "json_schema":
        found["response_format"] = {"json_schema": wanted["json_schema"]["schema"]}
    for name, value in request.get("structured_outputs", {}).items():
        if value not in (None, False):
            value = tuple(value) if name == "choice" else value
            found[f"structured_outputs.{name}"] = {"json_schema" if name == "json" else name: value}
    if boxes := request.get("qvl", {}).get("boxes"):
        found["qvl.boxes"] = {"boxes": boxes}
    if len(found) > 1:
        one, other, *_ = found
        raise invalid(f"{other} and {one} are both set: an answer can follow one of them", other, "invalid_value")
    return next(iter(found.values()), {})


def guide_field(body: Any) -> str | None:
    """The field of a request that says what the answer must follow, for errors; None if there is none."""
    names = ("response_format", "structured_outputs", "qvl")
    return next((name for name in names if isinstance(body, dict) and body.get(name)), None)


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """The parameters. Raises `SamplingError`, which names the field."""
    from qvl_runtime.schedule.api import SamplingParams

    return SamplingParams(**values)


def include_usage(request: Body) -> bool:
    """Whether a stream ends with its usage. Raises `APIError` 400 for options of a stream that is none."""
    options = request.get("stream_options")
    if options is not None and not request.get("stream"):
        raise invalid("stream_options needs stream: true", "stream_options")
    return bool((options or {}).get("include_usage"))


def answer_limit(wanted: int | None, prompt_tokens: int, context: int, config: ServerConfig, name: str) -> int:
    """The longest answer to a prompt: what is wanted, by default all that the context has left.

    Raises `APIError` 400, with both numbers, if prompt and answer do not fit the context.
    """
    left = context - prompt_tokens
    if left < 1 or (wanted or 0) > left:
        answer = "an answer of at least one token" if wanted is None else f"{wanted} tokens of {name}"
        message = f"the prompt has {prompt_tokens} tokens, and with {answer} exceeds the context of {context} tokens"
        raise invalid(message, name if left >= 1 else None, "context_length_exceeded")
    limit = left if wanted is None else wanted
    return min(limit, config.max_answer_tokens or limit)


def salt_of(key: str, secret: bytes) -> str:
    """The prefix cache's salt for an API key."""
    return hashlib.blake2b(key.encode(), key=secret, digest_size=16).hexdigest()


def _biases(biases: Mapping[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """Biases by token id, from those by id, as a string of digits, or by text."""
    found: dict[int, float] = {}
    for name, bias in biases.items():
        ids = [int(name)] if name.isascii() and name.isdigit() and len(name) < 10 else tokenizer.encode(name, "none")
        found |= dict.fromkeys(ids, float(bias))
    return found
