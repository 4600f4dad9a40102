"""What a checkpoint is, told by its files: the SHA-256 of each, and one of all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_KINDS = (".json", ".tiktoken", ".safetensors", ".bin")
_CHUNK = 1 << 22


class CheckpointHash(NamedTuple):
    """The files that the runtime reads."""

    whole: str  # SHA-256 of the list of the others
    files: dict[str, str]  # SHA-256 of each by name


def checkpoint_hash(folder: Path, progress: Callable[[int, int], None] | None = None) -> CheckpointHash:
    """Hash the configuration, vocabulary and weights in a folder; all of them are read once.

    progress: called with the bytes read and all of them.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in _KINDS and path.is_file())
    total, done = sum(path.stat().st_size for path in paths), 0
    files = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        files[path.name] = digest.hexdigest()
    listed = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    return CheckpointHash(hashlib.sha256(listed.encode()).hexdigest(), files)
