"""Read the bytes of an image from an http(s) URL, within limits of time and size, at addresses that were checked.

Proxies of the environment are not used: they would dial for us, and what they dial could not be checked.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import DownloadError, QVLError, quoted
from qvl_runtime.prompt.addresses import Address, Target, find_addresses, parse_url
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.hosts import is_allowed
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    import ssl

_CHUNK = 65536
_CREDENTIALS = re.compile(r"(?<=//)[^/?#]*@")
_MAX_REDIRECTS = 5
_MAX_DIALED = 4  # addresses of one host
_HEADERS = {"User-Agent": "qvl-runtime", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
_NO_IMAGE = re.compile(r"(text/html|application/(json|pdf|zip|xhtml\+xml)|(audio|video)/[a-z0-9.+-]{1,40})(?=;|\s|$)")
_UNPACKED = ("", "identity")
_GZIP = ("gzip", "x-gzip")


def is_http_url(source: object) -> bool:
    """Whether the source is a string that starts with `http://` or `https://`."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def without_credentials(url: str) -> str:
    """The URL without the user name and password before its host."""
    return _CREDENTIALS.sub("", url, count=1)


def fetch(url: str, limits: ImageLimits, described: str, cancellation: Cancellation = NEVER) -> bytes:
    """Download an image of at most `limits.max_image_bytes` bytes within `limits.image_timeout_s` seconds.

    `described` names it in error messages, which repeat nothing of what a server sends but its status. Raises
    `DownloadError` for a URL that cannot or may not be fetched, `ImageError` for an image that is too large, and
    `Canceled`.
    """
    if limits.allow_urls is False:
        raise DownloadError(f"{described} may not be fetched (allow_urls is off): pass a file, bytes or a data URL")
    if without_credentials(url) != url:
        raise DownloadError(
            f"credentials in the address are not used ({described}): "
            "remove them, or fetch the image yourself and give its file"
        )
    deadline = time.monotonic() + limits.image_timeout_s
    try:
        return _follow(url, limits, described, deadline, cancellation)
    except QVLError:
        raise
    except TimeoutError:
        raise DownloadError(
            f"{described} took longer than {limits.image_timeout_s:g} s: "
            "try again, raise image_timeout_s or pass a file"
        ) from None
    except (OSError, http.client.HTTPException, zlib.error, ValueError) as error:
        raise DownloadError(f"{described} cannot be fetched: {_cause(error)}") from error


def _follow(url: str, limits: ImageLimits, described: str, deadline: float, cancellation: Cancellation) -> bytes:
    """Fetch a URL, through redirects; each is checked like the first."""
    target, place = parse_url(url), ""
    for _ in range(_MAX_REDIRECTS + 1):
        if not is_allowed(target.host, limits.allow_urls):
            raise DownloadError(f"{described} {place}is at a host that is not among those of allow_urls")
        addresses = find_addresses(target, limits, described, deadline, cancellation)
        with _dialed(target, addresses[:_MAX_DIALED], deadline, cancellation) as sock:
            answer = _ask(target, _Timed(sock, deadline))
            if answer.status not in (301, 302, 303, 307, 308):
                return _read(answer, limits, described)
            location = answer.headers.get("Location", "")
        place = "redirects to what "
        try:
            target = parse_url(location.encode("latin-1", "replace").decode("utf-8", "replace"), target.url)
        except ValueError as error:
            raise ValueError(f"a redirect leads to no address, {error}") from None
    raise ValueError(f"it redirects more than {_MAX_REDIRECTS} times")


@contextmanager
def _dialed(
    target: Target, addresses: list[Address], deadline: float, cancellation: Cancellation
) -> Iterator[socket.socket]:
    """A connection to the first address that answers, with TLS if the URL has it; closed at the end."""
    fault: OSError = OSError("it has no address")
    for number, address in enumerate(addresses):
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        with sock, cancellation.ending_with(partial(_end, sock)):
            try:
                sock.settimeout(_remaining(deadline) / (len(addresses) - number))
                sock.connect(address.dialed)
            except OSError as error:
                fault = error
                continue
            if not target.secure:
                yield sock
                return
            tls = _tls().wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
            with tls, cancellation.ending_with(partial(_end, tls)):
                tls.settimeout(_remaining(deadline))
                tls.do_handshake()
                yield tls
                return
    _remaining(deadline)
    raise fault


def _ask(target: Target, sock: _Timed) -> http.client.HTTPResponse:
    """Send a GET request, and read the head of the answer."""
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = sock
    default = target.port == (443 if target.secure else 80)
    host = f"[{target.host}]" if ":" in target.host else target.host
    named = host if default else f"{host}:{target.port}"
    connection.request("GET", target.path, headers={"Host": named, **_HEADERS})
    return connection.getresponse()


def _read(answer: http.client.HTTPResponse, limits: ImageLimits, described: str) -> bytes:
    """The body of an answer, unpacked. Raises `DownloadError` or `ImageError` for one that is no image."""
    if answer.status != 200:
        raise DownloadError(f"{described} cannot be fetched: the server answers with status {answer.status}")
    if kind := _NO_IMAGE.match(answer.headers.get("Content-Type", "").strip().lower()):
        raise DownloadError(f"{described} is not an image: the server sends {quoted(kind[1])}")
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
    if coding not in (*_UNPACKED, *_GZIP):
        raise DownloadError(
            f"{described} comes in a Content-Encoding other than gzip: fetch it yourself and give its file"
        )
    declared = answer.headers.get("Content-Length", "")
    if declared.isdecimal() and len(declared) < 20:
        limits.check_bytes(int(declared), described)
    unpacker = zlib.decompressobj(wbits=31) if coding in _GZIP else None
    data, size = bytearray(), 0
    while chunk := answer.read1(_CHUNK):
        size += len(chunk)
        data += chunk if unpacker is None else unpacker.decompress(chunk, limits.max_image_bytes + 1 - len(data))
        limits.check_bytes(max(size, len(data)), described)
    if (declared.isdecimal() and size != int(declared)) or (unpacker is not None and not unpacker.eof):
        raise ConnectionError(f"the connection closed after {size:,} bytes, before the end")
    return bytes(data)


class _Timed:
    """What http.client needs of a socket. All waits together last until the deadline, however slowly bytes arrive."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_remaining(self._deadline))
        self._sock.sendall(data)

    def receive(self, buffer: Any) -> int:
        self._sock.settimeout(_remaining(self._deadline))
        return self._sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Received(self))

    def close(self) -> None: ...  # `_dialed` does


class _Received(io.RawIOBase):
    """The bytes that arrive at a socket, as a file."""

    def __init__(self, sock: _Timed) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.receive(buffer)


def _remaining(deadline: float) -> float:
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


def _end(sock: socket.socket) -> None:
    """End what another thread waits for at this socket."""
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, whose own would wait
    except OSError:  # not connected yet: where that does not end the wait, the deadline does
        return


def _cause(error: Exception) -> str:
    """What went wrong, in words that a server does not choose."""
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not valid HTTP ({type(error).__name__})"
    if isinstance(error, zlib.error):
        return "its gzip encoding is damaged"
    for name in ("verify_message", "reason", "strerror"):  # of certificates, other TLS, and sockets
        if isinstance(words := getattr(error, name, None), str) and words:
            return words
    return str(error) or type(error).__name__


@lru_cache(1)
def _tls() -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context()
