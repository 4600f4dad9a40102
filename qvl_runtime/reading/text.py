"""Text of users: UTF-8, with or without a byte order mark; anything else is named with its line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from qvl_runtime.errors import QVLError

_MARKS = (  # the longer mark first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_PACKED = (  # how compressed files begin, and what unpacks them
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"PK\x03\x04", "zip, as those of spreadsheets are", "unzip, or export it as text"),
)
_LINE_END = re.compile(rb"\r\n|\r|\n")


def read_text(path: Path, error: type[QVLError]) -> str:
    """Read a UTF-8 file. Raises `error` for another encoding, and `OSError` as `Path.read_bytes` does."""
    return decode(path.read_bytes(), str(path), error)


def decode(
    data: bytes, name: str, error: type[QVLError], line: int = 1, way_out: str = "save the file as UTF-8"
) -> str:
    """Decode UTF-8 and drop a byte order mark; raise `error` that names file, line and likely encoding.

    name: of the file; line: the number of the first line of `data`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{name} {_fault(data, cause, line, way_out)}") from None
    if "\0" in text:
        at = line + text.count("\n", 0, text.index("\0"))
        packed = _packed(data) if line == 1 else None
        raise error(f"{name} {packed or f'line {at} holds a NUL character, as text in UTF-16 does: {way_out}'}")
    return text.removeprefix("\ufeff")


def check_beginning(data: bytes, name: str, error: type[QVLError]) -> None:
    """Raise `error` if the beginning of a file of lines shows that most of it is not UTF-8.

    That is so for a compressed file, for UTF-16, and where more than half of the lines in `data` are not UTF-8. The
    last line of `data` may be cut anywhere.
    """
    if _packed(data) or any(data.startswith(mark) for mark, _ in _MARKS) or b"\0" in data[:4]:
        decode(data, name, error)
    *lines, last = _LINE_END.split(data)
    faults = [number for number, line in enumerate(lines or [last], start=1) if not _is_beginning_of_utf8(line)]
    if 2 * len(faults) > len(lines or [last]):
        decode((lines or [last])[faults[0] - 1], name, error, faults[0])


def _is_beginning_of_utf8(data: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def _fault(data: bytes, cause: UnicodeDecodeError, line: int, way_out: str) -> str:
    if line == 1 and (packed := _packed(data)):
        return packed
    for mark, encoding in _MARKS if line == 1 else ():
        if data.startswith(mark):
            return f"line 1 is {encoding}; expected UTF-8: {way_out}"
    start = data.rfind(b"\n", 0, cause.start) + 1
    at = line + data.count(b"\n", 0, cause.start)
    end = data.find(b"\n", cause.start)
    return (
        f"line {at} is not UTF-8 (byte 0x{data[cause.start]:02x} at {cause.start - start + 1}"
        f"{_guess(data[start : end if end >= 0 else len(data)])}): {way_out}"
    )


def _packed(data: bytes) -> str | None:
    """What to say of a compressed file; None for anything else, also for a text that begins like one."""
    for head, by, tool in _PACKED:
        if data.startswith(head) and (b"\0" in data or not _is_beginning_of_utf8(data)):
            return f"is compressed by {by}: unpack it with {tool}"
    return None


def _guess(line: bytes) -> str:
    """The encoding that a line seems to have, for the message: a line of Latin letters is rarely GB2312 throughout."""
    if b"\0" in line:
        return ", which looks like UTF-16"
    try:
        text = line.decode("gb2312")
    except UnicodeDecodeError:
        return ""
    return ", which looks like GBK" if sum("\u4e00" <= character <= "\u9fff" for character in text) > 1 else ""
