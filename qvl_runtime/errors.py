"""Exceptions. Each message says what was found, what was expected, and how to fix it.

All errors that a user can cause or fix derive from `QVLError`, so that a program can catch one class and the command
line can print one line. Most are `ValueError`s, too.
"""

from __future__ import annotations


class QVLError(Exception):
    """Base class of the errors that this package raises."""


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
