"""What can go wrong, by name. Every message says what was found, what was wanted and the way out.

All errors that a user can cause or mend derive from `QVLError`, so that a program can catch one class and the command
line can print one line. Most are also `ValueError`, which is what they are.
"""

from __future__ import annotations


class QVLError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(QVLError, ValueError):
    """A configuration file or an option asks for something that does not exist or is not supported."""


class CheckpointError(QVLError, ValueError):
    """A checkpoint is missing, incomplete, damaged or does not fit its configuration."""


class DownloadError(QVLError):
    """A hub or an http(s) address could not be read, or reading it was not allowed."""


class PromptError(QVLError, ValueError):
    """A prompt, a message list or a box string cannot be understood."""


class ImageError(QVLError, ValueError):
    """An image cannot be read, or is over a limit on bytes, pixels or time."""


class SamplingError(QVLError, ValueError):
    """A sampling parameter is out of its range."""


class CapacityError(QVLError, ValueError):
    """A request is longer than the context, or needs more memory than there is."""
