"""Lines of a file or pipe of any size: numbered, bounded, and as they arrive."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qvl_runtime.errors import PromptError
from qvl_runtime.reading.text import check_beginning

MAX_LINE = 64 * 2**20  # bytes: an image in base64 takes 27 million of them at most by default
_KEPT = 256  # bytes of a line that is longer than allowed
_ENDLESS = 16  # times the limit: no line of text, but a device, or a file of something else
_LINE_END = re.compile(rb"\r\n|\r|\n")


class Line(NamedTuple):
    """One line that is not blank."""

    number: int  # from 1, blank lines included
    data: bytes  # without its end
    size: int  # in bytes; `data` is only the beginning of a line over the limit


def read_lines(
    read: Callable[[], bytes | None], name: str, limit: int = MAX_LINE, any_encoding: bool = False
) -> Iterator[Line | None]:
    """Split what `read` gives into lines, which end in LF, CR LF or CR, and leave out blank ones.

    read: returns the next bytes, b"" at the end, or None if there are none at the moment, for which None is yielded.
    Holds at most `limit` bytes and one chunk. Raises `PromptError`, naming the file, for a line that does not end, and
    unless `any_encoding` for a file whose beginning is not UTF-8.
    """
    chunks = _checked(read, name, any_encoding)
    number, size, kept = 0, 0, bytearray()  # of lines that ended, and of the line that has not

    def ended(part: bytes) -> Line:
        nonlocal number, size
        number, size = number + 1, size + len(part)
        line = Line(number, bytes(kept + part if size <= limit else (kept + part)[:_KEPT]), size)
        size = 0
        kept.clear()
        return line

    for chunk in chunks:
        if chunk is None:
            yield None
            continue
        *parts, rest = _LINE_END.split(chunk)
        yield from filter(_is_not_blank, map(ended, parts))
        size += len(rest)
        kept += rest
        if size > limit:
            del kept[_KEPT:]
        if size > _ENDLESS * limit:
            raise PromptError(f"{name} line {number + 1} has no end after {size:,} bytes; expected lines of text")
    if kept:
        yield from filter(_is_not_blank, [ended(b"")])


def _checked(read: Callable[[], bytes | None], name: str, begun: bool) -> Iterator[bytes | None]:
    """Chunks up to the end. The first is checked unless `begun`, and no CR LF is left that was cut in two."""
    after_cr = False
    while (chunk := read()) != b"":
        if chunk is None:
            yield None
            continue
        if not begun:
            check_beginning(chunk, name, PromptError)
            begun = True
        joined = chunk.removeprefix(b"\n") if after_cr else chunk
        after_cr = chunk.endswith(b"\r")
        yield joined


def _is_not_blank(line: Line) -> bool:
    return bool(line.data.removeprefix(codecs.BOM_UTF8).strip()) or line.size > len(line.data)
