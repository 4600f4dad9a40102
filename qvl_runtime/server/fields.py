"""The one table of fields that requests have: what is checked, what /openapi.json says, and where a value goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qvl_runtime.config.checks import LARGEST_FLOAT32, LARGEST_INT, SMALLEST_FLOAT32
from qvl_runtime.schedule.guide_checks import MAX_OPTIONS

MAX_TOP_LOGPROBS = 100
MAX_TEXT = 16 * 2**20  # characters of one string; the limit on bodies comes first


class Field(NamedTuple):
    """A field of a request."""

    schema: Mapping[str, Any]
    does: str
    to: str | None = None  # the field of `SamplingParams` that it sets


def nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, or null, which is as if the field was absent."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def whole(low: int, high: int = LARGEST_INT) -> dict[str, Any]:
    """A whole number, or null."""
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def real(low: float, high: float = LARGEST_FLOAT32) -> dict[str, Any]:
    """A number, or null."""
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


STRING = {"type": "string", "maxLength": MAX_TEXT}
FLAG = {"type": ["boolean", "null"]}
NUMBERS = {"type": "array", "items": {"type": "number"}, "maxItems": 4096}


def _object(kind: str, **properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object of one type, with these properties and no others."""
    own = {"type": {"const": kind}, **properties}
    return {"type": "object", "properties": own, "required": list(own), "additionalProperties": False}


def _part(kind: str, required: tuple[str, ...], **properties: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message; keys of clients that change nothing are checked where prompts are encoded."""
    return {"type": "object", "properties": {"type": {"const": kind}, **properties}, "required": ["type", *required]}


_IMAGE_URL = {
    "type": "object",
    "properties": {"url": {**STRING, "minLength": 1}, "detail": {"type": ["string", "null"]}},
    "required": ["url"],
}
_SHAPES = {"type": "array", "maxItems": 4096}
PARTS = [
    _part("text", ("text",), text=STRING),
    _part("image_url", ("image_url",), image_url=_IMAGE_URL),
    _part("box", (), box=_SHAPES, ref={"type": ["string", "null"]}),
    _part("quad", (), quad=_SHAPES, ref={"type": ["string", "null"]}),
]
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [STRING, {"type": "array", "items": {"anyOf": PARTS}}, {"type": "null"}]},
    },
    "required": ["role"],
}

SAMPLING = {
    "temperature": Field(real(0), "0 is greedy. Default: the checkpoint's.", "temperature"),
    "top_p": Field(real(SMALLEST_FLOAT32, 1), "Sample from the likeliest tokens with this total probability.", "top_p"),
    "top_k": Field(whole(0), "Sample from this many of the likeliest tokens; 0 is off.", "top_k"),
    "min_p": Field(real(0, 1), "Drop tokens less likely than this fraction of the likeliest.", "min_p"),
    "repetition_penalty": Field(real(SMALLEST_FLOAT32), "Above 1: against tokens seen before.", "repetition_penalty"),
    "presence_penalty": Field(real(-2, 2), "Against tokens that the answer has.", "presence_penalty"),
    "frequency_penalty": Field(real(-2, 2), "The same, for each time that it has them.", "frequency_penalty"),
    "min_tokens": Field(whole(0), "The answer does not end before it has this many tokens.", "min_tokens"),
    "seed": Field(whole(-LARGEST_INT - 1), "The same seed gives the same answer.", "seed"),
    "stop": Field(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 1000},
                {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 1000}, "maxItems": 64},
                {"type": "null"},
            ]
        },
        "The answer ends before one of these.",
        "stop",
    ),
    "stop_token_ids": Field(
        {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": 2**31}, "maxItems": 128},
        "The answer ends with one of these tokens.",
        "stop_token_ids",
    ),
    "ignore_eos": Field(FLAG, "Only `stop`, `stop_token_ids` and the limit end the answer.", "ignore_eos"),
    "logit_bias": Field(
        {"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "Added to the logits of tokens, given by id, or by a text whose tokens all get it.",
    ),
    "n": Field(whole(1, 128), "How many answers, sampled with seeds that follow one another.", "n"),
}
_SCHEMA = {"type": "object", "description": "A JSON Schema."}
GUIDES = {
    "response_format": Field(
        {
            "anyOf": [
                _object("text"),
                _object("json_object"),
                _object(
                    "json_schema",
                    json_schema={
                        "type": "object",
                        "properties": {
                            "name": {"type": ["string", "null"]},
                            "description": {"type": ["string", "null"]},
                            "schema": _SCHEMA,
                            "strict": FLAG,
                        },
                        "required": ["schema"],
                        "additionalProperties": False,
                    },
                ),
                {"type": "null"},
            ]
        },
        "Hold the answer to JSON, or to a JSON Schema, which is always followed strictly.",
    ),
    "structured_outputs": Field(
        {
            "type": ["object", "null"],
            "properties": {
                "json": {"anyOf": [_SCHEMA, {"type": "string"}, {"type": "null"}]},
                "json_object": FLAG,
                "regex": {"type": ["string", "null"]},
                "choice": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": MAX_OPTIONS},
                "grammar": {"type": ["string", "null"]},
            },
            "additionalProperties": False,
        },
        "Hold the answer to one of these, in vLLM's spelling.",
    ),
    "qvl": Field(
        {
            "type": ["object", "null"],
            "properties": {"boxes": {"type": ["string", "null"], "enum": ["force", "allow", None]}},
            "additionalProperties": False,
        },
        "boxes: 'force' for boxes and nothing else, 'allow' for text whose boxes are well formed.",
    ),
}
STREAMING = {
    "stream": Field(FLAG, "Send the answer as it is generated, as server-sent events."),
    "stream_options": Field(
        {
            "type": ["object", "null"],
            "properties": {"include_usage": FLAG, "include_obfuscation": FLAG},
            "additionalProperties": False,
        },
        "include_usage: end the stream with a chunk that has the usage.",
    ),
}
MODEL = {"model": Field({"type": ["string", "null"], "maxLength": 1000}, "An id of /v1/models. Default: the first.")}

CHAT = {
    **MODEL,
    "messages": Field(
        {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 4096},
        "The conversation. Its last message is the user's.",
    ),
    "max_completion_tokens": Field(whole(1), "The longest answer. Default: what the context has left."),
    "max_tokens": Field(whole(1), "The same under its older name."),
    **SAMPLING,
    **GUIDES,
    "logprobs": Field(FLAG, "Return the log probability of each token."),
    "top_logprobs": Field(whole(0, MAX_TOP_LOGPROBS), "And that of this many alternatives; needs logprobs."),
    **STREAMING,
}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31}, "minItems": 1}
COMPLETION = {
    **MODEL,
    "prompt": Field(
        {
            "anyOf": [
                STRING,
                {"type": "array", "items": STRING, "minItems": 1},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ]
        },
        "A text with Qwen's tags, token ids, or a list of either.",
    ),
    "max_tokens": Field(whole(0), "The longest answer, by default 16; 0 with echo scores the prompt."),
    **SAMPLING,
    **GUIDES,
    "logprobs": Field(whole(0, MAX_TOP_LOGPROBS), "Return log probabilities, and those of this many alternatives."),
    "echo": Field(FLAG, "Repeat the prompt before the answer; with logprobs, those of its tokens, too."),
    **STREAMING,
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31}, "maxItems": 2**20}
TOKENIZE = {
    **MODEL,
    "prompt": Field(STRING, "A text.", None),
    "content": Field(STRING, "The same under another name.", None),
    "messages": Field(CHAT["messages"].schema, "Or a conversation, in the chat format up to the answer.", None),
    "parse_special": Field(FLAG, "Whether special tokens in a text are such. Default: true."),
    "return_token_strs": Field(FLAG, "Return the text of each token as well."),
}
DETOKENIZE = {**MODEL, "tokens": Field(_IDS, "Token ids.")}
COUNT = {**MODEL, "messages": CHAT["messages"]}
_CORNERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1000}, "minItems": 4, "maxItems": 4}
LOCATE = {
    **MODEL,
    "image_url": Field(_IMAGE_URL, "The image, as a message has it."),
    "phrase": Field({**STRING, "minLength": 1}, "What to look for, such as 'the red car'."),
    "k": Field(whole(1, 32), "How many boxes to find at most, the likeliest first. Default: 1."),
    "boxes": Field(
        {"type": ["array", "null"], "items": _CORNERS, "maxItems": 256},
        "Boxes [x1, y1, x2, y2] on the grid of 1000 to score instead.",
    ),
    "question": Field(
        {"type": ["string", "null"], "maxLength": MAX_TEXT},
        "A question that the box answers, with {} for the phrase. Default: the calibration's, or none.",
    ),
}
REQUIRED = {
    "locate": ("image_url", "phrase"),
    "chat": ("messages",),
    "completion": ("prompt",),
    "count": ("messages",),
    "detokenize": ("tokens",),
}

# Fields of OpenAI's that change no answer here, or whose default is all there is: they are taken and not used.
UNUSED = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
    "prediction",
)
# Fields of OpenAI's that would change the answer, with the values that ask for nothing, and why no other is taken.
ABSENT: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "tools": ((None, []), "these checkpoints were not trained to call tools"),
    "tool_choice": ((None, "none", "auto"), "these checkpoints were not trained to call tools"),
    "functions": ((None, []), "these checkpoints were not trained to call functions"),
    "function_call": ((None, "none", "auto"), "these checkpoints were not trained to call functions"),
    "modalities": ((None, ["text"]), "answers are text"),
    "audio": ((None,), "answers are text"),
    "web_search_options": ((None,), "nothing is searched"),
    "suffix": ((None, ""), "these checkpoints were not trained to fill in"),
    "best_of": ((None, 1), "use n and logprobs"),
}


def object_schema(fields: Mapping[str, Field], required: tuple[str, ...]) -> dict[str, Any]:
    """The schema of a request with these fields, each with its description."""
    properties = {name: {**field.schema, "description": field.does} for name, field in fields.items()}
    return {"type": "object", "properties": properties, "required": list(required)}
