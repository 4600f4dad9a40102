"""Standard input, output and error: text in any encoding, streams that are closed or full, readers that left."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO

from qvl_runtime.errors import PromptError
from qvl_runtime.reading.lines import Line, read_lines
from qvl_runtime.reading.text import decode

CHUNK = 2**16  # bytes read at once
MAX_TEXT = 16 * 2**20  # bytes of a prompt; the longest context holds far less


class Closed(io.TextIOBase):
    """Stands for a standard stream that the shell closed (`>&-`): to use it is an `OSError`, rather than silence."""

    def __init__(self, label: str) -> None:
        self.label = label

    def refuse(self, *_: object) -> Any:
        """Raise `OSError` that names the stream."""
        raise OSError(errno.EBADF, "closed by the shell", self.label)

    read = readline = write = refuse
    fileno = refuse


def prepare() -> None:
    """Make standard streams safe to use; called once, before anything opens a file.

    A stream that the shell closed gets the null device, lest the next file that is opened take its number and be
    written to. In a locale without UTF-8, a character that it lacks becomes "?" rather than an error.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python's annotations leave out that these are None then.
    sys.stdin = sys.stdin or Closed("standard input")
    sys.stdout = sys.stdout or Closed("standard output")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the process's life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def check_output() -> None:
    """Raise `OSError` if standard output is closed: at once, rather than after a model is loaded."""
    if isinstance(sys.stdout, Closed):
        sys.stdout.refuse()


def discard_output() -> None:
    """Send what is still buffered for standard output and standard error nowhere, since writing it failed."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def binary(stream: TextIO) -> Any:
    """The unbuffered bytes below a standard stream. Raises `OSError` if it is closed."""
    if isinstance(stream, Closed):
        stream.refuse()
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # text in memory, as in a test or a notebook
        return io.BytesIO(stream.read().encode("utf-8", "surrogatepass"))
    return getattr(buffer, "raw", buffer)


def is_ready(file: Any) -> bool:
    """Whether a read would return at once: always for files, and for pipes if there is something, or the end."""
    try:
        return bool(select.select([file], [], [], 0)[0])
    except (OSError, ValueError, TypeError):  # no descriptor: in memory
        return True


def input_text() -> str:
    """All of standard input, as one text. Raises `PromptError` for one too long or in another encoding."""
    file, data = binary(sys.stdin), bytearray()
    while chunk := file.read(CHUNK):
        data += chunk
        if len(data) > MAX_TEXT:
            raise PromptError(f"standard input has more than {MAX_TEXT:,} bytes; expected one prompt")
    return input_decoded(bytes(data))


def input_lines() -> Iterator[Line]:
    """The lines of standard input that are not blank, as they arrive."""
    file = binary(sys.stdin)
    lines = read_lines(lambda: file.read(CHUNK), "standard input", MAX_TEXT, any_encoding=True)
    return (line for line in lines if line is not None)


def input_decoded(data: bytes, line: int = 1) -> str:
    """Decode a text of standard input: UTF-8, or the terminal's own encoding. Raises `PromptError`."""
    encoding = (getattr(sys.stdin, "encoding", None) or "utf-8").lower().replace("-", "")
    if encoding not in ("utf8", "ascii", "ansi_x3.41968"):
        with suppress(UnicodeDecodeError, LookupError):
            return data.decode(encoding)
    return decode(data, "standard input", PromptError, line)


def argument_text(text: str, name: str) -> str:
    """The text of an argument. Raises `PromptError`, naming it, if the shell passed bytes in another encoding."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return text
    data = text.encode("utf-8", "surrogateescape")  # as Python decodes arguments
    way_out = "set the terminal to UTF-8, or give the text by standard input, in UTF-8"
    return decode(data, f"{name}:", PromptError, way_out=way_out)
