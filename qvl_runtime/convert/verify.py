"""Verify that a converted checkpoint is unchanged, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qvl_runtime.errors import CheckpointError, ConfigError
from qvl_runtime.formats.host_memory import release
from qvl_runtime.weights.converted import Converted
from qvl_runtime.weights.file_names import check_inside
from qvl_runtime.weights.manifest import Manifest, ShardRecord, file_digest
from qvl_runtime.weights.shards import MAX_HEADER, open_shard
from qvl_runtime.weights.tensor_file import LENGTH, memory


class Verified(NamedTuple):
    """The result of a verification."""

    tensors: int
    bytes: int
    faults: list[str]  # missing or changed files and tensors


def verify(folder: Path, progress: Callable[[int], None] = lambda done: None) -> Verified:
    """Compare each file of a converted checkpoint with the SHA-256 in its manifest, and all of it with config.json.

    This finds damage. It is no proof of who made the folder: one who changes a file can change the manifest too.
    progress: called with the number of bytes read. Raises `CheckpointError` where the manifest is missing or changed.
    """
    folder = Path(folder)
    faults: list[str] = []
    manifest, tensors, size = Manifest.read(folder), 0, 0
    for name, sha256 in manifest.companions.items():
        if _is_missing(folder, name, faults):
            continue
        if file_digest(folder / name) != sha256:
            faults.append(f"{name} was changed")
    for name, record in manifest.shards.items():
        if _is_missing(folder, name, faults):
            continue
        try:
            read = _shard(folder / name, record, faults, progress, size)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        tensors, size = tensors + len(record.tensors), size + read
    if not faults:
        try:
            converted = Converted.open(folder, manifest=manifest)
            for name in manifest.linears:
                converted.linear(name)
        except (CheckpointError, ConfigError) as error:
            faults.append(str(error))
    return Verified(tensors, size, faults)


def _is_missing(folder: Path, name: str, faults: list[str]) -> bool:
    """Whether there is no file of that name in the folder; if so it is added to the faults."""
    try:
        fault = "" if check_inside(folder, name).is_file() else f"{name} is missing"
    except CheckpointError as error:
        fault = str(error)
    faults.extend([fault] if fault else [])
    return bool(fault)


def _shard(path: Path, record: ShardRecord, faults: list[str], progress: Callable[[int], None], before: int) -> int:
    with path.open("rb") as file:
        length = file.read(LENGTH)
        front = length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER))
    if hashlib.sha256(front).hexdigest() != record.front:
        faults.append(f"the header of {path.name} was changed")
    shard, done = open_shard(path), len(front)
    for name, sha256 in record.tensors.items():
        if name not in shard.infos:
            faults.append(f"{name} is missing in {path.name}")
            continue
        tensor = shard.tensor(name)
        if hashlib.sha256(memory(tensor)).hexdigest() != sha256:
            faults.append(f"{name} in {path.name} was changed")
        release(tensor)
        done += tensor.nbytes
        progress(before + done)
    return done
