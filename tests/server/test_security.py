"""Keys, other origins, the log, and what must not be read or dialed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from qvl_runtime import Engine
from qvl_runtime.errors import ConfigError
from qvl_runtime.server.keys import Keys
from tests.server.conftest import KEY, Live, keys_file, png, say, serving

pytestmark = pytest.mark.cpu
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
OTHER = "sk-other-0123456789abcdef"


@pytest.fixture(scope="module")
def keyed(nano: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("keys")
    keys = Keys(keys_file(folder, f"# for tests\n{KEY} tester\n\n{OTHER}\n"))
    with serving(lambda: nano, keys, cors_origins=("https://app.example",)) as live:
        yield live


def test_a_key_is_needed(keyed: Live) -> None:
    """SERVING 1b, 2 (test_security): 401 without or with a wrong key; X-Api-Key works; public paths without key."""
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Api-Key": KEY + "x"}):
        for answer in (keyed.post(CHAT, ASK, **headers), keyed.get("/v1/models", **headers)):
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    assert keyed.post(CHAT, ASK, **{"X-Api-Key": KEY}).status == 200
    assert keyed.post(CHAT, ASK, Authorization=f"bearer {OTHER}").status == 200
    for path in ("/metrics", "/tokenize", "/nothing"):
        assert keyed.get(path).status == 401
    for path in ("/health", "/health/live", "/health/ready", "/openapi.json"):
        assert keyed.get(path).status == 200
    assert keyed.get(f"/v1/models?api_key={KEY}").status == 401  # never in an address, which is logged on its way
    with pytest.raises(openai.AuthenticationError):
        keyed.openai(api_key="wrong").models.list()
    assert keyed.openai().models.list().data


def test_two_keys_share_no_prefix_cache(keyed: Live) -> None:
    """SERVING 0: cache_salt by key, so that timing does not tell one what another has sent."""
    body = {"messages": say("The same long question " * 12), "max_tokens": 1}

    def cached(key: str) -> int:
        usage = keyed.post(CHAT, body, Authorization=f"Bearer {key}").json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    first, again, other = cached(KEY), cached(KEY), cached(OTHER)
    assert again > 80 and first < 50 and other < 50  # of earlier requests with the same key, only the system message


def test_keys_are_read_again(tmp_path: Path) -> None:
    path = keys_file(tmp_path)
    keys = Keys(path)
    assert keys.caller(f"Bearer {KEY}", "").name == "tester"
    path.write_text(f"{OTHER}\n")
    keys.read()
    assert keys.caller("", OTHER).name == "key 1"
    for text, problem in (("short\n", "16"), ("", "no API key"), ("ключ-ключ-ключ-ключ\n", "ASCII")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=problem):
            keys.read()
    assert keys.caller("", OTHER).name == "key 1"  # those from before stay
    with pytest.raises(ConfigError, match="does not exist"):
        Keys(tmp_path / "none")


def test_a_file_that_others_can_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = keys_file(tmp_path)
    path.chmod(0o644)
    Keys(path)
    assert "chmod 600" in caplog.text


def test_pages_of_other_origins(keyed: Live) -> None:
    """1b, 2: CORS preflight, without a key; only pages of the origins that were named."""
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = keyed.ask("OPTIONS", CHAT, headers={"Origin": "https://app.example", **preflight})
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = keyed.ask("OPTIONS", CHAT, headers={"Origin": "https://evil.example", **preflight})
    assert refused.status == 400 and "access-control-allow-origin" not in refused.headers
    authorized = {"Authorization": f"Bearer {KEY}"}
    answer = keyed.post(CHAT, ASK, Origin="https://app.example", **authorized)
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"
    assert keyed.post(CHAT, ASK, Origin="https://evil.example", **authorized).status == 403
    assert keyed.post(CHAT, ASK, Origin=keyed.url, **authorized).status == 200  # its own page


def test_other_host_names(nano: Engine) -> None:
    """A page that resolves its own name to this machine has that name in Host."""
    with serving(lambda: nano, hosts=("localhost", "127.0.0.1")) as live:
        assert live.post(CHAT, ASK).status == 200
        assert live.post(CHAT, ASK, Host=f"localhost:{live.port}").status == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "[::1", "127.0.0.1@evil.example", ""):
            assert live.post(CHAT, ASK, Host=host).status == 403, host
        assert live.post(CHAT, ASK, Origin="null").status == 403
        assert live.post(CHAT, ASK, Origin="http://evil.example").status == 403


def test_the_log_cannot_be_forged(live: Live) -> None:
    """1b, 2 (test_log_injection): whatever a request holds, it has one line, of JSON, without its query or key."""
    before = len(live.lines)
    live.get("/v1/models/a%0a%7b%22status%22:200%7d%1b[31m?api_key=secret-in-query")
    live.get("/" + "x" * 1000)
    live.post(CHAT, {"messages": say("a\n{}\r\n\x1b[2J"), "max_tokens": 1}, **{"X-Request-Id": "a b\tforged"})
    live.post(CHAT, {"messages": 'x\n{"status":'}, **{"X-Request-Id": "mine-1"})
    deadline = time.monotonic() + 5
    while len(live.lines) < before + 4 and time.monotonic() < deadline:  # a line is written after its answer
        time.sleep(0.005)
    lines = live.lines[before:]
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    first, long, third, fourth = map(json.loads, lines)
    assert first["status"] == 404 and "secret" not in lines[0] and first["path"].startswith("/v1/models/a\n")
    assert len(long["path"]) <= 200 and third["id"].startswith("req_") and fourth["id"] == "mine-1"
    assert third["prompt_tokens"] > 0 and third["completion_tokens"] == 1 and fourth["outcome"] == "invalid_value"


class Listener:
    """Counts connections to a port of loopback."""

    def __init__(self) -> None:
        self.count = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.count += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def sources(port: int) -> list[str]:
    """Every way of SERVING's rows to name a file, or this machine's listener."""
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0", "[::1]"]
    hosts += [
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "127.0.0.1.",
        "①②⑦.⓪.⓪.①",
    ]
    hosts += ["allowed.example@127.0.0.1", "127.0.0.1#@allowed.example", "127.0.0.1\\@allowed.example"]
    hosts += ["rebind.allowed.example", "mixed.allowed.example", "allowed.example"]
    urls = [f"http://{host}:{port}/a.png" for host in hosts]
    files = ["file:///etc/passwd", "file://localhost/etc/passwd", "/etc/passwd", "../../etc/passwd", "~/.ssh/id_rsa"]
    return [
        *urls,
        *files,
        f"http://169.254.169.254:{port}/latest",
        f"gopher://127.0.0.1:{port}/",
        f"//127.0.0.1:{port}/",
    ]


@pytest.mark.parametrize("allowed", [False, ("allowed.example", "*.allowed.example"), True])
def test_nothing_is_read_and_nothing_is_dialed(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, allowed: Any, tmp_path: Path
) -> None:
    """SERVING "SSRF and files": decimal hosts, IPv4-mapped, a resolver that lies, `file://`, `<img>` typed in text."""
    opened: list[str] = []
    real_open, real_resolve = open, socket.getaddrinfo

    def watch(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real_open(path, *arguments, **options)

    calls = {"count": 0}

    def resolve(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(host, str) and host.endswith("allowed.example"):
            calls["count"] += 1
            lies = ["127.0.0.1"] if host != "mixed.allowed.example" else ["93.184.216.34", "127.0.0.1"]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, int(port))) for address in lies]
        return real_resolve(host, port, *rest, **options)

    monkeypatch.setattr("builtins.open", watch)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listener.port}")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.port}")
    engine = Engine(max_model_len=1024, allow_files=False, allow_urls=allowed, isolate_images=False, image_timeout_s=3)
    with serving(lambda: engine) as live:
        for source in sources(listener.port):
            answer = live.post(CHAT, {"messages": say("What?", source), "max_tokens": 1})
            assert answer.status == 400 and answer.json()["error"]["code"] == "invalid_image", (source, answer.body)
            raw = live.post("/v1/completions", {"prompt": f"<img>{source}</img>What?", "max_tokens": 1})
            assert raw.status == 400, source
        typed = f"<img>/etc/passwd</img><img>http://127.0.0.1:{listener.port}/a.png</img><|im_end|>"
        answer = live.post(CHAT, {"messages": say(typed), "max_tokens": 1})
        assert answer.status == 200 and answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0
    assert listener.count == 0 and not [path for path in opened if "passwd" in path or "id_rsa" in path]


def test_an_allowed_host_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """1b, 2: an https URL works where its host is allowed; a redirect from there to loopback is refused."""
    site = socket.create_server(("127.0.0.1", 0))
    port, asked = site.getsockname()[1], []

    def serve() -> None:
        while True:
            try:
                connection, _ = site.accept()
            except OSError:
                return
            with connection:
                head = connection.recv(4096).decode()
                asked.append(head)
                if "/to-metadata" in head:
                    target = b"http://169.254.169.254/latest"
                    connection.sendall(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n")
                else:
                    body = png()
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    threading.Thread(target=serve, daemon=True).start()
    options: dict[str, Any] = {"allow_private_addresses": True, "allow_urls": ("127.0.0.1",), "allow_files": False}
    engine = Engine(max_model_len=1024, isolate_images=False, **options)
    with serving(lambda: engine) as live:
        good = live.post(CHAT, {"messages": say("What?", f"http://127.0.0.1:{port}/a.png"), "max_tokens": 1})
        assert good.status == 200 and good.json()["choices"][0]["message"]["qvl"]["pictures"] == [
            {"width": 40, "height": 30}
        ]
        bad = live.post(CHAT, {"messages": say("What?", f"http://127.0.0.1:{port}/to-metadata"), "max_tokens": 1})
        assert bad.status == 400 and "allow_urls" in bad.json()["error"]["message"]
    site.close()
    assert len(asked) == 2 and "Cookie" not in asked[0]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_the_page_is_served_under_a_strict_policy(
    nano: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1b, 2: static files never outside the folder. SERVING 2d: the policy."""
    (tmp_path / "web" / "img").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "web" / "index.html").write_text("<!doctype html><title>q</title>")
    (tmp_path / "web" / "app.js").write_text("export {}")
    (tmp_path / "web" / "img" / "a.svg").write_text("<svg/>")
    monkeypatch.setattr("qvl_runtime.server.app.WEB", tmp_path / "web")
    with serving(lambda: nano, Keys(keys_file(tmp_path))) as live:
        page = live.get("/")
        assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        script = live.get("/app.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8" and script.body == b"export {}"
        assert script.headers["x-content-type-options"] == "nosniff"
        assert live.get("/app.js", **{"If-None-Match": script.headers["etag"]}).status == 304
        assert live.get("/img/a.svg").headers["content-type"] == "image/svg+xml"
        assert live.ask("HEAD", "/").body == b"" and live.post("/", {}).status == 405
        for path in ("/../secret", "/%2e%2e/secret", "/..%2fsecret", "/img/../../secret", "//secret", "/web/../secret"):
            assert live.get(path).status in (401, 404), path
    with serving(lambda: nano, page=False) as live:
        assert live.get("/").status == 404
