"""Read a file that may be anything: a pipe, a device or a folder of that name is an error, not a wait without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qvl_runtime.errors import QVLError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, error: type[QVLError]) -> BinaryIO:
    """Open a regular file, or a link to one, to read its bytes.

    Raises `FileNotFoundError` where there is none, and `error`, which names the file, for anything else.
    """
    try:
        # Opened for reading alone, a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except ValueError as cause:  # NUL, or a lone surrogate
        raise error(f"{path} cannot be the name of a file ({cause})") from None
    except OSError as cause:
        kind = _kind(path)
        found = f"is {kind}; expected a file" if kind else f"cannot be read ({cause.strerror}): check its permissions"
        raise error(f"{path} {found}") from cause
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise error(f"{path} is {_name(mode)}; expected a file")
    return os.fdopen(handle, "rb")


def read_regular(path: Path, error: type[QVLError], limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes. Raises as `open_regular` does, and `error` for a larger one."""
    with open_regular(path, error) as file:
        try:
            data = file.read(limit + 1)
        except OSError as cause:
            raise error(f"{path} cannot be read ({cause.strerror}): check the disk") from cause
    if len(data) > limit:
        raise error(f"{path} is larger than {limit:,} bytes, which no such file is: fetch it again")
    return data


def is_there(path: Path) -> bool:
    """Whether something has this name, whatever it is: also a link to a file that is missing."""
    return os.path.lexists(path)


def _kind(path: Path) -> str:
    """What has this name, if that is known and no file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""
    return "" if stat.S_ISREG(mode) else _name(mode)


def _name(mode: int) -> str:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
