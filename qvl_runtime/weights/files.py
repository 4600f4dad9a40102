"""Files that are on the disk when a function returns: a rename then lasts through a power cut."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qvl_runtime.errors import CheckpointError
from qvl_runtime.reading.regular_files import open_regular

_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def full_disk_error(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, while `path` is written, into a `CheckpointError` with the way out."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in _FULL and not any(f"os error {full}" in str(error) for full in _FULL):  # as safetensors says it
            raise
        raise CheckpointError(
            f"the disk is full at {path.name} in {path.parent}: make room and rerun the same command"
        ) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file that appears as `path` once it is on the disk.

    Raises `CheckpointError` for a full disk; nothing stays after an error.
    """
    partial = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        with full_disk_error(path):
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            partial.chmod(mode)  # safetensors makes files that only their owner may read
            sync(partial)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    partial.replace(path)
    sync(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file. Raises `CheckpointError` for anything else, and for a full disk."""
    try:
        with full_disk_error(target), open_regular(source, CheckpointError) as file, target.open("xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be copied to {target.parent} ({error.strerror})") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file to the disk. Raises `CheckpointError` if that is full."""
    with full_disk_error(path):
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        sync(path)
