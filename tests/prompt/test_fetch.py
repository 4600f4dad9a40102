from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from qvl_runtime.errors import DownloadError, ImageError
from qvl_runtime.prompt.images import load_image
from qvl_runtime.prompt.limits import ImageLimits

FILE = io.BytesIO()
Image.new("RGB", (40, 30), "green").save(FILE, "PNG")
PNG = FILE.getvalue()
LOCAL = ImageLimits(allow_private_addresses=True)
QUICK = ImageLimits(image_timeout_s=0.4, allow_private_addresses=True)


class Site(BaseHTTPRequestHandler):
    """Good and bad answers, by path."""

    def do_GET(self) -> None:
        route = self.path.split("?")[0].strip("/").replace("/", "_").replace("%E5%9B%BE", "image")
        getattr(self, f"get_{route.removesuffix('.png')}", self.get_missing)()

    def log_message(self, *_: Any) -> None: ...

    def give(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def get_image(self) -> None:
        assert self.headers["User-Agent"]
        self.give(PNG)

    def get_missing(self) -> None:
        self.give(b"no", 404)

    def get_moved(self) -> None:
        self.give(b"", 302, Location="/image.png")

    def get_circle(self) -> None:
        self.give(b"", 302, Location="/circle")

    def get_to_file(self) -> None:
        self.give(b"", 302, Location="file:///etc/passwd")

    def get_to_ftp(self) -> None:
        self.give(b"", 302, Location="ftp://127.0.0.1/a.png")

    def get_declared_huge(self) -> None:
        self.give(b"x", length=10**12)

    def get_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            return

    def get_cut(self) -> None:
        self.give(PNG[:50], length=len(PNG))

    def get_page(self) -> None:
        self.give(b"<html>please log in</html>")

    def get_slow_body(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.drip()

    def get_slow_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        self.drip()

    def drip(self) -> None:
        try:
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            return


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/image.png", "/moved", "/图.png", "/image.png?size=a b&key=1"])
def test_fetches(site: str, path: str) -> None:
    image = load_image(site + path, 28, LOCAL)
    assert (image.width, image.height) == (40, 30)
    assert image.source == (site + path).split("?")[0]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/missing", DownloadError, "answers with status 404$"),
        ("/circle", DownloadError, "redirects more than 5 times"),
        ("/to_file", DownloadError, "a redirect leads to no address, its scheme is neither http nor https$"),
        ("/to_ftp", DownloadError, "its scheme is neither http nor https$"),
        ("/declared_huge", ImageError, "1,000,000,000,000 bytes, over the limit"),
        ("/endless", ImageError, "over the limit of 20,971,520"),
        ("/cut", DownloadError, "closed after 50 bytes, before the end"),
        ("/page", ImageError, "not an image"),
    ],
)
def test_faults(site: str, path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        load_image(site + path, 28, LOCAL, name="image 1")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"image 1 ({site}{path})")


@pytest.mark.parametrize("path", ["/slow_body", "/slow_headers"])
def test_the_time_limit_is_for_the_whole(site: str, path: str) -> None:
    begin, threads = time.monotonic(), threading.active_count()
    with pytest.raises(DownloadError, match=r"took longer than 0\.4 s"):
        load_image(site + path, 28, QUICK)
    assert time.monotonic() - begin < 5, "a byte every 50 ms must not keep it alive"
    assert threading.active_count() <= threads + 1, "the site's own thread may stay, none of ours"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "http://[::1/a.png", "http:///a.png", "http://host:port/a"]
)
def test_addresses_that_lead_nowhere(url: str) -> None:
    with pytest.raises(DownloadError, match="cannot be fetched") as caught:
        load_image(url, 28, QUICK)
    assert "\n" not in str(caught.value)


def test_names_keep_secrets(site: str) -> None:
    with pytest.raises(DownloadError) as caught:
        load_image(site.replace("//", "//user:password@") + "/missing?token=secret", 28, LOCAL)
    assert "secret" not in str(caught.value) and "password" not in str(caught.value)
