"""Exceptions. Each message says what was found, what was expected, and how to fix it.

All errors that a user can cause or fix derive from `QVLError`, so that a program can catch one class and the command
line can print one line. Most are `ValueError`s, too.
"""

from __future__ import annotations

MAX_MESSAGE = 600  # characters
MAX_QUOTED = 100  # characters of a value that is quoted in a message


class QVLError(Exception):
    """Base class of the errors that this package raises. Its message is one line of at most `MAX_MESSAGE` characters.

    Messages quote what was found, and that may come from a stranger: no line break or control character gets through to
    forge a line of a log or to steer a terminal, and the middle of a longer message is left out.
    """

    def __str__(self) -> str:
        return shortened(escaped(super().__str__()), MAX_MESSAGE)


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """Return the repr of a value for a message, with its middle left out beyond `limit` characters.

    Only the ends of a long string or bytes are represented, so that quoting megabytes costs nothing.
    """
    if isinstance(value, (str, bytes)) and len(value) > 2 * limit:
        separator = "" if isinstance(value, str) else b""
        value = separator.join((value[:limit], value[-limit:]))  # type: ignore[arg-type]
    return shortened(escaped(repr(value)), limit)


def escaped(text: str) -> str:
    """Make a text one printable line: white space becomes a space, other control characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """Leave out the middle of a text that is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - head - 5) :]}"


class ConfigError(QVLError, ValueError):
    """A configuration file or an option has a value that does not exist or is not supported."""


class CheckpointError(QVLError, ValueError):
    """A checkpoint is missing, incomplete or damaged, or does not match its configuration."""


class DownloadError(QVLError):
    """A hub or an http(s) URL could not be read, or reading it was not allowed."""


class PromptError(QVLError, ValueError):
    """A prompt, a message list or a box string is malformed."""


class ImageError(QVLError, ValueError):
    """An image cannot be read, or exceeds a limit on bytes, pixels or time."""


class SamplingError(QVLError, ValueError):
    """A sampling parameter is out of range."""


class CapacityError(QVLError, ValueError):
    """A request is longer than the context, or needs more memory than is available."""
