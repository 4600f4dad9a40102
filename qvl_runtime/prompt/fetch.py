"""Read the bytes of an image from a file, a data URL or an http(s) URL, within limits."""

from __future__ import annotations

import base64
import os
import queue
import re
import stat
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from qvl_runtime.errors import DownloadError, ImageError, QVLError
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    import urllib.request

_CHUNK = 65536
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def is_data_url(source: object) -> bool:
    """Whether the source is a string that starts with `data:`."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_http_url(source: object) -> bool:
    """Whether the source is a string that starts with `http://` or `https://`."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def read_bytes(source: str | os.PathLike[str], limits: ImageLimits, described: str) -> bytes:
    """Read an encoded image of at most `limits.max_image_bytes` bytes.

    `described` names the image in error messages. Raises `ImageError` for a file or data URL that cannot be read or is
    too large, and `DownloadError` for a URL that cannot or may not be fetched.
    """
    if isinstance(source, str):
        if is_data_url(source):
            return _read_data_url(source, limits, described)
        if is_http_url(source):
            return _fetch(source, limits, described)
        if scheme := _SCHEME.match(source):
            raise ImageError(f"{described} has the scheme {scheme[1]!r}; supported are http, https and data")
    return _read_file(source, limits, described)


def _read_file(path: str | os.PathLike[str], limits: ImageLimits, described: str) -> bytes:
    if not limits.allow_files:
        raise ImageError(f"{described} is a file path, which is not allowed here: send the image as a data URL")
    try:
        status = os.stat(path)  # before opening: a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{described} is not a regular file; expected the path of an image")
        check_size(status.st_size, limits, described)
        with open(path, "rb") as file:
            return file.read(limits.max_image_bytes)
    except FileNotFoundError:
        raise ImageError(f"{described} does not exist; relative paths are resolved against {os.getcwd()}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, QVLError):
            raise
        raise ImageError(f"{described} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_data_url(url: str, limits: ImageLimits, described: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{described} starts with {head[:40]!r}; expected data:image/...;base64,...")
    check_size(len(payload) * 3 // 4, limits, described)
    payload = "".join(unquote(payload).split())
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"{described} is not base64: {error}") from error


def check_size(size: int, limits: ImageLimits, described: str) -> None:
    """Raise `ImageError` if an encoded image has more bytes than allowed."""
    if size > limits.max_image_bytes:
        raise ImageError(
            f"{described} has {size:,} bytes, over the limit of {limits.max_image_bytes:,}: "
            "shrink it or raise max_image_bytes"
        )


def _fetch(url: str, limits: ImageLimits, described: str) -> bytes:
    """Download in a separate thread, since a socket's timeout bounds neither name lookup nor slow headers."""
    if not limits.allow_urls:
        raise DownloadError(f"{described} may not be fetched (allow_urls is off): pass a file, bytes or a data URL")
    result: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            result.put(_download(url, limits, described))
        except Exception as error:  # re-raised below, in the waiting thread
            result.put(error)

    threading.Thread(target=work, name="fetch-image", daemon=True).start()
    try:
        outcome = result.get(timeout=limits.image_timeout_s)
    except queue.Empty:
        outcome = TimeoutError()
    if isinstance(outcome, bytes):
        return outcome
    if isinstance(outcome, QVLError):
        raise outcome
    if isinstance(outcome, TimeoutError) or isinstance(getattr(outcome, "reason", None), TimeoutError):
        raise DownloadError(
            f"{described} took longer than {limits.image_timeout_s:g} s: "
            "try again, raise image_timeout_s or pass a file"
        )
    cause = " ".join(str(outcome).split()) or type(outcome).__name__
    raise DownloadError(f"{described} cannot be fetched: {cause}") from outcome


def _download(url: str, limits: ImageLimits, described: str) -> bytes:
    import urllib.request

    deadline = time.monotonic() + limits.image_timeout_s
    ascii_url = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # a browser shows 图.png; the request needs %E5...
    headers = {"User-Agent": "qvl-runtime", "Accept": "image/*"}
    with _opener().open(urllib.request.Request(ascii_url, headers=headers), timeout=limits.image_timeout_s) as response:
        declared = response.headers.get("Content-Length", "")
        if declared.isdecimal():
            check_size(int(declared), limits, described)
        data = bytearray()
        while chunk := response.read1(_CHUNK):  # one socket read at a time, to check the deadline
            data += chunk
            check_size(len(data), limits, described)
            if time.monotonic() > deadline:
                raise TimeoutError
    if declared.isdecimal() and len(data) != int(declared):
        raise ConnectionError(f"the connection closed after {len(data):,} of {int(declared):,} bytes")
    return bytes(data)


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https, with proxies and redirects; unlike urllib's default, for no other scheme."""
    import urllib.request as lib

    opener = lib.OpenerDirector()
    for handler in (lib.ProxyHandler(), lib.HTTPHandler(), lib.HTTPSHandler(), lib.HTTPRedirectHandler()):
        opener.add_handler(handler)
    for error_handler in (lib.HTTPErrorProcessor(), lib.HTTPDefaultErrorHandler(), lib.UnknownHandler()):
        opener.add_handler(error_handler)
    return opener


def short_name(source: str | os.PathLike[str]) -> str:
    """A path or URL for messages, on one line; without the query and password of a URL."""
    if is_data_url(source):
        return f"a data URL of {len(str(source)):,} characters"
    name = os.fspath(source)
    if is_http_url(source):
        name = re.sub("//[^/@]*@", "//", re.split("[?#]", name)[0])
    return repr(name)[1:-1][:200]
