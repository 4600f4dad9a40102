"""Which files of a conversion are on the disk, so that it can be stopped at any moment and resumed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from qvl_runtime.convert.shard_writer import Shard
from qvl_runtime.errors import CheckpointError
from qvl_runtime.reading.json_text import parse_json
from qvl_runtime.weights.file_names import name_fault
from qvl_runtime.weights.files import full_disk_error, sync
from qvl_runtime.weights.manifest import FORMAT, Manifest, PackedLinear, ShardRecord
from qvl_runtime.weights.partial import PartialFolder
from qvl_runtime.weights.records import read_record

COMMAND = "qvl convert"
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class _Line:
    """A complete file."""

    shard: str  # its name
    record: ShardRecord
    items: list[str]
    bytes: int
    linears: dict[str, PackedLinear]


class Journal:
    """The complete files of a conversion: one line each in `journal.jsonl` of its `PartialFolder`."""

    def __init__(self, destination: Path, key: dict[str, object]) -> None:
        """key: the source and the options; work with another key is not resumed but replaced."""
        self._partial = PartialFolder(destination, {"command": COMMAND, "format": FORMAT, **key})
        self.folder = self._partial.model
        self.done: set[str] = set()
        self.linears: dict[str, PackedLinear] = {}
        self.shards: dict[str, ShardRecord] = {}
        self.bytes = 0  # of the complete files

    def __enter__(self) -> Journal:
        """Resume what an earlier run with the same key left, or start. Raises as `PartialFolder` does."""
        self._partial.__enter__()
        try:
            published = not self.folder.is_dir()  # by a run that was killed before it removed its journal
            if published or not self._partial.resumable:
                self._check_settings()
                self._partial.restart()
            self._handle = (self._partial.home / _JOURNAL).open("a+", encoding="utf-8", errors="replace")
            self._resume()
        except BaseException:
            self._partial.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Release the lock; an error before the first file is complete leaves nothing."""
        self._handle.close()
        if error is not None and not self.shards:
            self._partial.discard()
        self._partial.__exit__(kind, error, at)

    def _check_settings(self) -> None:
        """Raise `CheckpointError` for finished files of a run with other settings, which is another's to continue.

        What was made of a source that has changed since is of no use, and is replaced.
        """
        journal = self._partial.home / _JOURNAL
        differences = self._partial.differences("source")
        if differences and journal.is_file() and journal.stat().st_size:
            raise CheckpointError(
                f"{self._partial.home} holds files of a run with other settings ({', '.join(differences):.300}): use "
                "those settings to resume it, or remove the folder to start again"
            )

    def append(self, shard: Shard) -> None:
        """Enter a file that is complete and on the disk."""
        sync(self.folder)
        line = json.dumps(
            {
                "shard": shard.name,
                "record": asdict(shard.record),
                "items": shard.items,
                "bytes": shard.bytes,
                "linears": {name: asdict(linear) for name, linear in shard.linears.items()},
            }
        )
        with full_disk_error(self._partial.home / _JOURNAL):
            self._handle.write(line + "\n")
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self._add(shard)

    def complete(self, manifest: Manifest) -> None:
        """Write the manifest and publish the folder: all files are complete."""
        manifest.write(self.folder)
        self._handle.close()
        self._partial.publish()

    def _resume(self) -> None:
        """Take over the files of the journal's lines, up to the first line that was cut off or damaged."""
        self._handle.seek(0)
        valid_bytes = 0
        for line in self._handle.read().splitlines(keepends=True):
            entry = self._read(line)
            if entry is None:
                break
            self._add(Shard(entry.shard, entry.record, entry.items, entry.linears, entry.bytes))
            valid_bytes += len(line.encode())
        self._handle.truncate(valid_bytes)
        for path in self.folder.iterdir():  # cut off by a kill
            if path.name not in self.shards:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read(self, line: str) -> _Line | None:
        """One line, or None for one that a kill cut off, or whose file is not as it says."""
        if not line.endswith("\n") or not line.isascii():
            return None
        try:
            raw = parse_json(line, "the journal", CheckpointError)
            entry = read_record(_Line, raw, "the journal", {"PackedLinear": PackedLinear, "ShardRecord": ShardRecord})
        except CheckpointError:
            return None
        if name_fault(entry.shard) or not (self.folder / entry.shard).is_file():
            return None
        return entry if (self.folder / entry.shard).stat().st_size == entry.bytes else None

    def _add(self, shard: Shard) -> None:
        self.shards[shard.name] = shard.record
        self.linears |= shard.linears
        self.done |= set(shard.items)
        self.bytes += shard.bytes
