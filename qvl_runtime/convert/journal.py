"""What of a conversion is on the disk already: kept so that it can be stopped at any moment and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qvl_runtime.convert.shard_writer import Shard
from qvl_runtime.errors import CheckpointError
from qvl_runtime.weights.manifest import FORMAT, Manifest, PackedLinear, ShardRecord
from qvl_runtime.weights.save import sync


class Journal:
    """The folder `.NAME.partial` beside a destination: `model/`, which becomes it, and a line for each whole file."""

    def __init__(self, destination: Path, key: dict[str, object], handle: IO[str]) -> None:
        self._destination, self._key, self._handle = destination, {"format": FORMAT, **key}, handle
        self.home = partial_of(destination)
        self.folder = self.home / "model"
        self.done: set[str] = set()
        self.linears: dict[str, PackedLinear] = {}
        self.shards: dict[str, ShardRecord] = {}
        self.bytes = 0  # of the files that are whole

    @classmethod
    def begin(cls, destination: Path, key: dict[str, object]) -> Journal:
        """Take up what an earlier run with the same `key` left, or start. One process at a time may."""
        home = partial_of(destination)
        home.mkdir(parents=True, exist_ok=True)
        handle = (home / "journal.jsonl").open("a+", encoding="utf-8")
        try:
            _lock(handle, home)
            journal = cls(destination, key, handle)
            journal._take_up()
        except BaseException:
            handle.close()
            raise
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.close()

    def note(self, shard: Shard) -> None:
        """A file is whole and on the disk."""
        sync(self.folder)
        self._append(
            {
                "shard": shard.name,
                "record": asdict(shard.record),
                "items": shard.items,
                "bytes": shard.bytes,
                "linears": {name: asdict(linear) for name, linear in shard.linears.items()},
            }
        )
        self._count(shard)

    def complete(self, manifest: Manifest) -> None:
        """Everything is there: it becomes the destination."""
        manifest.write(self.folder)
        if self._destination.exists():
            raise CheckpointError(f"{self._destination} was made meanwhile; the result is in {self.folder}")
        self.folder.rename(self._destination)
        sync(self._destination.parent)
        self._handle.close()
        shutil.rmtree(self.home)

    def _take_up(self) -> None:
        lines = self._read()
        if not lines or lines[0] != self._key:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._handle.truncate(0)
            self._append(self._key)
            lines = []
        self.folder.mkdir(exist_ok=True)
        for line in lines[1:]:
            linears = {name: PackedLinear(**linear) for name, linear in line["linears"].items()}
            self._count(Shard(line["shard"], ShardRecord(**line["record"]), line["items"], linears, line["bytes"]))
        for path in self.folder.iterdir():  # what a kill left behind
            if path.name not in self.shards:
                path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """The journal's lines up to the first that a kill cut off, which is dropped."""
        self._handle.seek(0)
        lines: list[dict[str, Any]] = []
        kept = 0
        for line in self._handle.read().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
                    kept += len(line.encode())
                    continue
            break
        self._handle.truncate(kept)
        return lines

    def _append(self, content: dict[str, Any]) -> None:
        self._handle.write(json.dumps(content) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def _count(self, shard: Shard) -> None:
        self.shards[shard.name] = shard.record
        self.linears |= shard.linears
        self.done |= set(shard.items)
        self.bytes += shard.bytes


def partial_of(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial")


def _lock(handle: IO[str], home: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows lets no second process write what one has open for appending
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"another process is at work in {home}: wait for it, or choose another name") from error
