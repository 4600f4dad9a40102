"""Exceptions. Each message says what was found, what was expected, and how to fix it.

All errors that a user can cause or fix derive from `QVLError`, so that a program can catch one class and the command
line can print one line. Most are `ValueError`s, too.
"""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 600  # characters
MAX_QUOTED = 100  # characters of a value that is quoted in a message


class QVLError(Exception):
    """Base class of the errors that this package raises. Its message is one line of at most `MAX_MESSAGE` characters.

    Messages quote what was found, and that may come from a stranger: no line break or control character gets through to
    forge a line of a log or to steer a terminal, and the middle of a longer message is left out.
    """

    # What became of each prompt of `Engine.generate`, in order: completions, and errors where there are none.
    completions: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        return shortened(escaped(super().__str__()), MAX_MESSAGE)


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """Return the repr of a value for a message, with its middle left out beyond `limit` characters.

    Only the ends of a long string or bytes are represented, so that quoting megabytes costs nothing.
    """
    if isinstance(value, (str, bytes)) and len(value) > 2 * limit:
        separator = "" if isinstance(value, str) else b""
        value = separator.join((value[:limit], value[-limit:]))  # type: ignore[arg-type]
    try:
        represented = repr(value)
    except Exception:  # an int of over 4300 digits, or an object's own fault
        represented = f"a value of type {type(value).__name__}"
    return shortened(escaped(represented), limit)


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


class GroupError(QVLError):
    """A process of a tensor-parallel model has ended."""


class DownloadError(QVLError):
    """A hub or an http(s) URL could not be read, or reading it was not allowed."""


class PromptError(QVLError, ValueError):
    """A prompt, a message list or a box string is malformed."""


class ImageError(QVLError, ValueError):
    """An image cannot be read, or exceeds a limit on bytes, pixels or time."""


class DataError(QVLError, ValueError):
    """The files of an evaluation are missing, malformed, or belong to another run."""


class ClusterError(QVLError):
    """A Ray cluster is not there, does not fit, or could not do what was asked of it."""


class SamplingError(QVLError, ValueError):
    """A sampling parameter is out of range."""


class ConstraintError(SamplingError):
    """A constraint on the answer is malformed, too large, not supported, or leaves no token to continue with.

    Where it shows only while the answer is generated, it is the error of that request alone.
    """


class NumericsError(QVLError, ArithmeticError):
    """The model gave no probabilities for a token: NaN or infinite logits, or every token ruled out by the request.

    It is the error of one request. The others of the same step continue.
    """


class RuledOutError(NumericsError):
    """The request's own penalty or biases rule out every token, or give one an infinite score."""


class StepError(QVLError, RuntimeError):
    """A request could not be computed, by a fault of the program or of the machine, which is the `__cause__`.

    It is the error of one request, which fails alone as well. The others of the same step continue.
    """


class CapacityError(QVLError, ValueError):
    """A request is longer than the context, or needs more memory than is available."""


class BusyError(CapacityError):
    """As many requests are pending as may be: the same request may be answered later."""


class ForkError(QVLError, RuntimeError):
    """An engine is used in a forked child of the process that made it."""
