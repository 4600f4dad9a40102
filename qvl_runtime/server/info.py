"""GET endpoints about the server: its health and its models."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.types import Receive, Scope, Send

from qvl_runtime.errors import quoted
from qvl_runtime.server.errors import NOT_FOUND, APIError
from qvl_runtime.server.http import Reply
from qvl_runtime.server.openapi import openapi
from qvl_runtime.server.service import Service

Json = dict[str, Any]
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Plain(NamedTuple):
    """An answer that is no JSON."""

    data: bytes
    type: str


class Info:
    """An ASGI application that answers from the state of the service, without the model."""

    def __init__(self, service: Service, answer: Any) -> None:
        """answer: (service, path parameters) to status and JSON."""
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = Reply(send)
        try:
            status, content = self._answer(self._service, scope["path_params"])
            if isinstance(content, Plain):
                await reply.data(status, *content)
            else:
                await reply.json(status, content)
        except APIError as error:
            scope["state"]["outcome"] = error.code
            await reply.error(error)


def live(service: Service, path: Json) -> tuple[int, Json]:
    """200 while the process answers at all: restart it otherwise."""
    return 200, {"status": service.state}


def ready(service: Service, path: Json) -> tuple[int, Json]:
    """200 while requests are taken, 503 while the model loads or the server drains: send them elsewhere then."""
    return 200 if service.state == "ready" else 503, {"status": service.state}


def models(service: Service, path: Json) -> tuple[int, Json]:
    """The model under each of its names."""
    return 200, {"object": "list", "data": [_model(service, name) for name in service.config.served]}


def model(service: Service, path: Json) -> tuple[int, Json]:
    """One model. Raises `APIError` 404 for another name."""
    name = path["model"]
    if name not in service.config.served:
        raise APIError(404, f"the model {quoted(name)} is not served here", NOT_FOUND, "model", "model_not_found")
    return 200, _model(service, name)


def metrics(service: Service, path: Json) -> tuple[int, Plain]:
    """All metrics, in Prometheus's text format."""
    return 200, Plain(service.metrics.text(), PROMETHEUS)


def description(service: Service, path: Json) -> tuple[int, Json]:
    """The API in OpenAPI's form."""
    return 200, openapi(service.config)


def _model(service: Service, name: str) -> Json:
    entry: Json = {"id": name, "object": "model", "created": service.created, "owned_by": "qvl"}
    if service.state in ("ready", "draining"):
        engine = service.engine.engine
        images = engine.engine_config.image_limits
        entry["max_model_len"] = service.context
        entry["qvl"] = {
            "context": service.context,
            "tokens_per_image": engine.config.visual.n_queries,
            "limits": {
                "max_images": images.max_images,
                "max_image_bytes": images.max_image_bytes,
                "max_image_pixels": images.max_image_pixels,
                "max_image_side": images.max_image_side,
                "max_request_pixels": images.max_request_pixels,
                "max_answers": service.config.max_answers,
            },
        }
    return entry
