"""A checkpoint folder in the making: one process at a time writes it, and it appears under its name when it is whole.

Next to the destination NAME is the folder `.NAME.partial`:

    lock        held by the process at work (flock); the system releases it when that process ends, however it ends
    key.json    the command and its settings: only a run with the same ones resumes this work
    model/      the new folder, which becomes NAME by a rename

and what a command stores to resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from qvl_runtime.config.checks import read_json
from qvl_runtime.errors import CheckpointError, quoted
from qvl_runtime.reading.regular_files import is_there
from qvl_runtime.weights.files import replace_file, sync, write_json

ATTEMPTS, WAIT_S = 3, 0.03  # at the lock, which `check_idle` of another process holds for a moment
LOCK, KEY, OBSOLETE_KEY = "lock", "key.json", "key-obsolete.json"


class PartialFolder:
    """The folder `.NAME.partial` of a destination. Use it in a `with` block, which holds the lock.

    Work that is not published stays on the disk to be resumed, except for `discard`.
    """

    def __init__(self, destination: Path, key: Mapping[str, object]) -> None:
        """key: JSON values; `key["command"]` says whose work this is, all of it what must be equal to resume."""
        self.destination = Path(destination)
        self.home = self.destination.with_name(f".{self.destination.name}.partial")
        self.model = self.home / "model"
        self.key: dict[str, object] = json.loads(json.dumps(dict(key)))
        self._lock: IO[str] | None = None

    def __enter__(self) -> PartialFolder:
        """Take the lock. Raises `CheckpointError` where another process holds it, or the destination exists."""
        self._lock = self._locked()
        try:
            check_absent(self.destination)
            self._check_owner()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    @property
    def resumable(self) -> bool:
        """Whether the folder holds work with the same key."""
        return self._stored(KEY) == self.key

    def differences(self, *ignored: str) -> list[str]:
        """How the settings of the stored work differ from this key, as "bits 4 instead of 8"; empty without work."""
        stored = self._stored(KEY)
        if stored is None:
            return []
        names = [name for name in self.key if name not in ignored and stored.get(name) != self.key[name]]
        return [f"{name} {quoted(stored.get(name))} instead of {quoted(self.key[name])}" for name in names]

    def restart(self) -> None:
        """Remove all earlier work and store the key: the folder is empty but for `model/`."""
        self._clear()
        replace_file(self.home / KEY, lambda path: write_json(path, self.key))
        (self.home / OBSOLETE_KEY).unlink(missing_ok=True)
        self.model.mkdir()

    def publish(self) -> None:
        """`model/` is complete: it becomes the destination, and the rest is removed."""
        if self.destination.exists():
            raise CheckpointError(f"{self.destination} was made meanwhile; the result is in {self.model}")
        self.model.rename(self.destination)
        sync(self.destination.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder with all work in it, and release the lock."""
        self._clear()
        (self.home / OBSOLETE_KEY).unlink(missing_ok=True)
        self._release()

    def _clear(self) -> None:
        """Remove all but the lock. Killed on the way, it leaves work that says whose it was and is never resumed."""
        with contextlib.suppress(FileNotFoundError):
            (self.home / KEY).replace(self.home / OBSOLETE_KEY)
        for path in self._contents():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != OBSOLETE_KEY:
                path.unlink()

    def _contents(self) -> list[Path]:
        return [path for path in self.home.iterdir() if path.name != LOCK]

    def _stored(self, name: str) -> dict[str, object] | None:
        path = self.home / name
        return read_json(path, CheckpointError) if is_there(path) else None

    def _check_owner(self) -> None:
        """Work of another command is not this one's to remove."""
        stored = self._stored(KEY) or self._stored(OBSOLETE_KEY)
        if stored is None and not all(path.name.startswith(KEY) for path in self._contents()):
            raise CheckpointError(
                f"{self.home} holds files and no {KEY}, so whose they are is unknown: remove the folder, or choose "
                "another destination"
            )
        if stored is not None and stored.get("command") != self.key["command"]:
            raise CheckpointError(
                f"{self.home} holds unfinished work of {stored.get('command')!r}, and this is "
                f"{self.key['command']!r}: finish that, remove the folder, or choose another destination"
            )

    def _locked(self) -> IO[str]:
        while True:
            self.home.mkdir(parents=True, exist_ok=True)
            try:
                handle = (self.home / LOCK).open("a+", encoding="utf-8")
            except FileNotFoundError:  # the process before removed the folder just now
                continue
            try:
                self._flock(handle)
                # The process before may have removed the file that was locked here.
                if _is_at(handle, self.home / LOCK):
                    handle.truncate(0)
                    handle.write(f"{os.getpid()}\n")
                    handle.flush()
                    return handle
            except BaseException:
                handle.close()
                raise
            handle.close()

    def _flock(self, handle: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:  # Windows does not let a second process write a file that is open for appending
            return
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if attempt + 1 == ATTEMPTS:
                    raise self._taken(handle) from None
                time.sleep(WAIT_S)
            except OSError as error:
                raise CheckpointError(f"{handle.name} cannot be locked ({error}): choose another disk") from error

    def check_idle(self) -> None:
        """Raise `CheckpointError`, as taking the lock would, where another process holds it now.

        It costs nothing, so that a second command ends before it reads its source; it holds nothing afterwards.
        """
        with contextlib.suppress(FileNotFoundError), (self.home / LOCK).open("r+", encoding="utf-8") as handle:
            self._flock(handle)

    def _taken(self, handle: IO[str]) -> CheckpointError:
        """Who holds the lock, and with which other settings."""
        handle.seek(0)
        pid = handle.read(20).strip()
        who = f" ({pid})" if pid.isdecimal() else ""
        differences: list[str] = []
        with contextlib.suppress(CheckpointError):  # it writes its key just now
            differences = self.differences()
        settings = f", with {', '.join(differences)}" if differences else ""
        return CheckpointError(
            f"another process{who} is writing {self.destination}{settings:.300}, and holds {self.home / LOCK}: wait "
            "for it, or choose another destination"
        )

    def _release(self) -> None:
        """Give the lock back, and remove a folder that holds nothing else."""
        if self._lock is None:
            return
        if not self._contents():
            (self.home / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process has made its lock there already
                self.home.rmdir()
        self._lock.close()
        self._lock = None


def check_absent(destination: Path) -> None:
    """Raise `CheckpointError` for a destination that exists."""
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; choose another name or remove it first")


def check_destination(source: Path, destination: Path) -> None:
    """Raise `CheckpointError` for a destination that exists, or is the source itself."""
    if destination.exists() and source.exists() and destination.samefile(source):
        raise CheckpointError(f"{destination} is the source itself; choose another folder for the result")
    check_absent(destination)


def free_bytes(destination: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be once it is made."""
    path = destination.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_folder(destination: Path, command: str, write: Callable[[Path], None]) -> None:
    """Have `write` fill a new folder that appears as `destination` when it is whole; nothing stays after an error."""
    with PartialFolder(destination, {"command": command}) as partial:
        try:
            partial.restart()
            write(partial.model)
            sync(partial.model)
            partial.publish()
        except BaseException:
            partial.discard()
            raise


def _is_at(handle: IO[str], path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
