"""Two servers behind HAProxy and nginx, with the files of deploy/: a picture stays with the server that has it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from qvl_runtime import Engine
from qvl_runtime.cluster.affinity import HEADER, affinity_headers
from tests.server.conftest import Live, data_url, png, say, serving

pytestmark = pytest.mark.cpu
DEPLOY = Path(__file__).parents[2] / "deploy"
COLORS = ("red", "green", "blue", "yellow")
QUESTIONS = ("What is this?", "Which color?", "Box it")


class Pair(NamedTuple):
    """A proxy and the servers behind it."""

    program: str
    url: str
    servers: tuple[Live, Live]

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=60, api_key="none")

    def ask(self, text: str, *urls: str, **options: Any) -> Any:
        messages = say(text, *urls)
        return self.client().chat.completions.create(
            model="nano", messages=messages, temperature=0, **{"max_tokens": 2} | options
        )

    def encoded(self) -> int:
        """Pictures that were not in a server's cache."""
        return sum(server.engine.core.runner.images.misses for server in self.servers)


def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=1024, allow_files=False, allow_urls=False, isolate_images=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Live, Live]]:
    with serving(engine) as first, serving(engine) as second:
        yield first, second


@contextmanager
def behind(program: str, servers: tuple[Live, Live], folder: Path) -> Iterator[Pair]:
    """Run a proxy with its file in deploy/, at ports of this test."""
    binary = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip(f"{program} is not installed: apt-get install {program}")
    port = free_port()
    name = "haproxy.cfg" if program == "haproxy" else "nginx.conf"
    text = (DEPLOY / name).read_text()
    for standard, own in ((8000, port), (8001, servers[0].port), (8002, servers[1].port)):
        text = text.replace(f"127.0.0.1:{standard}", f"127.0.0.1:{own}")
    if program == "nginx":
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            text = text.replace("http {", f"http {{\n{kind}_temp_path {folder}/{kind};", 1)
        text = f"pid {folder}/pid;\ndaemon off;\nmaster_process off;\n{text}"
    (folder / name).write_text(text)
    options = ["-f"] if program == "haproxy" else ["-p", str(folder), "-e", "stderr", "-c"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([binary, *options, str(folder / name)], stdout=log, stderr=log)
    try:
        until(lambda: reachable(port), lambda: (folder / "log").read_text()[-2000:])
        yield Pair(program, f"http://127.0.0.1:{port}", servers)
    finally:
        process.terminate()
        process.wait(10)


def reachable(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.settimeout(5)
            sock.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b" 200 " in sock.recv(100)
    except OSError:
        return False


def until(condition: Callable[[], bool], said: Callable[[], str] = lambda: "", seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)


@pytest.fixture(scope="module", params=["haproxy", "nginx"])
def pair(
    request: pytest.FixtureRequest, servers: tuple[Live, Live], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    with behind(request.param, servers, tmp_path_factory.mktemp(request.param)) as pair:
        yield pair


def test_each_picture_is_encoded_once(pair: Pair) -> None:
    """With nginx the client names the key; HAProxy finds the picture by itself."""
    red = 250 if pair.program == "nginx" else 200  # pictures that no other test sends
    urls = [data_url(png(f"#{red:02x}{20 * green:02x}40")) for green in range(8)]
    before, encoded = [asked(server) for server in pair.servers], pair.encoded()
    for text in QUESTIONS:
        for url in urls:
            headers = affinity_headers(say(text, url)) if pair.program == "nginx" else None
            pair.ask(text, url, extra_headers=headers)
    assert pair.encoded() - encoded == len(urls)
    assert all(asked(server) > count for server, count in zip(pair.servers, before, strict=True))


def test_requests_without_a_picture_are_dealt_to_both(pair: Pair) -> None:
    before = [asked(server) for server in pair.servers]
    for _ in range(16):
        pair.ask("Hello")
    assert all(asked(server) > count for server, count in zip(pair.servers, before, strict=True))


def test_streams_and_errors_pass_through(pair: Pair) -> None:
    stream = pair.ask("Hello", stream=True, max_tokens=30, extra_body={"ignore_eos": True})
    assert len(list(stream)) > 10
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        pair.ask("Hello", max_tokens=100_000)
    assert ask(pair, "/metrics") == 404
    assert ask(pair, "/health/ready") == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_request(pair: Pair, stream: bool) -> None:
    body = json.dumps(
        {"messages": say("Tell me all"), "ignore_eos": True, "max_tokens": 900, "stream": stream}
    ).encode()
    sock = socket.create_connection(("127.0.0.1", int(pair.url.rsplit(":", 1)[1])), timeout=30)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    until(lambda: any(server.engine.core.scheduler.running for server in pair.servers))
    sock.close()
    for server in pair.servers:
        server.wait_free(5)


def test_one_picture_that_all_ask_about_goes_to_both(servers: tuple[Live, Live], tmp_path: Path) -> None:
    with behind("haproxy", servers, tmp_path) as pair:
        before = [asked(server) for server in servers]
        threads = [
            threading.Thread(target=pair.ask, args=("Tell", data_url(png())), kwargs={"max_tokens": 60, "seed": i})
            for i in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: sum(map(asked, servers)) == sum(before) + len(threads))
        assert min(asked(server) - count for server, count in zip(servers, before, strict=True)) >= 2


@pytest.mark.parametrize("program", ["haproxy", "nginx"])
def test_a_server_that_is_gone_or_drains_is_left_out(program: str, servers: tuple[Live, Live], tmp_path: Path) -> None:
    with serving(engine) as third, behind(program, (servers[0], third), tmp_path) as pair:
        third.service.draining = True  # answers 503 from now on
        for color in COLORS:
            assert pair.ask("What is this?", data_url(png(color)), extra_headers={HEADER: color}).choices
        third.server.should_exit = True
        third.thread.join(20)
        for color in COLORS:
            assert pair.ask("What is this?", data_url(png(color)), extra_headers={HEADER: color}).choices


def test_the_compose_file_names_what_the_proxy_reaches() -> None:
    """It was not run where this was written; this holds its names to those of the proxy's file."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    command = services["proxy"]["command"][0]
    moved = dict(re.findall(r"s/([^/]+)/([^/]+)/", command))
    text = (DEPLOY / "haproxy.cfg").read_text()
    assert all(text.count(address) == 1 for address in moved)
    assert {target.split(":")[0] for target in moved.values() if not target.startswith("bind")} == {"a", "b"}
    assert set(services["proxy"]["depends_on"]) == {"a", "b"} == set(services) - {"proxy"}


def ask(pair: Pair, path: str) -> int:
    try:
        with urllib.request.urlopen(pair.url + path) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def asked(server: Live) -> int:
    return asked_in(server.service.metrics.text())


def asked_in(metrics: bytes) -> int:
    """Chat requests that a server has answered."""
    found = re.search(rb'qvl_http_requests_total\{route="/v1/chat/completions",status="200"\} ([\d.]+)', metrics)
    return int(float(found[1])) if found else 0
