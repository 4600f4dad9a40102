"""Files that one process at a time writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvl_runtime.errors import PromptError, QVLError

TAKEN = "another process is writing {}: wait for it, or choose another file"


def lock_file(file: Any, path: Path, error: type[QVLError] = PromptError) -> None:
    """Lock an open file until it is closed. Raises `error`, which names `path`, if another process has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise error(TAKEN.format(path)) from None
    except OSError:  # a disk without locks, such as some network drives: two runs were never kept apart there
        return
