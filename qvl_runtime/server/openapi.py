"""/openapi.json, made of the table of fields that requests are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl_runtime import __version__
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.fields import (
    CHAT,
    COMPLETION,
    COUNT,
    DETOKENIZE,
    LOCATE,
    REQUIRED,
    TOKENIZE,
    Field,
    object_schema,
)

Json = dict[str, Any]

_STRING, _WHOLE, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _STRING,
                "type": _STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_USAGE = {
    "type": "object",
    "properties": {
        "prompt_tokens": _WHOLE,
        "completion_tokens": _WHOLE,
        "total_tokens": _WHOLE,
        "prompt_tokens_details": {
            "type": "object",
            "properties": {"cached_tokens": _WHOLE, "image_tokens": _WHOLE},
        },
    },
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}
_BOX = {
    "type": "object",
    "description": "A box on a grid of 1000 over the image's width and height.",
    "properties": {
        "label": {"type": ["string", "null"]},
        "box": {"type": "array", "items": _WHOLE, "minItems": 4, "maxItems": 4},
        "quad": {"type": ["array", "null"], "items": {"type": "array", "items": _WHOLE}},
        "score": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "image_index": {"type": ["integer", "null"]},
        "span": {"type": ["array", "null"], "items": _WHOLE, "description": "Its characters in the text."},
        "pixels": {"type": ["array", "null"], "items": _WHOLE, "description": "Left, top, right, bottom."},
        "details": {
            "type": ["object", "null"],
            "description": "How sure the model is of it.",
            "properties": {
                "presence": _NUMBER,
                "normalized": _NUMBER,
                "logprob": _NUMBER,
                "expectation": {"type": "array", "items": _NUMBER},
                "spread": {"type": "array", "items": _NUMBER},
                "confidence": {"type": ["number", "null"]},
            },
        },
    },
    "required": ["label", "box", "score"],
}
_PICTURE = {"type": "object", "properties": {"width": _WHOLE, "height": _WHOLE}}
_QVL = {
    "type": "object",
    "properties": {
        "boxes": {"type": "array", "items": {"$ref": "#/components/schemas/Box"}},
        "pictures": {"type": "array", "items": _PICTURE},
        "finish_reason": _STRING,
    },
}
_LOCATED = {
    "type": "object",
    "properties": {
        "object": {"const": "locate"},
        "model": _STRING,
        "phrase": _STRING,
        "boxes": {"type": "array", "items": {"$ref": "#/components/schemas/Box"}},
        "presence": {"type": ["number", "null"], "description": "Probability that the model writes a box at all."},
        "pictures": {"type": "array", "items": _PICTURE},
    },
    "required": ["object", "model", "phrase", "boxes"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": _STRING,
        "qvl": {"$ref": "#/components/schemas/Boxes"},
    },
    "required": ["role", "content"],
}
_SCHEMAS: Json = {"Error": _ERROR, "Usage": _USAGE, "Box": _BOX, "Boxes": _QVL, "Message": _MESSAGE}
_STATUSES = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "A page of another origin, or another host name.",
    404: "There is no such model or path.",
    405: "The path is for another method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests are pending.",
    500: "The engine or the server has failed.",
    503: "The model is being loaded, or the server is about to end.",
}


def openapi(config: ServerConfig) -> Json:
    """The description of the API, in OpenAPI 3.1."""
    chat = {"index": _WHOLE, "message": {"$ref": "#/components/schemas/Message"}, "finish_reason": _STRING}
    text = {"index": _WHOLE, "text": _STRING, "finish_reason": _STRING, "qvl": {"$ref": "#/components/schemas/Boxes"}}
    paths = {
        "/v1/chat/completions": _post("Answer messages with images.", CHAT, "chat", _choices("chat.completion", chat)),
        "/v1/completions": _post("Continue texts.", COMPLETION, "completion", _choices("text_completion", text)),
        "/v1/chat/completions/input_tokens": _post(
            "Count the tokens of messages.", COUNT, "count", _object(object=_STRING, input_tokens=_WHOLE)
        ),
        "/v1/locate": _post("Find what a phrase names, or score given boxes.", LOCATE, "locate", _LOCATED),
        "/tokenize": _post("Token ids of a text.", TOKENIZE, "tokenize", _object(tokens=_list(_WHOLE), count=_WHOLE)),
        "/detokenize": _post("Text of token ids.", DETOKENIZE, "detokenize", _object(prompt=_STRING, content=_STRING)),
        "/v1/models": _get("The models.", _object(object=_STRING, data=_list({"type": "object"}))),
        "/v1/models/{model}": _get("A model.", _object(id=_STRING, object=_STRING)),
        "/health/live": _get("Whether the process answers.", _object(status=_STRING)),
        "/health/ready": _get("Whether requests are taken.", _object(status=_STRING)),
        "/openapi.json": _get("This description.", {"type": "object"}),
    }
    paths["/v1/models/{model}"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _STRING}]
    if config.metrics:
        metrics = _get("Prometheus metrics.", {})
        metrics["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": _STRING}}
        paths["/metrics"] = metrics
    return {
        "openapi": "3.1.0",
        "info": {"title": "qvl serve", "version": __version__, "description": "OpenAI's API, with images and boxes."},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(summary: str, fields: Mapping[str, Field], name: str, answer: Json) -> Json:
    schema = object_schema(fields, REQUIRED.get(name, ()))
    content: Json = {"application/json": {"schema": answer}}
    if "stream" in fields:
        content["text/event-stream"] = {"schema": _STRING}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "operationId": name, "requestBody": body, **_responses(content, *_STATUSES)}}


def _get(summary: str, answer: Json) -> Json:
    content = {"application/json": {"schema": answer}}
    return {"get": {"summary": summary, **_responses(content, 400, 401, 403, 404, 405, 503)}}


def _responses(content: Json, *statuses: int) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: Json = {"200": {"description": "The answer.", "content": content}}
    for status in statuses:
        responses[str(status)] = {"description": _STATUSES[status], "content": error}
    return {"responses": responses}


def _choices(kind: str, choice: Mapping[str, Any]) -> Json:
    choices = _list({"type": "object", "properties": dict(choice), "required": ["index", "finish_reason"]})
    usage = {"$ref": "#/components/schemas/Usage"}
    return _object(id=_STRING, object={"const": kind}, created=_WHOLE, model=_STRING, choices=choices, usage=usage)


def _object(**properties: Mapping[str, Any]) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Mapping[str, Any]) -> Json:
    return {"type": "array", "items": items}
