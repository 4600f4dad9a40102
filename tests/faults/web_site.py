"""A site on this machine that answers well and badly, by path, over http or https."""

from __future__ import annotations

import gzip
import io
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_runtime.prompt.limits import ImageLimits

FILE = io.BytesIO()
Image.new("RGB", (40, 30), "green").save(FILE, "PNG")
PNG = FILE.getvalue()
LOCAL = ImageLimits(allow_private_addresses=True, image_timeout_s=5)
# A key and its certificate for good.test, valid until 2126: openssl req -x509 -newkey ec -days 36500 -nodes
# -addext subjectAltName=DNS:good.test
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgGQKjbcLUZB2eauSg
8xU1uLqwgw0LzVteL/zeR0zlnJuhRANCAAScmzuq4mJzciHwX7pONdjOYb/jC9yT
12AWODNrsFwuUp4wuIDznlm04mvcmHthIYeFf7WlR323SsABiPzkJAU5
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBjDCCATGgAwIBAgIUIlTPnM/5MgbqjT0AXlOmQWLx62kwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjYyMjIzNTRaGA8yMTI2MTEwMjIyMjM1
NFowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJyb
O6riYnNyIfBfuk412M5hv+ML3JPXYBY4M2uwXC5SnjC4gPOeWbTia9yYe2Ehh4V/
taVHfbdKwAGI/OQkBTmjaTBnMB0GA1UdDgQWBBSNCkt81QzaFwe7wZDM2RwstN54
ujAfBgNVHSMEGDAWgBSNCkt81QzaFwe7wZDM2RwstN54ujAPBgNVHRMBAf8EBTAD
AQH/MBQGA1UdEQQNMAuCCWdvb2QudGVzdDAKBggqhkjOPQQDAgNJADBGAiEAw6B2
yBKV8Au/O/ze8KUjxN7deDEFqJ1dGroSbi82PUMCIQDB+GLjznwOczcBMC/AvLuQ
nkjJfy3wemIz3L3Q2K+Mjw==
-----END CERTIFICATE-----
"""


class Site(BaseHTTPRequestHandler):
    """Redirects to `/to/URL`, sends a secret in many places, packs an image, and answers without end."""

    paths: list[str]

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.paths.append(self.path)
        head, _, rest = self.path[1:].partition("/")
        getattr(self, f"get_{head}")(rest)

    def give(self, body: bytes, status: int = 200, reason: str | None = None, **headers: str) -> None:
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def get_image(self, _: str) -> None:
        self.give(PNG, Content_Type="image/png")

    def get_to(self, url: str) -> None:
        self.give(b"", 302, Location=url)

    def get_status(self, code: str) -> None:
        self.give(b"SECRET", int(code), "SECRET", Content_Type="SECRET", X="SECRET")

    def get_secret(self, _: str) -> None:
        self.give(b"SECRET=hunter2 " * 20, Content_Type="image/png")

    def get_garbage(self, _: str) -> None:
        self.wfile.write(b"SECRET, and no HTTP\r\n\r\n")

    def get_packed(self, coding: str) -> None:
        self.give(gzip.compress(PNG), Content_Encoding=coding)

    def get_cut(self, _: str) -> None:
        self.give(gzip.compress(PNG)[:-9], Content_Encoding="gzip")

    def get_bomb(self, _: str) -> None:
        self.give(gzip.compress(bytes(30 * 2**20)), Content_Encoding="gzip")

    def get_typed(self, kind: str) -> None:
        self.give(PNG, Content_Type=kind)

    def get_trickle(self, where: str) -> None:
        start = {"status": b"HTTP/1.", "header": b"HTTP/1.1 200 OK\r\nX: ", "body": b"HTTP/1.1 200 OK\r\n\r\n"}
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.wfile.write(start.get(where, chunked))
        try:
            for _ in range(1000):
                self.wfile.write(b"1")
                time.sleep(0.02)
        except OSError:
            return


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """The address of a new site, and the paths that it was asked for."""
    paths: list[str] = []
    handler = type("OneSite", (Site,), {"paths": paths})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    scheme = "http" if certificate is None else "https"
    yield f"{scheme}://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()
