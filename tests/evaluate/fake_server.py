"""An HTTP server that answers by a function, to which a client or judge talks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
Handler = Callable[[str, dict[str, Any]], Reply]  # path and body


@contextmanager
def answering(handler: Handler) -> Iterator[str]:
    """The address of a server on a free port for the time of the body."""

    class Requests(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def do_GET(self) -> None:
            self._answer({})

        def _answer(self, body: dict[str, Any]) -> None:
            status, headers, content = handler(self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_json(content: Any, status: int = 200, **headers: str) -> Reply:
    return status, headers, json.dumps(content).encode()


def said(text: str) -> Reply:
    """A chat's answer."""
    return as_json({"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": 3}})
