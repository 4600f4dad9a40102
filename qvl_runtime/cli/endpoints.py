"""Where a batch reads and writes: files, pipes and standard streams, each opened once, whatever it is."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qvl_runtime.cli.streams import CHUNK, binary, is_ready
from qvl_runtime.cli.terminal import say
from qvl_runtime.errors import PromptError
from qvl_runtime.reading.lines import MAX_LINE, Line, read_lines
from qvl_runtime.reading.locks import TAKEN, lock_file

STANDARD = "-"  # the name of standard input and of standard output
_STANDARD_PATHS = {"/dev/stdin": 0, "/dev/fd/0": 0, "/dev/stdout": 1, "/dev/fd/1": 1}
_UNREADABLE = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class Input:
    """A file, pipe or standard input, read once from its start."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises `PromptError` for what has no lines, such as a folder or a device, and `OSError`."""
        self.path: Path | None = None  # of a regular file, which can be read again
        self.name = "standard input" if _is_standard(path, 0) else str(path)
        if _is_standard(path, 0):
            self._file = binary(sys.stdin)
            return
        mode = path.stat().st_mode
        kind = next((kind for test, kind in _UNREADABLE if test(mode)), None)
        if kind is not None and not path.samefile(os.devnull):
            raise PromptError(f"{path} is {kind}; expected JSON Lines in a file or a pipe, or - for standard input")
        self._file = path.open("rb", buffering=0)
        self.path = path if stat.S_ISREG(mode) else None

    def lines(self, limit: int = MAX_LINE, wait: Callable[[], bool] = lambda: True) -> Iterator[Line | None]:
        """Read its lines as they arrive; None if there is none at the moment and `wait` returns False."""
        return read_lines(lambda: self._read(wait()), self.name, limit)

    def count(self, limit: int = MAX_LINE) -> int | None:
        """The number of lines that are not blank; None for a pipe, since what was read of it is gone."""
        if self.path is None:
            return None
        with self.path.open("rb", buffering=0) as file:
            return sum(1 for _ in read_lines(lambda: file.read(CHUNK), self.name, limit))

    def close(self) -> None:
        """Close it, unless it is standard input."""
        if self.name != "standard input":
            self._file.close()

    def _read(self, wait: bool) -> bytes | None:
        while wait or is_ready(self._file):
            data: bytes | None = self._file.read(CHUNK)
            if data is not None:
                return data
            select.select([self._file], [], [])  # another program made the pipe non-blocking
        return None


class Output:
    """A file, pipe or standard output, written line by line."""

    def __init__(self, path: Path) -> None:
        """Look at it, and open it if it exists. Raises `PromptError` for what cannot be written, and `OSError`."""
        self.path: Path | None = None  # of a regular file, which may exist
        self.name = "standard output" if _is_standard(path, 1) else str(path)
        self._file: Any = None
        if _is_standard(path, 1):
            self._file = binary(sys.stdout)
        elif not path.exists():
            self.path = path
            if not os.access(path.parent, os.W_OK):
                missing = "cannot be written to" if path.parent.is_dir() else "does not exist: create it first"
                raise PromptError(f"{path} cannot be written: the folder {path.parent} {missing}")
        elif path.is_file():
            self.path = path
            self._file = path.open("r+b", buffering=0)
            lock_file(self._file, path)
        elif path.is_dir() or path.is_block_device() or path.is_socket():
            raise PromptError(f"{path} is no file to write; expected a file, a pipe, or - for standard output")
        else:
            self._file = os.fdopen(_open_pipe(path), "wb", buffering=0)

    def begin(self, end: int) -> None:
        """Continue a regular file after its first `end` bytes, or create it. Raises `PromptError` and `OSError`."""
        if self.path is None:
            return
        if self._file is None:
            try:
                self._file = self.path.open("xb", buffering=0)
            except FileExistsError:
                raise PromptError(TAKEN.format(self.path)) from None
            lock_file(self._file, self.path)
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, line: str) -> None:
        """Write one line at once, so that a kill leaves at most one that is not whole. Raises `OSError`."""
        rest = memoryview((line + "\n").encode("utf-8", "backslashreplace"))
        try:
            while rest:
                written = self._file.write(rest)
                rest = rest[written or 0 :]
                if written is None:  # another program made the pipe non-blocking
                    select.select([], [self._file], [])
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from error

    def close(self) -> None:
        """Close it, unless it is standard output."""
        if self._file is not None and self.name != "standard output":
            self._file.close()


def check_distinct(source: Path, target: Path) -> None:
    """Raise `PromptError` if answers would be written over the requests, or into the pipe that they come from."""
    try:
        given, written = _status(source, 0), _status(target, 1)
    except OSError:  # one does not exist, or is closed
        return
    if os.path.samestat(given, written) and not stat.S_ISCHR(given.st_mode):  # a terminal and /dev/null may be both
        raise PromptError(f"{target} holds the requests: choose another file for the answers")


def _status(path: Path, descriptor: int) -> os.stat_result:
    return os.fstat(descriptor) if str(path) == STANDARD else path.stat()


def _is_standard(path: Path, descriptor: int) -> bool:
    """Whether a path is standard input or output; one that the shell opened from a file is that file."""
    return str(path) == STANDARD or (_STANDARD_PATHS.get(str(path)) == descriptor and not path.is_file())


def _open_pipe(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        say(f"waiting for a program that reads {path}")
        return os.open(path, os.O_WRONLY)
    os.set_blocking(descriptor, True)
    return descriptor
