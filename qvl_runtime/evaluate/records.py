"""The answers of a run, one line each, in a file that is only ever appended to.

Its first line holds the settings of the run. A run that was killed leaves at most one line that is not whole, which is
cut off; the next run with the same settings asks only what has no answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from qvl_runtime.errors import DataError
from qvl_runtime.reading.locks import lock_file

_WAY_OUT = "repeat the run with the same settings, or choose another output folder"


class Records:
    """The file of a run's answers, by number of the sample; locked while it is open."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open or create it. Raises `DataError` where it belongs to a run with other settings or is written by one."""
        self.path = path
        self.entries: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab+", buffering=0)
        try:
            lock_file(self._file, path, DataError)
            self._resume(settings)
        except BaseException:
            self._file.close()
            raise

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append the answer to sample `entry["number"]`, at once."""
        self._write(entry)
        self.entries[entry["number"]] = dict(entry)

    def _resume(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write({"settings": settings})
            return
        self._compare(self._parsed(lines[0], 1).get("settings"), settings)
        for number, line in enumerate(lines[1:], 2):
            entry = self._parsed(line, number)
            if not isinstance(entry.get("number"), int):
                raise DataError(f"{self.path} line {number} is no answer of a run: {_WAY_OUT}")
            self.entries.setdefault(entry["number"], entry)

    def _compare(self, old: Any, new: Mapping[str, Any]) -> None:
        if not isinstance(old, dict):
            raise DataError(f"{self.path} does not begin with the settings of a run: choose another output folder")
        plain = json.loads(json.dumps(new))
        if old != plain:
            differ = sorted(name for name in {*old, *plain} if old.get(name) != plain.get(name))
            shown = ", ".join(f"{name} {old.get(name)!r} there and {plain.get(name)!r} now" for name in differ[:2])
            raise DataError(f"{self.path} holds answers of a run with other settings ({shown}): {_WAY_OUT}")

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise DataError(f"{self.path} line {number} is damaged: {_WAY_OUT}")
        return entry

    def _write(self, entry: Mapping[str, Any]) -> None:
        rest = memoryview((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
