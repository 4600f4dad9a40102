"""Text files of users: UTF-8, with or without a byte order mark; anything else is named with its line."""

from __future__ import annotations

import codecs
from pathlib import Path

from qvl_runtime.errors import QVLError

_MARKS = (  # the longer mark first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_GZIP = b"\x1f\x8b"


def read_text(path: Path, error: type[QVLError]) -> str:
    """Read a UTF-8 file. Raises `error` for another encoding, and `OSError` as `Path.read_bytes` does."""
    return decode(path.read_bytes(), str(path), error)


def decode(data: bytes, name: str, error: type[QVLError], line: int = 1) -> str:
    """Decode UTF-8 and drop a byte order mark; raise `error` that names file, line and likely encoding.

    name: of the file; line: the number of the first line of `data`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(_fault(data, cause, name, line)) from None
    if "\0" in text:
        at = line + text.count("\n", 0, text.index("\0"))
        raise error(f"{name} line {at} holds a NUL character, as text in UTF-16 does: save the file as UTF-8")
    return text.removeprefix("\ufeff") if line == 1 else text


def _fault(data: bytes, cause: UnicodeDecodeError, name: str, line: int) -> str:
    if line == 1 and data.startswith(_GZIP):
        return f"{name} is compressed by gzip: unpack it with gunzip"
    for mark, encoding in _MARKS if line == 1 else ():
        if data.startswith(mark):
            return f"{name} line 1 is {encoding}; expected UTF-8: save the file in that encoding"
    start = data.rfind(b"\n", 0, cause.start) + 1
    at = line + data.count(b"\n", 0, cause.start)
    end = data.find(b"\n", cause.start)
    return (
        f"{name} line {at} is not UTF-8 (byte 0x{data[cause.start]:02x} at {cause.start - start + 1}"
        f"{_guess(data[start : end if end >= 0 else len(data)])}): save the file as UTF-8"
    )


def _guess(line: bytes) -> str:
    """The encoding that a line seems to have, for the message: a line of Latin letters is rarely GB2312 throughout."""
    if b"\0" in line:
        return ", which looks like UTF-16"
    try:
        text = line.decode("gb2312")
    except UnicodeDecodeError:
        return ""
    return ", which looks like GBK" if sum("\u4e00" <= character <= "\u9fff" for character in text) > 1 else ""
