"""Read the bytes of an image from wherever it is: a file, an open file, base64 in a string, or an address."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import stat
import threading
from typing import IO, Any, TypeAlias, TypeGuard
from urllib.parse import unquote, unquote_to_bytes

from qvl_runtime.errors import ImageError, QVLError, quoted, shortened
from qvl_runtime.prompt.cancellation import NEVER, Cancellation
from qvl_runtime.prompt.fetch import fetch, is_http_url, without_credentials
from qvl_runtime.prompt.limits import ImageLimits

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"

_CHUNK = 2**20
_PIECE = 2**18  # characters of base64 that are decoded in 1 ms; at once, 10 MB would hold up all threads for 50 ms
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FILE_URL = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
# The base64 of the first bytes of JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF and HEIC. No path is as long and has no dot.
_BASE64 = re.compile(
    r"(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD[dl]h|UklGR|Qk[0-3]|SUkqA|TU0AK|AAAA..Z0eX)[A-Za-z0-9+/_\-\s]{80,}={0,2}\s*"
)
_READING = threading.Lock()  # two threads that share an open file would read from each other's position


def is_data_url(source: object) -> bool:
    """Whether the source is a string that starts with `data:`."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_readable(source: object) -> TypeGuard[Source]:
    """Whether `read_bytes` takes the source: a string, a path, bytes or an open file."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or callable(
        getattr(source, "read", None)
    )


def read_bytes(source: Source, limits: ImageLimits, described: str, cancellation: Cancellation = NEVER) -> bytes:
    """Read an encoded image of at most `limits.max_image_bytes` bytes.

    A string is a path, an http(s), file or data URL, or base64 without a heading; white space around it does not count.
    An open file is read from its start if it can be. `described` names the image in error messages. Raises `ImageError`
    for a source that cannot be read or is too large, `DownloadError` for an address that cannot or may not be, and
    `Canceled` if a download is.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        limits.check_bytes(source.nbytes if isinstance(source, memoryview) else len(source), described)
        return bytes(source)
    if isinstance(source, str):
        return _read_address(source, limits, described, cancellation)
    if isinstance(source, os.PathLike):
        return _read_file(source, limits, described)
    return _read_open_file(source, limits, described)


def short_name(source: str | os.PathLike[str]) -> str:
    """A path or URL for messages, on one line; without the query and password of a URL."""
    name = os.fspath(source)
    if isinstance(source, str):
        name = source.strip()
        if is_data_url(name):
            return f"a data URL of {len(name):,} characters"
        if is_bare_base64(name):
            return f"base64 of {len(name):,} characters"
        if is_http_url(name):
            name = without_credentials(re.split("[?#]", name)[0])
    return shortened(repr(name)[1:-1], 100)


def is_bare_base64(text: str) -> bool:
    """Whether a string is an image's bytes in base64 rather than a path or an address."""
    return _BASE64.fullmatch(text) is not None


def _read_address(source: str, limits: ImageLimits, described: str, cancellation: Cancellation) -> bytes:
    address = source.strip()
    if is_data_url(address):
        return _read_data_url(address, limits, described)
    if is_http_url(address):
        return fetch(address, limits, described, cancellation)
    if address[:5].lower() == "file:":
        return _read_file(_path_of(address, described), limits, described)
    if scheme := _SCHEME.match(address):
        raise ImageError(f"{described} has the scheme {quoted(scheme[1])}; supported are http, https, file and data")
    if is_bare_base64(address):
        return _from_base64(address, limits, described)
    if not limits.allow_files:  # before a look at the disk, which would tell whether the file exists
        raise ImageError(f"{described} is a file path, which is not allowed here: send the image as a data URL")
    candidates = [source, address]
    if address.startswith("~/"):
        candidates.append(os.path.expanduser(address))
    return _read_file(next(filter(os.path.lexists, candidates), source), limits, described)


def _path_of(url: str, described: str) -> bytes | str:
    """The path of a file URL, percent-decoded. Raises `ImageError` for one on another machine."""
    parts = _FILE_URL.fullmatch(url)
    if parts is None or parts["path"] is None:
        raise ImageError(f"{described} is not a file URL; expected file:///folder/image.png")
    if parts["host"] not in (None, "", "localhost"):
        raise ImageError(
            f"{described} is on the host {quoted(parts['host'])}, and only local files are read; "
            "expected file:///folder/image.png"
        )
    return unquote_to_bytes(parts["path"])


def _read_file(path: str | bytes | os.PathLike[str], limits: ImageLimits, described: str) -> bytes:
    if not limits.allow_files:
        raise ImageError(f"{described} is a file path, which is not allowed here: send the image as a data URL")
    try:
        status = os.stat(path)  # before opening: a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{described} is not a regular file; expected the path of an image")
        limits.check_bytes(status.st_size, described)
        with open(path, "rb") as file:
            return file.read(limits.max_image_bytes)
    except FileNotFoundError:
        raise ImageError(f"{described} does not exist; relative paths are resolved against {os.getcwd()}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, QVLError):
            raise
        cause = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            cause = f"{cause}; expected a path, an address, or a data URL for an image in base64"
        raise ImageError(f"{described} cannot be read: {cause}") from error


def _read_open_file(file: IO[bytes], limits: ImageLimits, described: str) -> bytes:
    if isinstance(file, io.TextIOBase):
        raise ImageError(f"{described} is opened as text; expected a file opened with mode 'rb'")
    try:
        if isinstance(file, io.BytesIO):  # at once, whatever its position: it may be read in several threads
            return read_bytes(file.getbuffer(), limits, described)
        if getattr(file, "seekable", lambda: False)():
            with _READING:
                file.seek(0)
                return _read_all(file, limits, described)
        return _read_all(file, limits, described)
    except QVLError:
        raise
    except Exception as error:  # of any file-like object
        if getattr(file, "closed", False) is True:
            raise ImageError(
                f"{described} is a closed file: open it for as long as it is used, or pass bytes"
            ) from None
        raise ImageError(f"{described} cannot be read: {error or type(error).__name__}") from error


def _read_all(file: IO[bytes], limits: ImageLimits, described: str) -> bytes:
    data = bytearray()
    while True:
        chunk: Any = file.read(min(_CHUNK, limits.max_image_bytes + 1 - len(data)))
        if not isinstance(chunk, bytes):
            if hasattr(chunk, "close"):
                chunk.close()  # a coroutine, of a web framework's upload
            kind = type(chunk).__name__
            raise ImageError(f"{described} gives {kind} when it is read; expected bytes: read it, and pass the bytes")
        if not chunk:
            return bytes(data)
        data += chunk
        limits.check_bytes(len(data), described)


def _read_data_url(url: str, limits: ImageLimits, described: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.rstrip().lower().endswith(";base64"):
        raise ImageError(f"{described} starts with {quoted(head[:40])}; expected data:image/...;base64,...")
    limits.check_bytes(len(payload) * 3 // 4, described)
    return _from_base64(unquote(payload) if "%" in payload else payload, limits, described)


def _from_base64(payload: str, limits: ImageLimits, described: str) -> bytes:
    """Decode base64 in the standard or the URL-safe alphabet, padded or not, broken into lines or not."""
    data, pending = bytearray(), ""
    end = _end_of_base64(payload)
    try:
        for start in range(0, end, _PIECE):
            piece = pending + "".join(payload[start : min(start + _PIECE, end)].split()).translate(_STANDARD)
            if "=" in piece:
                raise ValueError("a = before its end")
            whole = len(piece) - len(piece) % 4
            data += base64.b64decode(piece[:whole], validate=True)
            pending = piece[whole:]
            limits.check_bytes(len(data), described)
        data += base64.b64decode(pending + "=" * (-len(pending) % 4), validate=True)
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"{described} is not base64: {error}") from error
    limits.check_bytes(len(data), described)
    return bytes(data)


def _end_of_base64(payload: str) -> int:
    """Where the padding and the white space at the end begin."""
    end = len(payload)
    while end and (payload[end - 1] == "=" or payload[end - 1].isspace()):
        end -= 1
    return end


_STANDARD = str.maketrans("-_", "+/")
