"""Plain HTTP to a server with OpenAI's API: JSON in, JSON out, tried again where the server is busy."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvl_runtime.errors import DownloadError, quoted

RETRIES = 6
LONGEST_WAIT = 60.0  # seconds before a request is tried again
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Client:
    """A server, whose address ends before `/chat/completions`, as OpenAI's clients have it: http://host:8000/v1."""

    url: str
    key: str | None = None  # sent as a bearer token
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Raises `DownloadError` for an address that is not http(s)."""
        if not self.url.startswith(("http://", "https://")):
            raise DownloadError(f"url is {quoted(self.url)}; expected an address such as http://127.0.0.1:8000/v1")

    def post(self, path: str, body: Mapping[str, Any], retries: int = RETRIES) -> dict[str, Any]:
        """The answer to a JSON body. Raises `DownloadError` with what the server says."""
        return self._send(path, json.dumps(body).encode(), retries)

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a request without a body."""
        return self._send(path, None, 0)

    def _send(self, path: str, data: bytes | None, retries: int) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + path
        for attempt in range(retries + 1):
            request = urllib.request.Request(address, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return self._parsed(response.read(), address)
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY or attempt == retries:
                    raise DownloadError(f"{address} answered {error.code}: {_message(error)}") from None
                wait = _seconds(error.headers.get("Retry-After"), attempt)
            except (OSError, http.client.HTTPException) as error:  # refused, or closed in the middle
                if attempt == retries:
                    raise DownloadError(f"{address} cannot be reached ({error}): is the server running?") from None
                wait = _seconds(None, attempt)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _parsed(self, body: bytes, address: str) -> dict[str, Any]:
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise DownloadError(f"{address} answered {quoted(body)}; expected a JSON object: is it OpenAI's API?")
        return content


def _seconds(header: str | None, attempt: int) -> float:
    """How long to wait: what the server asks for, or twice as long each time."""
    try:
        wanted = float(header or "")
    except ValueError:
        wanted = 0.5 * 2**attempt
    return min(max(wanted, 0.0), LONGEST_WAIT)


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in OpenAI's form or any other."""
    body = error.read(10_000)
    try:
        content = json.loads(body)
        return str(content["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return quoted(body.decode("utf-8", "replace"))
