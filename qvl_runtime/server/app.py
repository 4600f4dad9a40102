"""The ASGI application: routes, and the layers around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qvl_runtime.server.chat import chat
from qvl_runtime.server.completions import completions
from qvl_runtime.server.endpoint import ModelEndpoint
from qvl_runtime.server.errors import APIError
from qvl_runtime.server.http import Reply
from qvl_runtime.server.info import Info, description, live, metrics, model, models, ready
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.locating import locate
from qvl_runtime.server.middleware import AccessLog, Guard
from qvl_runtime.server.service import Service
from qvl_runtime.server.static import WEB, StaticFiles
from qvl_runtime.server.tokens import detokenize, input_tokens, tokenize

PUBLIC = ("/health", "/health/live", "/health/ready", "/openapi.json")
"""What needs no key, besides the page."""


def make_app(service: Service, keys: Keys, write: Callable[[str], None] | None = None) -> Starlette:
    """The application over a service, which begins to load its engine when the application starts.

    write: takes the lines of the access log; None: there is none.
    """
    config = service.config
    static = StaticFiles(WEB if config.page else None)
    routes = [
        _get("/health", Info(service, ready)),
        _get("/health/live", Info(service, live)),
        _get("/health/ready", Info(service, ready)),
        _get("/v1/models", Info(service, models)),
        _get("/v1/models/{model:path}", Info(service, model)),
        _get("/openapi.json", Info(service, description)),
        _post("/v1/chat/completions", ModelEndpoint(service, chat, "messages")),
        _post("/v1/chat/completions/input_tokens", ModelEndpoint(service, input_tokens, "messages")),
        _post("/v1/completions", ModelEndpoint(service, completions, "prompt")),
        _post("/v1/locate", ModelEndpoint(service, locate, "phrase")),
        _post("/tokenize", ModelEndpoint(service, tokenize, "prompt")),
        _post("/detokenize", ModelEndpoint(service, detokenize, "tokens")),
    ]
    if config.metrics:
        routes.append(_get("/metrics", Info(service, metrics)))
    layers = [Middleware(AccessLog, count=service.metrics.answered, write=write)]
    if config.cors_origins:
        layers.append(Middleware(CORSMiddleware, **_cors(config.cors_origins)))
    layers.append(Middleware(Guard, config=config, keys=keys, public=(*PUBLIC, *static.paths)))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = Starlette(routes=routes, middleware=layers, lifespan=lifespan)
    app.router.redirect_slashes = False
    app.router.default = _Elsewhere(static)
    return app


class _Elsewhere:
    """Answers what no route has: with a static file, or 404."""

    def __init__(self, static: StaticFiles) -> None:
        self._static = static

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            await self._static(scope, receive, send)


class _Method:
    """An application for one method; the others get 405."""

    def __init__(self, app: ASGIApp, route: str, *methods: str) -> None:
        self._app, self._route, self._methods = app, route, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        scope["state"]["route"] = self._route
        if scope["method"] in self._methods:
            await self._app(scope, receive, send)
            return
        headers = {"Allow": ", ".join(self._methods)}
        message = f"this path is for {' and '.join(self._methods)}"
        await Reply(send).error(APIError(405, message, code="method_not_allowed", headers=headers))


def _get(path: str, app: ASGIApp) -> Route:
    return Route(path, _Method(app, path, "GET", "HEAD"))


def _post(path: str, app: ASGIApp) -> Route:
    return Route(path, _Method(app, path, "POST"))


def _cors(origins: tuple[str, ...]) -> Mapping[str, Any]:
    exposed = ["X-Request-Id", "Retry-After"]
    return {"allow_origins": list(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]} | {
        "expose_headers": exposed
    }
