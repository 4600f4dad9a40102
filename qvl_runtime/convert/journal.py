"""Which files of a conversion are on the disk, so that it can be stopped at any moment and resumed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from qvl_runtime.convert.shard_writer import Shard
from qvl_runtime.weights.files import sync
from qvl_runtime.weights.manifest import FORMAT, Manifest, PackedLinear, ShardRecord
from qvl_runtime.weights.partial import PartialFolder


class Journal:
    """The complete files of a conversion: one line each in `journal.jsonl` of its `PartialFolder`."""

    def __init__(self, destination: Path, key: dict[str, object]) -> None:
        """key: the source and the options; work with another key is not resumed but replaced."""
        self._partial = PartialFolder(destination, {"command": "qvl convert", "format": FORMAT, **key})
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
                self._partial.restart()
            self._handle = (self._partial.home / "journal.jsonl").open("a+", encoding="utf-8")
            self._resume()
        except BaseException:
            self._partial.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.close()
        self._partial.__exit__(kind, error, at)

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
        for line in self._read():
            linears = {name: PackedLinear(**linear) for name, linear in line["linears"].items()}
            self._add(Shard(line["shard"], ShardRecord(**line["record"]), line["items"], linears, line["bytes"]))
        for path in self.folder.iterdir():  # cut off by a kill
            if path.name not in self.shards:
                path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """The journal's lines up to the first that a kill cut off, which is dropped."""
        self._handle.seek(0)
        lines: list[dict[str, Any]] = []
        valid_bytes = 0
        for line in self._handle.read().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if line.endswith("\n"):
                    lines.append(json.loads(line))
                    valid_bytes += len(line.encode())
                    continue
            break
        self._handle.truncate(valid_bytes)
        return lines

    def _add(self, shard: Shard) -> None:
        self.shards[shard.name] = shard.record
        self.linears |= shard.linears
        self.done |= set(shard.items)
        self.bytes += shard.bytes
