"""Errors in OpenAI's form, and which status each error of the engine has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qvl_runtime.errors import (
    BusyError,
    CapacityError,
    ConstraintError,
    DownloadError,
    ImageError,
    NumericsError,
    PromptError,
    QVLError,
    RuledOutError,
    SamplingError,
    StepError,
)

_log = logging.getLogger("qvl_runtime")

INVALID, AUTHENTICATION, NOT_FOUND = "invalid_request_error", "authentication_error", "not_found_error"
PERMISSION, RATE_LIMIT, SERVER = "permission_error", "rate_limit_error", "server_error"


@dataclass(eq=False)
class APIError(Exception):
    """An answer that says what is wrong with a request, or with the server."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None  # the field
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request that can never be answered as it is: 400."""
    return APIError(400, message, INVALID, param, code)


def busy(message: str, retry_after_s: int) -> APIError:
    """Too many requests at the moment: 429."""
    return APIError(429, message, RATE_LIMIT, None, "queue_full", {"Retry-After": str(retry_after_s)})


def unavailable(message: str, retry_after_s: int, code: str) -> APIError:
    """A server that does not answer requests now: 503."""
    return APIError(503, message, SERVER, None, code, {"Retry-After": str(retry_after_s)})


def api_error(error: Exception, param: str | None = None, guide: str | None = None) -> APIError:
    """The answer for any exception. What is no user's fault is logged.

    param: the field that holds the prompt; guide: the one that says what the answer must follow.
    """
    if isinstance(error, APIError):
        return error
    message = str(error)
    if isinstance(error, BusyError):
        return busy(message, 1)
    if isinstance(error, CapacityError):
        if error.__cause__ is not None:  # memory ran out
            return APIError(503, message, SERVER, None, "out_of_memory", {"Retry-After": "5"})
        return invalid(message, param, "context_length_exceeded")
    if isinstance(error, (ImageError, DownloadError)):
        return invalid(message, param, "invalid_image")
    if isinstance(error, PromptError):
        return invalid(message, param, "invalid_prompt")
    if isinstance(error, ConstraintError):
        return invalid(message, guide, "invalid_constraint")
    if isinstance(error, (SamplingError, RuledOutError)):
        name = message.partition(" ")[0]
        return invalid(message, name if name in _parameters() else None, "invalid_value")
    if isinstance(error, (NumericsError, StepError)):
        return APIError(500, message, SERVER, None, "engine_error")
    if isinstance(error, QVLError):  # the engine was closed, or its thread has ended
        return APIError(500, message, SERVER, None, "engine_dead")
    _log.error("a request failed by a bug of the server", exc_info=error)
    return APIError(500, f"the server has a bug: {type(error).__name__}; its log has more", SERVER, None, "bug")


def _parameters() -> frozenset[str]:
    from qvl_runtime.schedule.api import SamplingParams

    return frozenset(field.name for field in fields(SamplingParams))
