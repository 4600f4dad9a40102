"""The output folder of a job: what the job is, and its answers in parts, each once, however often it is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_runtime.engine.records import has_failed
from qvl_runtime.errors import PromptError, quoted
from qvl_runtime.reading.locks import lock_file

JOB = "job.json"
PART_ROWS = 100_000
_BEGINNING = b'{"index": '


class Parts:
    """Answers that are in the folder, and the part that is being written. One process at a time has it open.

    A run begins a new part, so nothing that an earlier one wrote is ever changed, except that a last line which was cut
    off is removed. What counts as answered is what can be read in the parts: there is no other record of it.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """Open or create a folder. job: what decides the answers; a folder holds those of one job.

        Raises `PromptError` for the folder of another job, or one that another process writes, and `OSError`.
        """
        self.folder, self.errors = folder, 0
        self.done: set[int] = set()
        self._file: Any = None
        self._in_part = 0
        _check(folder, job)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("wb")
        try:
            lock_file(self._lock, folder)
            _check(folder, job)
            _write_job(folder / JOB, job)
            self._number = self._read()
        except BaseException:
            self._lock.close()
            raise

    def write(self, index: int, line: str, failed: bool) -> bool:
        """Append the answer of a row; False if it has one already, which then stays. Raises `OSError`."""
        if index in self.done:
            return False
        if self._file is None or self._in_part >= PART_ROWS:
            self._begin()
        self._file.write((line + "\n").encode("utf-8", "backslashreplace"))
        self.done.add(index)
        self.errors += failed
        self._in_part += 1
        return True

    def flush(self) -> None:
        """Hand what was written to the system, so that it survives this process."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Let others have the folder."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _begin(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = (self.folder / f"part-{self._number:05}.jsonl").open("xb")
        self._number, self._in_part = self._number + 1, 0

    def _read(self) -> int:
        """Take in what the parts hold, and return the number of the next one."""
        number = 0
        for path in sorted(self.folder.glob("part-*.jsonl")):
            if not path.stem[5:].isdecimal():
                raise PromptError(f"{path} is no part that this command wrote: move it elsewhere")
            number = max(number, int(path.stem[5:]) + 1)
            with path.open("r+b") as file:
                end = 0
                for line in file:
                    if line.endswith(b"\n"):
                        self._take(line, path)
                        end += len(line)
                    elif line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                        file.truncate(end)  # a kill cut it off
                    else:
                        raise PromptError(f"{path} does not end with an answer: move it elsewhere")
        return number

    def _take(self, line: bytes, path: Path) -> None:
        try:
            record = json.loads(line)
            index = record["index"]
            if type(index) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PromptError(f"{path} holds {quoted(line)}, which is no answer: move it elsewhere") from None
        if index in self.done:
            raise PromptError(f"{path} answers request {index} a second time: use another folder")
        self.done.add(index)
        self.errors += has_failed(record)


def _check(folder: Path, job: Mapping[str, Any]) -> None:
    """Raise `PromptError` unless the folder is this job's, or empty, or does not exist."""
    if folder.exists() and not folder.is_dir():
        raise PromptError(f"{folder} is a file; with --ray, answers go to a folder")
    path = folder / JOB
    if path.exists():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            found = None
        if found == job:
            return
        known = found if isinstance(found, dict) else {}
        name = next((name for name in job if known.get(name) != job[name]), "settings")
        raise PromptError(
            f"{folder} holds answers of another job, whose {name} is {quoted(known.get(name))}, "
            f"not {quoted(job.get(name))}: use another folder"
        )
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise PromptError(f"{folder} is not empty and holds no job: use another folder")


def _write_job(path: Path, job: Mapping[str, Any]) -> None:
    if not path.exists():
        temporary = path.with_name(f".{JOB}.partial")
        temporary.write_text(json.dumps(job, indent=1, ensure_ascii=False), "utf-8")
        os.replace(temporary, path)
