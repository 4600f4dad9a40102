"""The rows of a suite as they come, one JSON line each: a crash loses none, and a later run leaves out what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """The lines of one run and of the runs that it resumes."""

    def __init__(self, path: Path) -> None:
        """Read what the file has so far; a last line that a crash cut short is left out."""
        self._path = path
        self.rows: dict[str, list[Row]] = {}
        self.done: dict[str, float] = {}  # seconds of each part that ended without a failure
        self.setting: Row = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                self._take(json.loads(line))
            except ValueError:
                continue

    def begin(self, setting: Mapping[str, Any]) -> bool:
        """Note what runs where; forget the rows of other code, hardware or kind of run. True: going on."""
        same = all(
            self.setting.get(key) == setting.get(key) for key in ("commit", "device", "torch", "triton", "dry_run")
        )
        if self.setting and same:
            return True
        self.rows, self.done = {}, {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._write({"setting": dict(setting)})
        return False

    def start(self, part: str) -> None:
        """Start a part without the rows of an earlier try."""
        self._write({"start": part})

    def add(self, part: str, row: Row) -> None:
        """Keep a row of a part."""
        self._write({"part": part, "row": row})

    def finish(self, part: str, seconds: float) -> None:
        """Note that a part ended without a failure."""
        self._write({"done": part, "seconds": seconds})

    def _write(self, entry: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._take(entry)

    def _take(self, entry: Row) -> None:
        if "setting" in entry:
            self.setting = entry["setting"]
        elif "start" in entry:
            self.rows[entry["start"]] = []
            self.done.pop(entry["start"], None)
        elif "part" in entry:
            self.rows.setdefault(entry["part"], []).append(entry["row"])
        elif "done" in entry:
            self.done[entry["done"]] = entry["seconds"]
