"""Read the bytes of an image from an http(s) URL, within limits."""

from __future__ import annotations

import queue
import re
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from qvl_runtime.errors import DownloadError, QVLError
from qvl_runtime.prompt.limits import ImageLimits

if TYPE_CHECKING:
    import urllib.request

_CHUNK = 65536
_CREDENTIALS = re.compile(r"(?<=//)[^/?#]*@")


def is_http_url(source: object) -> bool:
    """Whether the source is a string that starts with `http://` or `https://`."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def without_credentials(url: str) -> str:
    """The URL without the user name and password before its host."""
    return _CREDENTIALS.sub("", url, count=1)


def fetch(url: str, limits: ImageLimits, described: str) -> bytes:
    """Download an image of at most `limits.max_image_bytes` bytes within `limits.image_timeout_s` seconds.

    `described` names it in error messages. Raises `DownloadError` for a URL that cannot or may not be fetched, and
    `ImageError` for an image that is too large.
    """
    # In a separate thread, since a socket's timeout bounds neither name lookup nor slow headers.
    if not limits.allow_urls:
        raise DownloadError(f"{described} may not be fetched (allow_urls is off): pass a file, bytes or a data URL")
    if without_credentials(url) != url:
        raise DownloadError(
            f"credentials in the address are not used ({described}): remove them, or fetch the image and pass its bytes"
        )
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
            limits.check_bytes(int(declared), described)
        data = bytearray()
        while chunk := response.read1(_CHUNK):  # one socket read at a time, to check the deadline
            data += chunk
            limits.check_bytes(len(data), described)
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
