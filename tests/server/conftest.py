"""One server over the small checkpoint for all tests, on a real socket, and clients of it."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from PIL import Image

from qvl_runtime import Engine
from qvl_runtime.cli.demo import DemoPlan
from qvl_runtime.server.config import ServerConfig
from qvl_runtime.server.keys import Keys
from qvl_runtime.server.launch import Server, listening_socket, make_server
from qvl_runtime.server.service import Service
from tests.server.browser import chromium

__all__ = ["chromium"]  # a fixture

KEY = "sk-test-0123456789abcdef"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Live:
    """A server that runs in a thread of this process."""

    def __init__(self, service: Service, server: Server, port: int, lines: list[str]) -> None:
        self.service, self.server, self.port, self.lines = service, server, port, lines
        self.thread = threading.current_thread()
        self.url = f"http://127.0.0.1:{port}"

    @property
    def engine(self) -> Engine:
        return self.service.engine.engine

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Any = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, content: Any, **headers: str) -> Answer:
        return self.ask("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})

    def openai(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=60, **{"api_key": KEY} | options)

    def free(self) -> bool:
        """Whether nothing runs, waits or holds a block."""
        core = self.engine.core
        pool = core.runner.cache.pool
        return not core.scheduler.running and not core.scheduler.waiting and pool.available == pool.num_blocks

    def wait_free(self, seconds: float = 10) -> float:
        """Wait until all blocks are back, and return after how many seconds they were."""
        began = time.perf_counter()
        while not self.free():
            assert time.perf_counter() - began < seconds, "requests are still running"
            time.sleep(0.002)
        return time.perf_counter() - began


@contextmanager
def serving(
    load: Callable[[], Engine],
    keys: Keys | None = None,
    ready: bool = True,
    trusted_proxies: str | None = None,
    **options: Any,
) -> Iterator[Live]:
    """A server on a free port for the time of the body."""
    lines: list[str] = []
    service = Service(load, ServerConfig(**options))
    sock = listening_socket("127.0.0.1", 0)
    server = make_server(service, keys or Keys(), write=lines.append, trusted_proxies=trusted_proxies)
    live = Live(service, server, sock.getsockname()[1], lines)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), name="test-server")
    live.thread = thread
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started or (ready and service.state == "loading"):
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.005)
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def nano() -> Engine:
    return Engine(
        dtype="float32", max_model_len=2048, allow_files=False, allow_urls=False, max_running=64, isolate_images=False
    )


@pytest.fixture(scope="session")
def shared_server(nano: Engine) -> Iterator[Live]:
    with serving(lambda: nano, model_names=("nano", "another-name")) as live:
        yield live


@pytest.fixture
def live(shared_server: Live) -> Iterator[Live]:
    yield shared_server
    shared_server.wait_free()
    shared_server.engine.core.runner.cache.check_integrity()


@pytest.fixture(scope="session")
def demo() -> DemoPlan:
    return DemoPlan.from_folder()


@pytest.fixture(scope="session")
def demo_url(demo: DemoPlan) -> str:
    return data_url(demo.image.read_bytes(), "image/jpeg")


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(color: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def say(text: str, *images: str) -> list[dict[str, Any]]:
    """The messages of a question about images."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def keys_file(folder: Path, text: str = f"{KEY} tester\n") -> Path:
    path = folder / "keys.txt"
    path.write_text(text)
    path.chmod(0o600)
    return path
