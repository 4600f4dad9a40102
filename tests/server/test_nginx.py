"""deploy/nginx-tls.conf before a server: TLS, events as they come, the body's limit, the client's address, a client
that leaves."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qvl_runtime import Engine
from qvl_runtime.server.keys import Keys
from tests.server.conftest import KEY, Live, keys_file, say, serving

pytestmark = pytest.mark.cpu
CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx-tls.conf"


class Front(NamedTuple):
    """A server, and the port at which nginx has it."""

    live: Live
    port: int

    def open(self) -> http.client.HTTPSConnection:
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=trusting)

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> http.client.HTTPResponse:
        connection = self.open()
        sent = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), sent)
        return connection.getresponse()


@pytest.fixture(scope="module")
def front(nano: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None or shutil.which("openssl") is None:
        pytest.skip("nginx or openssl is not installed: apt-get install nginx-light openssl")
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = int(sock.getsockname()[1])
    options = "-x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(["openssl", "req", *options.split()], cwd=folder, check=True, capture_output=True)
    with serving(lambda: nano, Keys(keys_file(folder)), trusted_proxies="127.0.0.1") as live:
        text = CONFIGURATION.read_text()
        for published, own in (
            ("127.0.0.1:8000", f"127.0.0.1:{live.port}"),
            ("listen 443", f"listen 127.0.0.1:{port}"),
            ("/etc/letsencrypt/live/qvl.example.com/fullchain.pem", str(folder / "cert.pem")),
            ("/etc/letsencrypt/live/qvl.example.com/privkey.pem", str(folder / "key.pem")),
            ("450m", "2m"),
        ):
            assert published in text
            text = text.replace(published, own)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        whole = f"pid {folder}/pid;\ndaemon off;\nmaster_process off;\nerror_log stderr;\nevents {{}}\n"
        (folder / "nginx.conf").write_text(f"{whole}http {{\naccess_log off;\n{temporary}{text}\n}}\n")
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [nginx, "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"], stdout=log, stderr=log
            )
        try:
            found, deadline = Front(live, port), time.monotonic() + 20
            while True:
                try:
                    found.open().connect()
                    break
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.02)
            yield found
        finally:
            process.terminate()
            process.wait(10)


def test_events_come_one_by_one_and_a_client_that_leaves_ends_its_request(front: Front) -> None:
    body = {"messages": say("Go on"), "stream": True, "max_tokens": 1500, "ignore_eos": True}
    response = front.post(body)
    assert response.status == 200 and response.getheader("Content-Type", "").startswith("text/event-stream")
    lines, steps = [], []
    for _ in range(12):
        lines.append(response.readline())
        steps.append(front.live.engine.core.steps)
    assert sum(line.startswith(b"data: {") for line in lines) >= 5
    assert steps[-1] > steps[2] and not front.live.free()  # the first were here while the others were computed
    response.close()
    front.live.wait_free()


def test_limits_addresses_and_what_is_closed(front: Front) -> None:
    answer = front.post({"messages": say("hi"), "max_tokens": 2})
    assert answer.status == 200 and json.loads(answer.read())["choices"]
    assert front.post(b"x" * (1024 * 1024)).status == 400  # it reaches the server, which finds no JSON
    assert front.post(b"x" * (3 * 1024 * 1024)).status == 413
    assert front.post({"messages": say("hi")}, Authorization="Bearer wrong").status == 401
    connection = front.open()
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 403
    lines = [json.loads(line) for line in front.live.lines]
    assert {line["client"] for line in lines if line["status"] == 200} == {"127.0.0.1"}
    forged = front.post({"messages": say("hi"), "max_tokens": 2}, **{"X-Forwarded-For": "6.6.6.6"})
    assert forged.status == 200 and json.loads(front.live.lines[-1])["client"] == "127.0.0.1"
