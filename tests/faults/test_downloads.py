"""Downloads: what an answer tells, how it may be packed, and that none outlives its limit (FAULTS H3, M3)."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl_runtime.errors import DownloadError, ImageError, QVLError
from qvl_runtime.prompt import fetch as fetching
from qvl_runtime.prompt.cancellation import Canceled, Cancellation
from qvl_runtime.prompt.fetch import fetch
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits
from tests import leaks
from tests.faults.web_site import CERTIFICATE, LOCAL, serving
from tests.leaks import left_behind

pytestmark = pytest.mark.unit


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    with serving() as started:
        yield started


class TestAnswers:
    """An answer repeats nothing that a server sent, but the number of its status."""

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("status/500", "the server answers with status 500$"),
            ("status/204", "the server answers with status 204$"),
            ("garbage", r"the answer is not valid HTTP \(BadStatusLine\)$"),
            ("to/SECRET:1", "a redirect leads to no address, its scheme is neither http nor https$"),
            ("to/http://[SECRET/", "a redirect leads to no address, it has no valid host and port$"),
            ("packed/br", "comes in a Content-Encoding other than gzip: fetch it yourself and give its file$"),
            ("packed/SECRET", "comes in a Content-Encoding other than gzip"),
            ("cut", "the connection closed after [0-9]+ bytes, before the end$"),
            ("typed/text/html", "is not an image: the server sends 'text/html'$"),
            ("typed/video/mp4", "is not an image: the server sends 'video/mp4'$"),
        ],
    )
    def test_words(self, site: Any, path: str, message: str) -> None:
        with pytest.raises(DownloadError, match=message) as caught:
            load_image(f"{site[0]}/{path}", 28, LOCAL, name="image 1")
        assert "SECRET" not in str(caught.value).replace(path, "")

    def test_bytes(self, site: Any) -> None:
        with pytest.raises(ImageError) as caught:
            load_image(f"{site[0]}/secret", 28, LOCAL)
        assert "SECRET" not in str(caught.value) and "hunter2" not in str(caught.value)

    def test_gzip_is_unpacked_within_the_limit(self, site: Any) -> None:
        for coding in ("gzip", "X-GZIP", "identity"):
            if coding != "identity":
                assert load_image(f"{site[0]}/packed/{coding}", 28, LOCAL).width == 40
        with pytest.raises(ImageError, match="over the limit of 20,971,520"):
            load_image(f"{site[0]}/bomb", 28, LOCAL)
        for kind in ("image/png", "application/octet-stream", "text/plain", "", "nonsense"):
            assert load_image(f"{site[0]}/typed/{kind}", 28, LOCAL).width == 40, kind

    def test_proxies_are_not_used(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        assert load_image(f"{site[0]}/image", 28, LOCAL).width == 40


class TestSecureConnections:
    @pytest.fixture
    def secure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        file = tmp_path / "site.pem"
        file.write_text(CERTIFICATE)
        context = ssl.create_default_context(cafile=str(file))
        getaddrinfo = socket.getaddrinfo
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda _, *args, **options: getaddrinfo("127.0.0.1", *args, **options)
        )
        monkeypatch.setattr(fetching, "_tls", lambda: context)
        with serving(file) as (address, _):
            yield address.replace("127.0.0.1", "good.test")

    def test_are_made_by_name(self, secure: str) -> None:
        assert load_image(f"{secure}/image", 28, LOCAL).width == 40
        assert load_image(f"{secure}/to//image", 28, LOCAL).width == 40
        with pytest.raises(DownloadError, match=r"Hostname mismatch, certificate is not valid for 'other\.test'"):
            load_image(f"{secure}/image".replace("good", "other"), 28, LOCAL)
        with pytest.raises(DownloadError, match="took longer than"):
            load_image(f"{secure}/trickle/header", 28, ImageLimits(allow_private_addresses=True, image_timeout_s=0.3))

    def test_are_refused_without_a_known_issuer(self, secure: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetching, "_tls", ssl.create_default_context)
        with pytest.raises(DownloadError, match="cannot be fetched: self-signed certificate"):
            load_image(f"{secure}/image", 28, LOCAL)

    def test_a_handshake_that_is_not_answered(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(DownloadError, match="took longer than"):
                load_image(
                    f"https://127.0.0.1:{port}/", 28, ImageLimits(allow_private_addresses=True, image_timeout_s=0.3)
                )

    def test_plain_http_at_the_port(self, site: Any) -> None:
        with pytest.raises(DownloadError, match="cannot be fetched: "):
            load_image(f"{site[0]}/image".replace("http", "https"), 28, LOCAL)


class TestTime:
    @pytest.mark.parametrize("where", ["status", "header", "body", "chunk"])
    def test_downloads_end_at_their_limit(self, site: Any, where: str) -> None:  # FAULTS M3: 100 of 100 threads stayed
        limits = ImageLimits(image_timeout_s=0.3, allow_private_addresses=True)
        took, messages = list[float](), list[str]()
        running = left_behind(lambda: leaks.threads("qvl-", "fetch"))

        def one() -> None:
            began = time.monotonic()
            with pytest.raises(DownloadError) as caught:
                load_image(f"{site[0]}/trickle/{where}", 28, limits)
            took.append(time.monotonic() - began)
            messages.append(str(caught.value))

        threads = [threading.Thread(target=one) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(took) < 2 and all("took longer than 0.3 s" in message for message in messages)
        assert not running()

    def test_a_host_that_does_not_answer(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            port = full.getsockname()[1]
            waiting = [socket.socket() for _ in range(3)]
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))  # the kernel's queue is full, so the next is not answered
            limits = ImageLimits(image_timeout_s=0.3, allow_private_addresses=True)
            with pytest.raises(DownloadError, match=r"took longer than 0\.3 s"):
                load_image(f"http://127.0.0.1:{port}/", 28, limits)
            for sock in waiting:
                sock.close()

    def test_the_next_address_is_tried(self, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        port = int(site[0].rpartition(":")[2])
        entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)  # the first refuses
        assert load_image(f"http://two:{port}/image", 28, LOCAL).width == 40

    def test_a_resolver_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait(20) and [])
        try:
            with pytest.raises(DownloadError, match=r"took longer than 0\.2 s"):
                load_image("http://slow/", 28, ImageLimits(image_timeout_s=0.2))
        finally:
            answer.set()

    @pytest.mark.parametrize("stage", ["lookup", "header", "body"])
    def test_cancellation_ends_a_download_at_once(self, site: Any, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        answer, cancellation, outcome = threading.Event(), Cancellation(), list[BaseException]()
        if stage == "lookup":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait(20) and [])

        def one() -> None:
            try:
                fetch(f"{site[0]}/trickle/{stage}", LOCAL, "it", cancellation)
            except (Canceled, QVLError) as error:
                outcome.append(error)

        thread = threading.Thread(target=one)
        thread.start()
        time.sleep(0.1)
        began = time.monotonic()
        cancellation.cancel()
        thread.join(5)
        answer.set()
        assert time.monotonic() - began < 1 and isinstance(outcome[0], Canceled)
